// Attention's backward: dq with the statistics of rows, then dk and dv, then the bias's gradient.
// Each sum is made by one block in one order.
#pragma once

#include "attention/attention_forward_kernel.cuh"

namespace fused_attn {

// Queries, their gradients of the output, and accumulators of dq stay; keys and values come in two
// stages. Registers: kRowTiles * (kHeadDim / 2 + kKeys) for dq, logits and dP.
template <int kHeadDim, bool kGeneral>
struct QueryGradientTiles {
  static constexpr int kRowTiles = kGeneral || kHeadDim > 128 ? 1 : 2;
  static constexpr int kQueries = 16 * kRowTiles * kAttentionWarps;
  static constexpr int kKeys = kHeadDim <= 64 ? 64 : kHeadDim <= 128 && kGeneral ? 64 : 32;
  static constexpr int kBlocks = kHeadDim > 128 ? 1 : 2;
  static constexpr int kSharedBytes = (2 * kQueries + 4 * kKeys) * kHeadDim * 2;
};

// Keys, values and accumulators of dk and dv stay; queries and gradients of the output come in two
// stages, with their statistics. Registers: kHeadDim / 2 for each accumulator, and kQueries for
// logits and dP. A head size of 256 leaves no room for both accumulators: dk and dv are two
// launches, and the logits are computed twice.
template <int kHeadDim, bool kGeneral>
struct KeyGradientTiles {
  static constexpr bool kTogether = kHeadDim <= 128;
  static constexpr int kKeys = 16 * kAttentionWarps;
  static constexpr int kQueries = kHeadDim <= 64 || (kHeadDim <= 128 && !kGeneral) ? 64 : 32;
  static constexpr int kBlocks = kHeadDim > 128 ? 1 : 2;
  static constexpr int kStageBytes = 2 * kQueries * kHeadDim * 2;
  static constexpr int kStatisticsBytes = 2 * kQueries * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes =
      2 * kKeys * kHeadDim * 2 + 2 * (kStageBytes + kStatisticsBytes);
};

// The distance from 1 to the next number.
template <typename T>
struct Rounding;
template <>
struct Rounding<__half> {
  static constexpr float kEpsilon = 0x1p-10f;
};
template <>
struct Rounding<__nv_bfloat16> {
  static constexpr float kEpsilon = 0x1p-7f;
};

// The lse in the logits' unit; +inf, for weights of 0, where there is nothing.
__device__ __forceinline__ float shift_of(float lse, bool exact) {
  if (lse == -infinity()) return infinity();
  return exact ? lse : lse * kLog2E;
}

// From q · k and dP: the weights of four pairs that dropout kept, in x, and dX in dp. `scaled_dx`
// is dX times the derivative of the soft-cap: what dq and dk are made of.
template <typename T, bool kTransposed>
__device__ __forceinline__ void differentiate(const AttentionCall& call, const HeadPairs& pairs,
                                              FourPairs<kTransposed> at, bool cut, bool mixed,
                                              const uint32_t* bits, const float (&lse)[4],
                                              const float (&delta)[4], float (&x)[4],
                                              float (&dp)[4], float (&scaled_dx)[4]) {
  float derivative[4];
  logits<T>(call, pairs, at, x, derivative);
  unsigned shown = 0xF;
  if (cut || mixed || bits) shown = shown_pairs(call, pairs, at, cut, mixed, bits);
  unsigned kept = 0xF;
  if (call.seed) kept = kept_pairs(call, pairs, at);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool is_shown = shown >> e & 1;
    const bool is_kept = kept >> e & 1;
    const float gradient = is_kept ? dp[e] * call.keep_scale : 0.0f;
    float w, dx;
    if (call.activation == AttentionActivation::kSoftmax) {
      w = ptx::exp2_approx((x[e] - lse[e]) * call.exponent_unit);
      dx = w * (gradient - delta[e]);
    } else {
      w = activated(call, x[e]);
      dx = call.activation == AttentionActivation::kSigmoid ? w * (1.0f - w) * gradient
                                                            : (w > 0.0f ? gradient : 0.0f);
    }
    x[e] = is_shown && is_kept ? w : 0.0f;
    dp[e] = is_shown ? dx : 0.0f;
    scaled_dx[e] = is_shown ? dx * derivative[e] : 0.0f;
  }
}

