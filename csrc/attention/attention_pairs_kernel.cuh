// Which pairs of a query and a key take part, and what logits and weights they have.
//
// Kernels come in two kinds. The plain one knows lengths, packed batches, causality, windows and
// grouped heads, which cost something in tiles that they cut alone. The general one asks at each
// fragment of four pairs what else there is: masks, bias, ALiBi, soft-cap, dropout, activations.
#pragma once

#include "attention/attention_cuda.h"
#include "attention/attention_tile_kernel.cuh"

namespace fused_attn {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000u); }

__device__ __forceinline__ int64_t integer_at(const AttentionIntegers& integers, int i) {
  return integers.is_wide ? static_cast<const int64_t*>(integers.data)[i]
                          : static_cast<const int32_t*>(integers.data)[i];
}

// --- blocks and sequences -----------------------------------------------------------------------

struct BlockPosition {
  int tile;
  int head;  // of the batch: b * heads + h
};

// Within a group a tile of all heads comes before the next tile: with the longest ones first, the
// last blocks of the grid are short.
__device__ __forceinline__ BlockPosition block_position(const AttentionGrid& grid) {
  const int block = static_cast<int>(blockIdx.x);
  const int group = block / (grid.group * grid.tiles);
  const int first = group * grid.group;
  const int width = min(grid.heads - first, grid.group);
  const int rest = block - first * grid.tiles;
  const int tile = rest / width;
  return {grid.reversed ? grid.tiles - 1 - tile : tile, first + rest % width};
}

// The rows of one batch element, whatever lengths and offsets say within the tensors.
struct AttentionSequence {
  int query_begin;
  int key_begin;
  int queries;
  int keys;
  int diagonal;  // query t stands beside key t + diagonal
};

__device__ __forceinline__ int clamped(int64_t n, int most) {
  return static_cast<int>(n < 0 ? 0 : n > most ? most : n);
}

__device__ __forceinline__ AttentionSequence sequence_of(const AttentionCall& call, int b) {
  AttentionSequence s{0, 0, call.queries, call.keys, 0};
  if (call.is_packed) {
    s.query_begin = clamped(integer_at(call.query_offsets, b), call.query_rows);
    s.key_begin = clamped(integer_at(call.key_offsets, b), call.key_rows);
    const int query_end = clamped(integer_at(call.query_offsets, b + 1), call.query_rows);
    const int key_end = clamped(integer_at(call.key_offsets, b + 1), call.key_rows);
    s.queries = clamped(query_end - s.query_begin, call.queries);
    s.keys = clamped(key_end - s.key_begin, call.keys);
  } else {
    if (call.query_lengths.data)
      s.queries = clamped(integer_at(call.query_lengths, b), call.queries);
    if (call.key_lengths.data) s.keys = clamped(integer_at(call.key_lengths, b), call.keys);
  }
  if (call.align_lower_right) s.diagonal = s.keys - s.queries;
  return s;
}

// Tiles [first, last); those of [full_first, full_last) are cut by no bound.
struct TileRange {
  int first;
  int last;
  int full_first;
  int full_last;

  __device__ __forceinline__ bool cuts(int tile) const {
    return tile < full_first || tile >= full_last;
  }
};

// What a block knows about its rows. It lies in shared memory, since most of it is wanted where the
// loop begins and ends, or in few turns, and would take the registers of accumulators.
struct BlockRows {
  int b;
  int h;
  int first;  // row of the tile
  int begin;  // row of the sequence
  int stop;   // of the rows that are written
  int queries;
  int keys;
  int diagonal;
  TileRange range;
};

// The first row of a sequence of a head.
template <typename T>
__device__ __forceinline__ const T* head_rows(const AttentionRows& rows, int b, int h, int begin) {
  return static_cast<const T*>(rows.data) + b * rows.stride_b + h * rows.stride_h +
         begin * rows.stride_row;
}
template <typename T>
__device__ __forceinline__ T* head_rows(const AttentionResult& rows, int b, int h, int begin) {
  return static_cast<T*>(rows.data) + b * rows.stride_b + h * rows.stride_h +
         begin * rows.stride_row;
}

// Where the numbers of a sequence's rows begin in [B, H, T], or [1, H, N] packed.
__device__ __forceinline__ int64_t row_index(const AttentionCall& call, int b, int h, int begin) {
  const int64_t head = call.is_packed ? h : static_cast<int64_t>(b) * call.heads + h;
  return head * call.query_rows + begin;
}

