// Attention's forward: a block has the queries of a tile of a head, and walks over tiles of keys.
//
// Reference: Dao, 2023. https://arxiv.org/abs/2307.08691
#pragma once

#include "attention/attention_pairs_kernel.cuh"

namespace fused_attn {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// A warp has kRowTiles x 16 queries: with two, every fragment of keys and values that is read from
// shared memory serves two products, which its bandwidth asks for. The accumulators of the output
// are kRowTiles * kHeadDim / 2 registers, those of the logits kRowTiles * kKeys / 2.
//
// Tiles of keys and values take turns in a ring of kSlots. With three, a tile has two products'
// time to arrive; the head size of 256 leaves two where two blocks are to share the memory.
template <int kHeadDim, bool kGeneral>
struct ForwardTiles {
  static constexpr int kRowTiles = kGeneral || kHeadDim > 128 ? 1 : 2;
  static constexpr int kQueries = 16 * kRowTiles * kAttentionWarps;
  static constexpr int kKeys = 64;
  static constexpr int kSlots = kHeadDim > 128 ? 2 : 3;
  // On a multiprocessor, by registers. Where three would spill, two.
  static constexpr int kBlocks =
      kHeadDim <= 32 || (kHeadDim <= 64 && (kGeneral || kHopper)) ? 3 : 2;
  static constexpr int kSharedBytes = (kQueries + kSlots * kKeys) * kHeadDim * 2;
};

template <typename T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kAttentionThreads, (ForwardTiles<kHeadDim, kGeneral>::kBlocks))
    attention_forward_kernel(const __grid_constant__ AttentionForwardCuda p) {
  using Tiles = ForwardTiles<kHeadDim, kGeneral>;
  using TileT = Tile<kHeadDim>;
  constexpr int kRowTiles = Tiles::kRowTiles;
  constexpr int kKeys = Tiles::kKeys;
  constexpr int kSlots = Tiles::kSlots;
  constexpr int kFragments = kKeys / 8;
  constexpr uint32_t kSlotBytes = kKeys * TileT::kRowBytes;
  SHARED(BlockRows, saved, );
  SHARED(HeadPairs, pairs, );
  const AttentionCall& call = p.call;

  const BlockPosition position = block_position(p.grid);
  const int b = position.head / call.heads;
  const int h = position.head % call.heads;
  const int key_head = h / call.heads_per_key;
  const int m0 = position.tile * Tiles::kQueries;
  const AttentionSequence sequence = sequence_of(call, b);
  // Rows behind the length of a packed sequence are the next one's.
  const int stop = call.is_packed ? sequence.queries : call.queries;
  if (m0 >= stop) return;

  const int lane = thread_number() % kWarp;
  const int warp_row = thread_number() / kWarp * (16 * kRowTiles);
  unsigned char* const shared = dynamic_shared();
  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t ring = q_tile + Tiles::kQueries * TileT::kRowBytes;

  const T* const q = head_rows<T>(call.q, b, h, sequence.query_begin);
  const T* const k = head_rows<T>(call.k, b, key_head, sequence.key_begin);
  const T* const v = head_rows<T>(call.v, b, key_head, sequence.key_begin);
  const TileRange range = key_range<Tiles::kQueries, kKeys>(call, sequence, m0);
  TileKinds kinds;
  if constexpr (kGeneral) kinds = tile_kinds(call, b, h, m0, false);
  if (threadIdx.x == 0) {
    saved = {
        b,    h, m0, sequence.query_begin, stop, sequence.queries, sequence.keys, sequence.diagonal,
        range};
    if constexpr (kGeneral) pairs = head_pairs<T>(call, sequence, b, h);
  }
  __syncthreads();
  KeysShown shown_keys;
  if constexpr (kGeneral) shown_keys = keys_shown(call, b, h);
  const auto next_tile = [&](int tile) {
    if constexpr (kGeneral) return kinds.next<kKeys>(tile, range.last);
    return tile;
  };
  const auto load = [&](const T* rows, const AttentionRows& layout, int tile, int slot) {
    if (tile < range.last) {
      const uint32_t to = ring + slot * kSlotBytes;
      const int n0 = tile * kKeys;
      if constexpr (kGeneral)
        load_tile<T, kHeadDim, kKeys, kAttentionThreads>(to, rows, layout.stride_row, layout.width,
                                                         n0, saved.keys, shown_keys);
      else
        load_tile<T, kHeadDim, kKeys, kAttentionThreads>(to, rows, layout.stride_row, layout.width,
                                                         n0, saved.keys, AllShown());
    }
    ptx::cp_async_commit();
  };

  float output[kRowTiles][kHeadDim / 8][4];
  // What is subtracted from a row's logits, in their unit: a peak of those seen. Weights of up to
  // e^kSlack are as exact as others, so that a little higher peak changes nothing, and accumulators
  // are scaled in few turns.
  constexpr float kSlack = 8.0f;
  float peak[kRowTiles][2];
  float total[kRowTiles][2];
  clear(output);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[i][r] = -infinity();
      total[i][r] = 0.0f;
    }
  // The general kernel scales logits before it adds to them.
  const float multiplier = kGeneral ? 1.0f : call.scale * kLog2E;
  const float exponent_unit = kGeneral ? call.exponent_unit : 1.0f;
  const bool is_softmax = !kGeneral || call.activation == AttentionActivation::kSoftmax;

  int tile = next_tile(range.first);
  load_tile<T, kHeadDim, Tiles::kQueries, kAttentionThreads>(
      q_tile, q, call.q.stride_row, call.q.width, m0, sequence.queries, AllShown());
  load(k, call.k, tile, 0);
  if constexpr (kSlots == 3) load(v, call.v, tile, 1);
  int k_slot = 0;
  const uint32_t q_address = TileT::first_operand(q_tile, warp_row, lane);

  while (tile < range.last) {
    const int next = next_tile(tile + 1);
    const int v_slot = k_slot + 1 < kSlots ? k_slot + 1 : 0;
    const int free_slot = v_slot + 1 < kSlots ? v_slot + 1 : 0;
    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();
    if constexpr (kSlots == 3)
      load(k, call.k, next, free_slot);
    else
      load(v, call.v, tile, v_slot);

    float x[kRowTiles][kFragments][4];
    clear(x);
    multiply_transposed<T, kHeadDim, kRowTiles, kKeys>(
        x, q_address, TileT::by_rows(ring + k_slot * kSlotBytes, lane));

    const int n0 = tile * kKeys;
    const bool cut = saved.range.cuts(tile);
    if constexpr (kGeneral) {
      const bool mixed = kinds.class_at(n0) > 1;
      const uint32_t* const bits = block_bits(call, kinds.block_at(n0));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
          const FourPairs<false> at{m0 + warp_row + 16 * i + lane / 4, n0 + 8 * j + lane % 4 * 2};
          float derivative[4];
          logits<T>(call, pairs, at, x[i][j], derivative);
          if (cut || mixed || bits) {
            const unsigned shown = shown_pairs(call, pairs, at, cut, mixed, bits);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if ((shown >> e & 1) == 0) x[i][j][e] = -infinity();
          }
        }
    } else if (cut) {
      hide_cut_pairs(call, saved, saved.first + warp_row, n0, lane, x);
    }

    if (is_softmax) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        float shrink[2];
        bool grows = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float highest = x[i][0][2 * r];