// --- dq -----------------------------------------------------------------------------------------

// dq of a tile of queries of a head, and the statistics of its rows.
//
// delta = sum P dP is first made from the output. That was rounded, and what delta lacks is the
// sum of dX. Where it is more than a share of sum |dX| in some row, the loop runs again.
template <typename T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kAttentionThreads,
                                  (QueryGradientTiles<kHeadDim, kGeneral>::kBlocks))
    attention_query_gradient_kernel(const __grid_constant__ AttentionBackwardCuda p) {
  using Tiles = QueryGradientTiles<kHeadDim, kGeneral>;
  using TileT = Tile<kHeadDim>;
  constexpr int kRowTiles = Tiles::kRowTiles;
  constexpr int kKeys = Tiles::kKeys;
  constexpr int kFragments = kKeys / 8;
  constexpr uint32_t kQueryBytes = Tiles::kQueries * TileT::kRowBytes;
  constexpr uint32_t kKeyBytes = kKeys * TileT::kRowBytes;
  SHARED(BlockRows, saved, );
  SHARED(HeadPairs, pairs, );
  const AttentionCall& call = p.call;

  const BlockPosition position = block_position(p.grid);
  const int b = position.head / call.heads;
  const int h = position.head % call.heads;
  const int key_head = h / call.heads_per_key;
  const int m0 = position.tile * Tiles::kQueries;
  const AttentionSequence sequence = sequence_of(call, b);
  const int stop = call.is_packed ? sequence.queries : call.queries;
  if (m0 >= stop) return;

  const int lane = thread_number() % kWarp;
  const int warp_row = thread_number() / kWarp * (16 * kRowTiles);
  unsigned char* const shared = dynamic_shared();
  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t do_tile = q_tile + kQueryBytes;
  const uint32_t stages = do_tile + kQueryBytes;

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
  const auto load = [&](int tile, int stage) {
    if (tile < range.last) {
      const uint32_t to = stages + stage * (2 * kKeyBytes);
      const int n0 = tile * kKeys;
      const auto load_both = [&](auto shown) {
        load_tile<T, kHeadDim, kKeys, kAttentionThreads>(to, k, call.k.stride_row, call.k.width, n0,
                                                         saved.keys, shown);
        load_tile<T, kHeadDim, kKeys, kAttentionThreads>(to + kKeyBytes, v, call.v.stride_row,
                                                         call.v.width, n0, saved.keys, shown);
      };
      if constexpr (kGeneral)
        load_both(shown_keys);
      else
        load_both(AllShown());
    }
    ptx::cp_async_commit();
  };

  load_tile<T, kHeadDim, Tiles::kQueries, kAttentionThreads>(
      q_tile, head_rows<T>(call.q, b, h, sequence.query_begin), call.q.stride_row, call.q.width, m0,
      sequence.queries, AllShown());
  load_tile<T, kHeadDim, Tiles::kQueries, kAttentionThreads>(
      do_tile, head_rows<T>(p.grad_output, b, h, sequence.query_begin), p.grad_output.stride_row,
      p.grad_output.width, m0, sequence.queries, AllShown());
  ptx::cp_async_commit();
  load(next_tile(range.first), 0);

  // Statistics: each lane makes those of one of the warp's rows, or of half of it.
  const bool is_softmax = !kGeneral || call.activation == AttentionActivation::kSoftmax;
  const bool exact = kGeneral && call.exact;
  constexpr int kLanesPerRow = 2 / kRowTiles;
  SHARED(float, row_sums, [Tiles::kQueries]);  // of dX: the gradients of the lse
  SHARED(bool, is_corrected, );
  if (threadIdx.x == 0) is_corrected = false;
  float row_lse = 0.0f, row_delta = 0.0f, row_sum = 0.0f;
  ptx::cp_async_wait<1>();
  __syncthreads();
  if (is_softmax) {
    const int row = warp_row + lane / kLanesPerRow;
    const int t = m0 + row;
    row_lse = infinity();
    if (t < sequence.queries) {
      row_lse = shift_of(p.lse[row_index(call, b, h, sequence.query_begin) + t], exact);
      const T* const output =
          head_rows<T>(p.output, b, h, sequence.query_begin) + t * p.output.stride_row;
      for (int chunk = lane % kLanesPerRow; chunk * 8 < p.output.width; chunk += kLanesPerRow) {
        const Pack<T, 8> o = load_pack<8>(output + chunk * 8);
        const Pack<T, 8> g = load_pack<8>(
            reinterpret_cast<const T*>(shared + kQueryBytes + TileT::offset(row, chunk)));
#pragma unroll
        for (int e = 0; e < 8; ++e) row_delta += to_float(o.element[e]) * to_float(g.element[e]);
      }
    }
    if constexpr (kLanesPerRow == 2) row_delta += __shfl_xor_sync(kFullMask, row_delta, 1);
    if (p.grad_lse && t < sequence.queries && row_lse != infinity()) {
      const int64_t at = (call.is_packed ? 0 : b * p.grad_lse_stride_b) + h * p.grad_lse_stride_h;
      row_sum = p.grad_lse[at + (sequence.query_begin + t) * p.grad_lse_stride_t];
      row_delta -= row_sum;
    }
  }
  if (lane % kLanesPerRow == 0) row_sums[warp_row + lane / kLanesPerRow] = row_sum;
  // From the lane that made them to those that have the rows of accumulators.
  float lse[kRowTiles][2], delta[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int source = (16 * i + 8 * r + lane / 4) * kLanesPerRow;
      lse[i][r] = __shfl_sync(kFullMask, row_lse, source);
      delta[i][r] = __shfl_sync(kFullMask, row_delta, source);
    }

  const uint32_t q_address = TileT::first_operand(q_tile, warp_row, lane);
  const uint32_t do_address = TileT::first_operand(do_tile, warp_row, lane);
  const float multiplier = call.scale * kLog2E;
  // A sixteenth of the distance from 1 to the next number of type T.
  constexpr float kTolerance = Rounding<T>::kEpsilon / 16.0f;

  float dq[kRowTiles][kHeadDim / 8][4];
  for (;;) {
    clear(dq);
    float error[kRowTiles][2] = {};
    float size[kRowTiles][2] = {};
    int tile = next_tile(saved.range.first);
    int stage = 0;
    while (tile < range.last) {
      const int next = next_tile(tile + 1);
      ptx::cp_async_wait<0>();
      __syncthreads();
      load(next, stage ^ 1);
      const uint32_t k_tile = stages + stage * (2 * kKeyBytes);
      const uint32_t v_tile = k_tile + kKeyBytes;
      float x[kRowTiles][kFragments][4], dp[kRowTiles][kFragments][4];
      clear(x);
      multiply_transposed<T, kHeadDim, kRowTiles, kKeys>(x, q_address,
                                                         TileT::by_rows(k_tile, lane));
      clear(dp);
      multiply_transposed<T, kHeadDim, kRowTiles, kKeys>(dp, do_address,
                                                         TileT::by_rows(v_tile, lane));
      const int n0 = tile * kKeys;
      const bool cut = saved.range.cuts(tile);
      if constexpr (kGeneral) {
        const bool mixed = kinds.class_at(n0) > 1;
        const uint32_t* const bits = block_bits(call, kinds.block_at(n0));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const float lse_of[4] = {lse[i][0], lse[i][0], lse[i][1], lse[i][1]};
          const float delta_of[4] = {delta[i][0], delta[i][0], delta[i][1], delta[i][1]};
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
            const FourPairs<false> at{m0 + warp_row + 16 * i + lane / 4, n0 + 8 * j + lane % 4 * 2};
            float scaled_dx[4];
            differentiate<T>(call, pairs, at, cut, mixed, bits, lse_of, delta_of, x[i][j], dp[i][j],
                             scaled_dx);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              error[i][e / 2] += dp[i][j][e];
              size[i][e / 2] += fabsf(dp[i][j][e]);
              dp[i][j][e] = scaled_dx[e];
            }
          }
        }
      } else {
        if (cut) hide_cut_pairs(call, saved, saved.first + warp_row, n0, lane, x);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int j = 0; j < kFragments; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int r = e / 2;
              const float w = ptx::exp2_approx(fmaf(x[i][j][e], multiplier, -lse[i][r]));
              const float dx = w * (dp[i][j][e] - delta[i][r]);
              error[i][r] += dx;
              size[i][r] += fabsf(dx);
              dp[i][j][e] = dx;
            }
      }
      multiply<T, kHeadDim, kRowTiles, kKeys>(dq, dp, TileT::by_columns(k_tile, lane));
      stage ^= 1;
      tile = next;
    }
    ptx::cp_async_wait<0>();
    __syncwarp();
    if (is_corrected || !is_softmax) break;
    bool wrong = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A row's dX add up to grad_lse, if delta is right.
        const float lacking =
            quad_sum(error[i][r]) - row_sums[warp_row + 16 * i + 8 * r + lane / 4];
        wrong |= fabsf(lacking) > kTolerance * quad_sum(size[i][r]);
        delta[i][r] += lacking;
      }
    // Also the barrier before the stages are written over.
    if (__syncthreads_or(wrong) == 0) break;
    if (threadIdx.x == 0) is_corrected = true;
    load(next_tile(saved.range.first), 0);
  }
  __syncthreads();

  const BlockRows rows = saved;
  const int64_t statistics = statistics_index(call, rows.b, rows.h);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = rows.first + warp_row + 16 * i + 8 * r + lane / 4;
      if (lane % 4 == 0) {
        p.row_lse[statistics + t] = lse[i][r];
        p.row_delta[statistics + t] = delta[i][r];
      }
      const bool seen = t < rows.queries && lse[i][r] != infinity();
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& g = dq[i][j][2 * r + c];
          g = seen ? g * call.scale : 0.0f;
        }
    }
  store_rows<T, kHeadDim, kRowTiles>(
      dq, shared, warp_row, head_rows<T>(p.dq, rows.b, rows.h, rows.begin), p.dq.stride_row,
      p.dq.width, p.dq.vectors, rows.first + warp_row, rows.stop);
}