// The statistics of a head's rows.
__device__ __forceinline__ int64_t statistics_index(const AttentionCall& call, int b, int h) {
  const int padded = (call.queries + kStatisticsTile - 1) / kStatisticsTile * kStatisticsTile;
  return (static_cast<int64_t>(b) * call.heads + h) * padded;
}

// --- tiles of pairs -----------------------------------------------------------------------------

template <int kSize>
__device__ __forceinline__ TileRange tile_range(int begin, int end, int full_begin, int full_end) {
  if (end <= begin) return {0, 0, 0, 0};
  return {begin / kSize, (end + kSize - 1) / kSize, (full_begin + kSize - 1) / kSize,
          full_end / kSize};
}

// The key tiles of queries [m0, m0 + kQueries).
template <int kQueries, int kKeys>
__device__ __forceinline__ TileRange key_range(const AttentionCall& call,
                                               const AttentionSequence& s, int m0) {
  const int m1 = min(m0 + kQueries, s.queries);
  if (m0 >= m1) return {0, 0, 0, 0};
  return tile_range<kKeys>(max(m0 + s.diagonal - call.left, 0),
                           min(m1 + s.diagonal + call.right, s.keys),
                           max(m1 - 1 + s.diagonal - call.left, 0),
                           max(min(m0 + 1 + s.diagonal + call.right, s.keys), 0));
}

// The query tiles of keys [n0, n0 + kKeys). Queries behind the length are read as zeros, and have
// weights of 0: they do not cut a tile.
template <int kQueries, int kKeys>
__device__ __forceinline__ TileRange query_range(const AttentionCall& call,
                                                 const AttentionSequence& s, int n0) {
  const int n1 = min(n0 + kKeys, s.keys);
  if (n0 >= n1) return {0, 0, 0, 0};
  return tile_range<kQueries>(max(n0 - s.diagonal - call.right, 0),
                              min(n1 - s.diagonal + call.left, s.queries),
                              max(n1 - 1 - s.diagonal - call.right, 0),
                              max(min(n0 + 1 - s.diagonal + call.left, s.queries + kQueries), 0));
}

// A row, or a column, of tiles of a boolean mask and of a block mask.
struct TileKinds {
  const uint8_t* classes;
  const int32_t* blocks;
  int class_step;
  int block_step;

  __device__ __forceinline__ int class_at(int first) const {
    return classes ? classes[static_cast<int64_t>(first / kMaskClassTile) * class_step] : 1;
  }
  __device__ __forceinline__ int block_at(int first) const {
    return blocks ? blocks[static_cast<int64_t>(first / kBlockMaskTile) * block_step] : 1;
  }

  // The first tile from `tile` on, of kSize rows, that shows something; a warp looks at 32 at once.
  template <int kSize>
  __device__ __forceinline__ int next(int tile, int last) const {
    if (!classes && !blocks) return tile;
    const int lane = thread_number() % kWarp;
    for (; tile < last; tile += kWarp) {
      const int mine = tile + lane;
      const bool shows = mine < last && class_at(mine * kSize) != 0 && block_at(mine * kSize) != 0;
      const unsigned shown = __ballot_sync(kFullMask, shows);
      if (shown != 0) return tile + __ffs(static_cast<int>(shown)) - 1;
    }
    return last;
  }
};

// Of the key tiles of queries from m0, or (by_key) of the query tiles of keys from `first`.
__device__ __forceinline__ TileKinds tile_kinds(const AttentionCall& call, int b, int h, int first,
                                                bool by_key) {
  TileKinds kinds{nullptr, nullptr, 0, 0};
  const AttentionMaskClasses& c = call.mask_classes;
  if (c.data) {
    const int fixed = by_key ? c.stride_s : c.stride_t;
    kinds.classes = c.data + b * c.stride_b + h * c.stride_h +
                    static_cast<int64_t>(first / kMaskClassTile) * fixed;
    kinds.class_step = by_key ? c.stride_t : c.stride_s;
  }
  const AttentionBlocks& blocks = call.blocks;
  if (blocks.tiles) {
    kinds.blocks = blocks.tiles + b * blocks.stride_b + h * blocks.stride_h +
                   static_cast<int64_t>(first / kBlockMaskTile) * (by_key ? 1 : blocks.key_tiles);
    kinds.block_step = by_key ? blocks.key_tiles : 1;
  }
  return kinds;
}

// --- pairs --------------------------------------------------------------------------------------

// Four pairs of a fragment: of element e, query t and key s. In a transposed one rows are keys.
template <bool kTransposed>
struct FourPairs {
  int t0;
  int s0;
  __device__ __forceinline__ int t(int e) const { return t0 + (kTransposed ? e % 2 : e / 2 * 8); }
  __device__ __forceinline__ int s(int e) const { return s0 + (kTransposed ? e / 2 * 8 : e % 2); }
};