#pragma unroll
          for (int j = 0; j < kFragments; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) highest = fmaxf(highest, x[i][j][2 * r + c]);
          highest = quad_max(highest) * multiplier;
          const bool higher = highest > peak[i][r] + kSlack;
          shrink[r] = higher ? ptx::exp2_approx((peak[i][r] - highest) * exponent_unit) : 1.0f;
          peak[i][r] = higher ? highest : peak[i][r];
          total[i][r] *= shrink[r];
          grows |= higher;
        }
        if (__any_sync(kFullMask, grows)) {
#pragma unroll
          for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) output[i][j][e] *= shrink[e / 2];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          // A row that has seen nothing yet, or only NaN, is shifted by 0.
          const float shift = peak[i][r] == -infinity() ? 0.0f : peak[i][r];
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < kFragments; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& w = x[i][j][2 * r + c];
              w = ptx::exp2_approx(kGeneral ? (w - shift) * exponent_unit
                                            : fmaf(w, multiplier, -shift));
              sum += w;
            }
          total[i][r] += sum;
        }
      }
    } else if constexpr (kGeneral) {
      // The total is not 0 if the row sees something.
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kFragments; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (x[i][j][e] != -infinity()) total[i][e / 2] = 1.0f;
            x[i][j][e] = activated(call, x[i][j][e]);
          }
    }
    if constexpr (kGeneral) {
      if (call.seed) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
            const FourPairs<false> at{m0 + warp_row + 16 * i + lane / 4, n0 + 8 * j + lane % 4 * 2};
            const unsigned kept = kept_pairs(call, pairs, at);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if ((kept >> e & 1) == 0) x[i][j][e] = 0.0f;
          }
      }
    }

    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();
    if constexpr (kSlots == 3)
      load(v, call.v, next, k_slot);
    else
      load(k, call.k, next, k_slot);
    multiply<T, kHeadDim, kRowTiles, kKeys>(output, x,
                                            TileT::by_columns(ring + v_slot * kSlotBytes, lane));
    k_slot = free_slot;
    tile = next;
  }
  // What is on its way to the queries' rows must land before these are written over.
  ptx::cp_async_wait<0>();
  __syncthreads();

  const BlockRows rows = saved;
  const float keep_scale = kGeneral ? call.keep_scale : 1.0f;
  const int64_t index = row_index(call, rows.b, rows.h, rows.begin);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = rows.first + warp_row + 16 * i + 8 * r + lane / 4;
      const float sum = quad_sum(total[i][r]);
      // Not by the peak, which has lost a NaN.
      const bool empty = sum == 0.0f || t >= rows.queries;
      float factor = keep_scale;
      float lse = 0.0f;
      if (is_softmax) {
        const bool in_nature = kGeneral && call.exact;
        factor = keep_scale / sum;
        lse = (in_nature ? peak[i][r] : peak[i][r] * kLn2) + logf(sum);
      }
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& o = output[i][j][2 * r + c];
          o = empty ? 0.0f : o * factor;
        }
      if (lane % 4 == 0 && t < rows.stop) p.lse[index + t] = empty ? -infinity() : lse;
    }
  store_rows<T, kHeadDim, kRowTiles>(
      output, shared, warp_row, head_rows<T>(p.output, rows.b, rows.h, rows.begin),
      p.output.stride_row, p.output.width, p.output.vectors, rows.first + warp_row, rows.stop);
}

}  // namespace fused_attn