// --- dk and dv ----------------------------------------------------------------------------------

// The rows of the first of the heads that share keys.
struct HeadGroup {
  const void* q;
  const void* grad_output;
  const float* row_lse;
  const float* row_delta;
};

// dk and dv of a tile of keys, from all query heads that share it, in their order. Tiles of pairs
// are transposed, rows being keys, so that P^T and dX^T are first operands where they are.
template <typename T, int kHeadDim, bool kGeneral, bool kWantKeys, bool kWantValues>
__global__ void __launch_bounds__(kAttentionThreads,
                                  (KeyGradientTiles<kHeadDim, kGeneral>::kBlocks))
    attention_key_gradient_kernel(const __grid_constant__ AttentionBackwardCuda p) {
  using Tiles = KeyGradientTiles<kHeadDim, kGeneral>;
  using TileT = Tile<kHeadDim>;
  constexpr int kKeys = Tiles::kKeys;
  constexpr int kQueries = Tiles::kQueries;
  constexpr int kFragments = kQueries / 8;
  constexpr uint32_t kKeyBytes = kKeys * TileT::kRowBytes;
  constexpr uint32_t kQueryBytes = kQueries * TileT::kRowBytes;
  SHARED(BlockRows, saved, );
  SHARED(HeadPairs, pairs, );
  SHARED(HeadGroup, group, );
  const AttentionCall& call = p.call;

  const BlockPosition position = block_position(p.grid);
  const int key_heads = call.heads / call.heads_per_key;
  const int b = position.head / key_heads;
  const int key_head = position.head % key_heads;
  const int n0 = position.tile * kKeys;
  const AttentionSequence sequence = sequence_of(call, b);
  const int stop = call.is_packed ? sequence.keys : call.keys;
  if (n0 >= stop) return;

  const int lane = thread_number() % kWarp;
  const int warp_row = thread_number() / kWarp * 16;
  unsigned char* const shared = dynamic_shared();
  const uint32_t k_tile = ptx::shared_address(shared);
  const uint32_t v_tile = k_tile + kKeyBytes;
  const uint32_t stages = v_tile + kKeyBytes;
  // lse and delta of a stage's queries, for each stage.
  constexpr uint32_t kStatistics = 2 * kKeyBytes + 2 * Tiles::kStageBytes;

  const TileRange range = query_range<kQueries, kKeys>(call, sequence, n0);
  // The loop is over tiles of queries of heads that share the keys.
  if (threadIdx.x == 0) {
    const int h = key_head * call.heads_per_key;
    const int64_t statistics = statistics_index(call, b, h);
    group = {head_rows<T>(call.q, b, h, sequence.query_begin),
             head_rows<T>(p.grad_output, b, h, sequence.query_begin), p.row_lse + statistics,
             p.row_delta + statistics};
    saved = {b,
             key_head,
             n0,
             sequence.key_begin,
             stop,
             sequence.queries,
             sequence.keys,
             sequence.diagonal,
             range};
  }
  __syncthreads();
  TileKinds kinds;
  struct Step {
    int head;
    int tile;
  };
  // The first step from `step` on that shows something; one of head heads_per_key if there is none.
  const auto find = [&](Step step) {
    while (step.head < call.heads_per_key) {
      if constexpr (kGeneral) {
        const TileKinds shown =
            tile_kinds(call, saved.b, saved.h * call.heads_per_key + step.head, saved.first, true);
        step.tile = shown.next<kQueries>(step.tile, range.last);
      }
      if (step.tile < range.last) break;
      ++step.head;
      step.tile = saved.range.first;
    }
    return step;
  };
  const auto load = [&](Step step, int stage) {
    if (step.head < call.heads_per_key) {
      const int m0 = step.tile * kQueries;
      const uint32_t to = stages + stage * Tiles::kStageBytes;
      load_tile<T, kHeadDim, kQueries, kAttentionThreads>(
          to, static_cast<const T*>(group.q) + step.head * call.q.stride_h, call.q.stride_row,
          call.q.width, m0, saved.queries, AllShown());
      load_tile<T, kHeadDim, kQueries, kAttentionThreads>(
          to + kQueryBytes,
          static_cast<const T*>(group.grad_output) + step.head * p.grad_output.stride_h,
          p.grad_output.stride_row, p.grad_output.width, m0, saved.queries, AllShown());
      constexpr int kPacks = kQueries / 4;
      if (thread_number() < 2 * kPacks) {
        const int64_t row =
            statistics_index(call, 0, step.head) + m0 + thread_number() % kPacks * 4;
        ptx::cp_async16(
            k_tile + kStatistics + stage * Tiles::kStatisticsBytes + thread_number() * 16,
            (thread_number() < kPacks ? group.row_lse : group.row_delta) + row, true);
      }
    }
    ptx::cp_async_commit();
  };

  {
    const T* const k = head_rows<T>(call.k, b, key_head, sequence.key_begin);
    const T* const v = head_rows<T>(call.v, b, key_head, sequence.key_begin);
    load_tile<T, kHeadDim, kKeys, kAttentionThreads>(k_tile, k, call.k.stride_row, call.k.width, n0,
                                                     sequence.keys, AllShown());
    load_tile<T, kHeadDim, kKeys, kAttentionThreads>(v_tile, v, call.v.stride_row, call.v.width, n0,
                                                     sequence.keys, AllShown());
  }
  Step step = find({0, range.first});
  load(step, 0);

  float dk[1][kWantKeys ? kHeadDim / 8 : 1][4], dv[1][kWantValues ? kHeadDim / 8 : 1][4];
  clear(dk);
  clear(dv);
  const uint32_t k_address = TileT::first_operand(k_tile, warp_row, lane);
  const uint32_t v_address = TileT::first_operand(v_tile, warp_row, lane);
  const float multiplier = call.scale * kLog2E;
  int stage = 0;
  int known_head = -1;
  while (step.head < call.heads_per_key) {
    if (kGeneral && step.head != known_head) {
      known_head = step.head;
      const int h = saved.h * call.heads_per_key + step.head;
      // The last head's pairs have been looked at.
      __syncthreads();
      if (threadIdx.x == 0) pairs = head_pairs<T>(call, sequence, saved.b, h);
      kinds = tile_kinds(call, saved.b, h, saved.first, true);
    }
    const Step next = find({step.head, step.tile + 1});
    ptx::cp_async_wait<0>();
    __syncthreads();
    load(next, stage ^ 1);
    const uint32_t q_tile = stages + stage * Tiles::kStageBytes;
    const uint32_t do_tile = q_tile + kQueryBytes;
    const float* const statistics =
        reinterpret_cast<const float*>(shared + kStatistics + stage * Tiles::kStatisticsBytes);
    const int m0 = step.tile * kQueries;

    float x[1][kFragments][4], dp[1][kFragments][4];
    clear(x);
    multiply_transposed<T, kHeadDim, 1, kQueries>(x, k_address, TileT::by_rows(q_tile, lane));
    clear(dp);
    if constexpr (kWantKeys)
      multiply_transposed<T, kHeadDim, 1, kQueries>(dp, v_address, TileT::by_rows(do_tile, lane));
    const bool cut = saved.range.cuts(step.tile);
    bool mixed = false;
    const uint32_t* bits = nullptr;
    if constexpr (kGeneral) {
      mixed = kinds.class_at(m0) > 1;
      bits = block_bits(call, kinds.block_at(m0));
    } else if (cut) {
      // Keys behind the length have nothing to hide from: their rows are not stored.
      const int over = saved.first + warp_row + lane / 4 - (m0 + lane % 4 * 2) - saved.diagonal;
#pragma unroll
      for (int j = 0; j < kFragments; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int distance = over + (e / 2 * 8 - e % 2 - 8 * j);
          if (distance > call.right || distance < -call.left) x[0][j][e] = -infinity();
        }
    }
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
      const int column = 8 * j + lane % 4 * 2;
      const float2 lse = *reinterpret_cast<const float2*>(statistics + column);
      const float2 delta = *reinterpret_cast<const float2*>(statistics + kQueries + column);
      const FourPairs<true> at{m0 + column, n0 + warp_row + lane / 4};
      if constexpr (kGeneral) {
        const float lse_of[4] = {lse.x, lse.y, lse.x, lse.y};
        const float delta_of[4] = {delta.x, delta.y, delta.x, delta.y};
        float scaled_dx[4];
        differentiate<T>(call, pairs, at, cut, mixed, bits, lse_of, delta_of, x[0][j], dp[0][j],
                         scaled_dx);
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[0][j][e] = scaled_dx[e];
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float w =
              ptx::exp2_approx(fmaf(x[0][j][e], multiplier, e % 2 == 0 ? -lse.x : -lse.y));
          x[0][j][e] = w;
          if constexpr (kWantKeys)
            dp[0][j][e] = w * (dp[0][j][e] - (e % 2 == 0 ? delta.x : delta.y));
        }
      }
    }
    if constexpr (kWantValues)
      multiply<T, kHeadDim, 1, kQueries>(dv, x, TileT::by_columns(do_tile, lane));
    if constexpr (kWantKeys)
      multiply<T, kHeadDim, 1, kQueries>(dk, dp, TileT::by_columns(q_tile, lane));
    stage ^= 1;
    step = next;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  const BlockRows rows = saved;
  const float keep_scale = kGeneral ? call.keep_scale : 1.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool seen = rows.first + warp_row + 8 * r + lane / 4 < rows.keys;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (kWantKeys) {
          float& g = dk[0][j][2 * r + c];
          g = seen ? g * call.scale : 0.0f;
        }
        if constexpr (kWantValues) {
          float& g = dv[0][j][2 * r + c];
          g = seen ? g * keep_scale : 0.0f;
        }
      }
  }
  if constexpr (kWantKeys)
    store_rows<T, kHeadDim, 1>(dk, shared, warp_row, head_rows<T>(p.dk, rows.b, rows.h, rows.begin),
                               p.dk.stride_row, p.dk.width, p.dk.vectors, rows.first + warp_row,
                               rows.stop);
  if constexpr (kWantValues)
    store_rows<T, kHeadDim, 1>(dv, shared + kKeyBytes, warp_row,
                               head_rows<T>(p.dv, rows.b, rows.h, rows.begin), p.dv.stride_row,
                               p.dv.width, p.dv.vectors, rows.first + warp_row, rows.stop);
}