// What a head's pairs are asked for.
struct HeadPairs {
  const uint8_t* mask;
  const void* bias;
  float slope;
  uint64_t seed;
  int64_t first_row;  // of the head, for dropout
  int diagonal;
  int keys;
};

template <typename T>
__device__ __forceinline__ HeadPairs head_pairs(const AttentionCall& call,
                                                const AttentionSequence& s, int b, int h) {
  HeadPairs pairs{};
  pairs.diagonal = s.diagonal;
  pairs.keys = s.keys;
  if (call.mask.data) {
    pairs.mask = static_cast<const uint8_t*>(call.mask.data) + b * call.mask.stride_b +
                 h * call.mask.stride_h;
  }
  if (call.bias.data) {
    const int64_t offset = b * call.bias.stride_b + h * call.bias.stride_h;
    pairs.bias = static_cast<const char*>(call.bias.data) +
                 offset * static_cast<int64_t>(call.bias_is_fp32 ? sizeof(float) : sizeof(T));
  }
  if (call.slopes) pairs.slope = call.slopes[b * call.slopes_stride_b + h];
  if (call.seed) {
    pairs.seed = static_cast<uint64_t>(*call.seed);
    pairs.first_row = (static_cast<int64_t>(b) * call.heads + h) * call.queries;
  }
  return pairs;
}

// Keys that a mask hides from all queries are read as zeros: 0 * NaN would be NaN.
struct KeysShown {
  const uint8_t* mask;  // null: all
  int64_t stride_s;
  __device__ __forceinline__ bool operator()(int s) const {
    return mask == nullptr || mask[s * stride_s] != 0;
  }
};

__device__ __forceinline__ KeysShown keys_shown(const AttentionCall& call, int b, int h) {
  if (call.mask.data == nullptr || call.mask.stride_t != 0) return {nullptr, 0};
  return {
      static_cast<const uint8_t*>(call.mask.data) + b * call.mask.stride_b + h * call.mask.stride_h,
      call.mask.stride_s};
}

// Puts -inf where a bound hides a pair of a tile of logits: rows from t0, columns from s0.
template <int kRowTiles, int kFragments>
__device__ __forceinline__ void hide_cut_pairs(const AttentionCall& call, const BlockRows& rows,
                                               int t0, int s0, int lane,
                                               float (&x)[kRowTiles][kFragments][4]) {
  // Bounds of the lane's first row, from its first column. They depend on the tile, so that no
  // bounds of rows are kept in registers between tiles.
  const int over = t0 + lane / 4 + rows.diagonal - (s0 + lane % 4 * 2);
  const int keys = rows.keys - (s0 + lane % 4 * 2);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int begin = over + (16 * i + 8 * r) - call.left;
      const int end = min(over + (16 * i + 8 * r + 1) + call.right, keys);
#pragma unroll
      for (int j = 0; j < kFragments; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (8 * j + c < begin || 8 * j + c >= end) x[i][j][2 * r + c] = -infinity();
    }
}

// Which of four pairs take part, as bits. `cut`: a bound may hide some. `mixed`: the mask may.
// `bits`: of a block mask's tile, or null.
template <bool kTransposed>
__device__ __forceinline__ unsigned shown_pairs(const AttentionCall& call, const HeadPairs& pairs,
                                                FourPairs<kTransposed> at, bool cut, bool mixed,
                                                const uint32_t* bits) {
  unsigned shown = 0xF;
  if (cut) {
    const int over = at.s0 - at.t0 - pairs.diagonal;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int distance = over + (at.s(e) - at.s0) - (at.t(e) - at.t0);
      if (at.s(e) >= pairs.keys || distance > call.right || distance < -call.left)
        shown &= ~(1u << e);
    }
  }
  if (mixed) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int t = at.t(e), s = at.s(e);
      if (t >= call.queries || s >= call.keys ||
          pairs.mask[t * call.mask.stride_t + s * call.mask.stride_s] == 0)
        shown &= ~(1u << e);
    }
  }
  if (bits) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int t = at.t(e) % kBlockMaskTile, s = at.s(e) % kBlockMaskTile;
      if ((bits[t * (kBlockMaskTile / 32) + s / 32] >> (s % 32) & 1) == 0) shown &= ~(1u << e);
    }
  }
  return shown;
}

__device__ __forceinline__ const uint32_t* block_bits(const AttentionCall& call, int kind) {
  if (kind < 2) return nullptr;
  constexpr int kWords = kBlockMaskTile * (kBlockMaskTile / 32);
  return call.blocks.bits + static_cast<int64_t>(kind - 2) * kWords;
}

// Hyperbolic tangent and its derivative, to a few units in the last place, near 0 and 1 too. The
// polynomial is that of Cephes (Moshier).
__device__ __forceinline__ void tanh_and_derivative(float x, float& result, float& derivative) {
  const float z = x * x;
  float p = -5.70498872745e-3f * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  // e^-2|x|, in whose terms neither cancels near 1.
  const float e = ptx::exp2_approx(fabsf(x) * (-2.0f * kLog2E));
  const float over = 1.0f / (1.0f + e);
  derivative = 4.0f * e * over * over;
  result = z < 0.390625f ? p * z * x + x : copysignf(1.0f - 2.0f * e * over, x);
}

// From q · k: the logits of four pairs, and the derivatives of the soft-cap.
template <typename T, bool kTransposed>
__device__ __forceinline__ void logits(const AttentionCall& call, const HeadPairs& pairs,
                                       FourPairs<kTransposed> at, float (&x)[4],
                                       float (&derivative)[4]) {
  const float unit = call.logit_unit;
  if (call.softcap > 0.0f) {
    const float inner = call.scale / call.softcap;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float bounded;
      tanh_and_derivative(x[e] * inner, bounded, derivative[e]);
      x[e] = bounded * (call.softcap * unit);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      x[e] *= call.scale * unit;
      derivative[e] = 1.0f;
    }
  }
  if (pairs.bias) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int t = at.t(e), s = at.s(e);
      if (t < call.queries && s < call.keys) {
        const int64_t i = t * call.bias.stride_t + s * call.bias.stride_s;
        x[e] += unit * (call.bias_is_fp32 ? static_cast<const float*>(pairs.bias)[i]
                                          : to_float(static_cast<const T*>(pairs.bias)[i]));
      }
    }
  }
  if (call.slopes) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      x[e] -= static_cast<float>(abs(at.t(e) + pairs.diagonal - at.s(e))) * (pairs.slope * unit);
  }
}

// Weights of the activations that are not softmax; 0 of a logit of -inf.
__device__ __forceinline__ float activated(const AttentionCall& call, float x) {
  if (call.activation == AttentionActivation::kSigmoid)
    return 1.0f / (1.0f + ptx::exp2_approx(-x * call.exponent_unit));
  // Not a maximum, which would lose a NaN.
  return x < 0.0f ? 0.0f : x;
}

// The words of the four keys that have a counter, as bits of those that dropout keeps.
__device__ __forceinline__ unsigned kept_keys(const AttentionCall& call, const HeadPairs& pairs,
                                              int t, int s) {
  const int64_t counters = (call.keys + 3) / 4;
  const uint4 words = philox(pairs.seed, static_cast<uint64_t>((pairs.first_row + t) * counters +
                                                               static_cast<int64_t>(s / 4)));
  const uint32_t threshold = call.keep_threshold;
  return (words.x >= threshold ? 1u : 0u) | (words.y >= threshold ? 2u : 0u) |
         (words.z >= threshold ? 4u : 0u) | (words.w >= threshold ? 8u : 0u);
}

// Which of four pairs dropout keeps, as bits: the mask of fused_attn/ops/_philox.py. The lanes
// that share counters compute one each, and exchange what they say.
template <bool kTransposed>
__device__ __forceinline__ unsigned kept_pairs(const AttentionCall& call, const HeadPairs& pairs,
                                               FourPairs<kTransposed> at) {
  const int lane = thread_number() % kWarp;
  unsigned kept = 0;
  if constexpr (kTransposed) {
    // Four lanes have four keys of a counter, of two queries and two rows of keys.
    const int mine = lane / 4 % 4;
    const unsigned keys = kept_keys(call, pairs, at.t(mine), at.s(mine));
#pragma unroll
    for (int e = 0; e < 4; ++e)
      kept |= (__shfl_sync(kFullMask, keys, (lane & ~12) | e << 2) >> mine & 1u) << e;
  } else {
    // Two lanes have the keys of a counter, of two queries.
    const int odd = lane % 2;
    const unsigned mine = kept_keys(call, pairs, at.t(2 * odd), at.s0);
    const unsigned other = __shfl_xor_sync(kFullMask, mine, 1);
    const unsigned upper = odd ? other : mine;
    const unsigned lower = odd ? mine : other;
    kept = (upper >> (2 * odd) & 3u) | (lower >> (2 * odd) & 3u) << 2;
  }
  return kept;
}

}  // namespace fused_attn