// --- the bias's gradient ------------------------------------------------------------------------

constexpr int kBiasTile = 64;

template <int kHeadDim>
struct BiasGradientTiles {
  static constexpr int kBlocks = kHeadDim > 128 ? 1 : 2;
  static constexpr int kTileBytes = kBiasTile * kHeadDim * 2;
  static constexpr int kSharedBytes = 4 * kTileBytes;
};

// A tile of the bias's gradient, added up over the dimensions in which the bias is broadcast: dX
// is made again, and nothing of the size of the pairs is in memory but what was asked for.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, BiasGradientTiles<kHeadDim>::kBlocks)
    attention_bias_gradient_kernel(const __grid_constant__ AttentionBiasGradient g) {
  using Tiles = BiasGradientTiles<kHeadDim>;
  using TileT = Tile<kHeadDim>;
  constexpr int kFragments = kBiasTile / 8;
  const AttentionBackwardCuda& p = g.backward;
  const AttentionCall& call = p.call;
  SHARED(float, column_sums, [kAttentionWarps][kBiasTile]);

  // The tile's place in the bias, and what else it stands for.
  const bool by_row = g.sizes[2] > 1, by_column = g.sizes[3] > 1;
  const int row_tiles = (call.queries + kBiasTile - 1) / kBiasTile;
  const int column_tiles = (call.keys + kBiasTile - 1) / kBiasTile;
  const int own_columns = by_column ? column_tiles : 1;
  const int own_rows = by_row ? row_tiles : 1;
  int block = static_cast<int>(blockIdx.x);
  const int own_column = block % own_columns;
  block /= own_columns;
  const int own_row = block % own_rows;
  block /= own_rows;
  const int bias_heads = static_cast<int>(g.sizes[1]);
  const int own_head = block % bias_heads;
  const int own_batch = block / bias_heads;
  const bool by_head = bias_heads > 1, by_batch = g.sizes[0] > 1;
  const int last_batch = by_batch ? own_batch + 1 : call.batch;
  const int last_head = by_head ? own_head + 1 : call.heads;
  const int last_row = by_row ? own_row + 1 : row_tiles;

  const int lane = thread_number() % kWarp;
  const int warp = thread_number() / kWarp;
  const uint32_t q_tile = ptx::shared_address(dynamic_shared());
  const uint32_t do_tile = q_tile + Tiles::kTileBytes;
  const uint32_t k_tile = do_tile + Tiles::kTileBytes;
  const uint32_t v_tile = k_tile + Tiles::kTileBytes;

  float total[kFragments][4] = {};
  for (int b = own_batch; b < last_batch; ++b) {
    const AttentionSequence sequence = sequence_of(call, b);
    for (int h = own_head; h < last_head; ++h) {
      const int key_head = h / call.heads_per_key;
      const HeadPairs pairs = head_pairs<T>(call, sequence, b, h);
      const int64_t statistics = statistics_index(call, b, h);
      for (int row = own_row; row < last_row; ++row) {
        const int m0 = row * kBiasTile;
        const TileRange range = key_range<kBiasTile, kBiasTile>(call, sequence, m0);
        const TileKinds kinds = tile_kinds(call, b, h, m0, false);
        const int end = by_column ? min(own_column + 1, range.last) : range.last;
        int tile = kinds.next<kBiasTile>(max(own_column, range.first), end);
        if (tile >= end) continue;
        // The last row's tiles have been read.
        __syncthreads();
        load_tile<T, kHeadDim, kBiasTile, kAttentionThreads>(
            q_tile, head_rows<T>(call.q, b, h, sequence.query_begin), call.q.stride_row,
            call.q.width, m0, sequence.queries, AllShown());
        load_tile<T, kHeadDim, kBiasTile, kAttentionThreads>(
            do_tile, head_rows<T>(p.grad_output, b, h, sequence.query_begin),
            p.grad_output.stride_row, p.grad_output.width, m0, sequence.queries, AllShown());
        float lse_of[4], delta_of[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t at = statistics + m0 + 16 * warp + lane / 4 + e / 2 * 8;
          lse_of[e] = p.row_lse[at];
          delta_of[e] = p.row_delta[at];
        }
        for (; tile < end; tile = kinds.next<kBiasTile>(tile + 1, end)) {
          const int n0 = tile * kBiasTile;
          __syncthreads();
          load_tile<T, kHeadDim, kBiasTile, kAttentionThreads>(
              k_tile, head_rows<T>(call.k, b, key_head, sequence.key_begin), call.k.stride_row,
              call.k.width, n0, sequence.keys, keys_shown(call, b, h));
          load_tile<T, kHeadDim, kBiasTile, kAttentionThreads>(
              v_tile, head_rows<T>(call.v, b, key_head, sequence.key_begin), call.v.stride_row,
              call.v.width, n0, sequence.keys, keys_shown(call, b, h));
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();
          float x[1][kFragments][4], dp[1][kFragments][4];
          clear(x);
          multiply_transposed<T, kHeadDim, 1, kBiasTile>(
              x, TileT::first_operand(q_tile, 16 * warp, lane), TileT::by_rows(k_tile, lane));
          clear(dp);
          multiply_transposed<T, kHeadDim, 1, kBiasTile>(
              dp, TileT::first_operand(do_tile, 16 * warp, lane), TileT::by_rows(v_tile, lane));
          const bool cut = range.cuts(tile);
          const bool mixed = kinds.class_at(n0) > 1;
          const uint32_t* const bits = block_bits(call, kinds.block_at(n0));
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
            const FourPairs<false> at{m0 + 16 * warp + lane / 4, n0 + 8 * j + lane % 4 * 2};
            float scaled_dx[4];
            differentiate<T>(call, pairs, at, cut, mixed, bits, lse_of, delta_of, x[0][j], dp[0][j],
                             scaled_dx);
#pragma unroll
            for (int e = 0; e < 4; ++e) total[j][e] += dp[0][j][e];
          }
        }
      }
    }
  }

  // Rows and columns that the bias lacks are added up; what is behind a length is 0 in either.
  if (!by_column) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float sum = 0.0f;
      // The two columns of a lane are added up in place of the first.
#pragma unroll
      for (int j = 0; j < kFragments; ++j) sum += total[j][e];
      total[0][e] = sum;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) total[0][2 * r] = quad_sum(total[0][2 * r] + total[0][2 * r + 1]);
  }
  const int64_t columns = g.sizes[3];
  const int64_t start =
      (static_cast<int64_t>(own_batch) * bias_heads + own_head) * g.sizes[2] * columns;
  const auto store = [&](int row, int column, float value) {
    if (row >= g.sizes[2] || column >= columns) return;
    const int64_t at = start + row * columns + column;
    if (call.bias_is_fp32)
      static_cast<float*>(g.data)[at] = value;
    else
      static_cast<T*>(g.data)[at] = from_float<T>(value);
  };
  if (by_row) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = own_row * kBiasTile + 16 * warp + lane / 4 + e / 2 * 8;
        if (by_column)
          store(row, own_column * kBiasTile + 8 * j + lane % 4 * 2 + e % 2, total[j][e]);
        else if (j == 0 && e % 2 == 0 && lane % 4 == 0)
          store(row, 0, total[j][e]);
      }
    return;
  }
  // Over a warp's rows, then over warps.
#pragma unroll
  for (int j = 0; j < kFragments; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = total[j][c] + total[j][2 + c];
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2)
        sum += __shfl_xor_sync(kFullMask, sum, offset);
      if (lane < 4) column_sums[warp][8 * j + lane * 2 + c] = sum;
    }
  __syncthreads();
  const int thread = thread_number();
  if (thread < (by_column ? kBiasTile : 1)) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) sum += column_sums[w][thread];
    store(0, by_column ? own_column * kBiasTile + thread : 0, sum);
  }
}

}  // namespace fused_attn
