// What the forward and the backward kernel of attention share: a register-blocked matrix product,
// packing, and the logits of a tile. All arithmetic is on fp32 in memory that fits a cache; fp16
// and bf16 are converted where they are packed.
#pragma once

#include "attention/attention.h"
#include "common/scratch.h"
#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

// A microkernel holds kStrip x 2 vectors of sums in registers: of 32 with AVX-512, else of 16.
#if defined(FUSED_ATTN_ISA_AVX512)
constexpr int kStrip = 12;
#else
constexpr int kStrip = 6;
#endif
constexpr int kPanel = 2 * kVec;

// Strides of tiles in scratch memory are constants, so that the addresses of a microkernel's rows
// are constants too; 16 more than a power of two, so that rows do not compete for a cache set.
constexpr int kBlockKeys = 256;
constexpr int kScoreStride = kBlockKeys + 16;
constexpr int kRowStride = kMaxHeadSize + 16;

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

FUSED_ATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// --- matrix product ---------------------------------------------------------------------------

// c[kRows, kColumns vectors] = (accumulate ? c : 0) + a @ b over `depth`. Element (row, i) of `a`
// is a[row * kStrideA + i], or a[i * kStrideA + row] if transposed; row i of `b` is b + i * ldb.
template <int kRows, int kColumns, int kStrideA, bool kTransposed>
FUSED_ATTN_INLINE void microkernel(int64_t depth, const float* a, const float* b, int64_t ldb,
                                   float* c, int64_t ldc, bool accumulate) {
  Vec sums[kRows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j)
      sums[r][j] = accumulate ? load(c + r * ldc + j * kVec) : Vec{};
  for (int64_t i = 0; i < depth; ++i) {
    Vec row[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) row[j] = load(b + j * kVec);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = broadcast(a[kTransposed ? r : r * kStrideA]);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) sums[r][j] += factor * row[j];
    }
    a += kTransposed ? kStrideA : 1;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) store(c + r * ldc + j * kVec, sums[r][j]);
}

// One strip of at most kStrip rows; the arguments are those of `microkernel`.
template <int kColumns, int kStrideA, bool kTransposed, int kRows = kStrip>
static inline void strip_product(int64_t rows, int64_t depth, const float* a, const float* b,
                                 int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return strip_product<kColumns, kStrideA, kTransposed, kRows - 1>(rows, depth, a, b, ldb, c,
                                                                       ldc, accumulate);
  }
  microkernel<kRows, kColumns, kStrideA, kTransposed>(depth, a, b, ldb, c, ldc, accumulate);
}

// c[rows, width] of a tile (+)= a @ b, width a multiple of kVec. Strip `row` of the result sums
// over i in range(row, last row + 1), which returns a pair [begin, end).
template <int kStrideA, bool kTransposed, typename Range>
FUSED_ATTN_INLINE void product(int64_t rows, int64_t width, const float* a, const float* b,
                               int64_t ldb, float* c, int64_t ldc, bool accumulate, Range&& range) {
  int64_t j = 0;
  const auto columns = [&](auto count) {
    for (int64_t r = 0; r < rows; r += kStrip) {
      const int64_t strip = std::min<int64_t>(kStrip, rows - r);
      const auto [begin, end] = range(r, r + strip);
      strip_product<decltype(count)::value, kStrideA, kTransposed>(
          strip, end - begin, a + (kTransposed ? r + begin * kStrideA : r * kStrideA + begin),
          b + begin * ldb + j, ldb, c + r * ldc + j, ldc, accumulate);
    }
  };
  for (; j + kPanel <= width; j += kPanel) columns(std::integral_constant<int, 2>{});
  if (j < width) columns(std::integral_constant<int, 1>{});
}

struct Span {
  int64_t begin;
  int64_t end;
};

// --- packing ------------------------------------------------------------------------------------

template <int kHalf>
FUSED_ATTN_INLINE void transpose_step(Vec (&r)[kVec]) {
  VecI low, high;
  for (int lane = 0; lane < kVec; ++lane) {
    low[lane] = (lane & kHalf) ? kVec + lane - kHalf : lane;
    high[lane] = (lane & kHalf) ? kVec + lane : lane + kHalf;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kVec; ++i) {
    if (i & kHalf) continue;
    const Vec a = r[i];
    const Vec b = r[i + kHalf];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + kHalf] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kHalf > 1) transpose_step<kHalf / 2>(r);
}

FUSED_ATTN_INLINE void transpose(Vec (&r)[kVec]) { transpose_step<kVec / 2>(r); }

// Rows [0, count) of a matrix [count, width] as panels of kPanel columns of its transpose: element
// (row, i) goes to out[(row / kPanel * width + i) * kPanel + row % kPanel]. Rows that do not exist,
// or that `visible` says are to be ignored, are zero.
template <typename T>
static void pack_transposed(const T* rows, int64_t stride, int64_t count, int64_t width,
                            const uint8_t* visible, float* out) {
  for (int64_t row = 0; row < round_up(count, kPanel); row += kVec) {
    float* panel = out + row / kPanel * width * kPanel + row % kPanel;
    bool exists[kVec];
    for (int r = 0; r < kVec; ++r) exists[r] = row + r < count && (!visible || visible[row + r]);
    int64_t i = 0;
    for (; i + kVec <= width; i += kVec) {
      Vec block[kVec];
#pragma GCC unroll 16
      for (int r = 0; r < kVec; ++r)
        block[r] = exists[r] ? load(rows + (row + r) * stride + i) : Vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kVec; ++r) store(panel + (i + r) * kPanel, block[r]);
    }
    for (; i < width; ++i)
      for (int r = 0; r < kVec; ++r)
        panel[i * kPanel + r] = exists[r] ? to_float(rows[(row + r) * stride + i]) : 0.0f;
  }
}

// Rows [0, count) in fp32, times a factor, padded with zeros to a multiple of kVec columns. Rows
// for which `keep(row)` is false are zero.
template <typename T, typename Keep>
static inline void copy_rows(const T* rows, int64_t stride, int64_t count, int64_t width,
                             float factor, float* out, int64_t out_stride, Keep&& keep) {
  const int64_t full = width / kVec * kVec;
  for (int64_t r = 0; r < count; ++r) {
    const T* from = rows + r * stride;
    float* to = out + r * out_stride;
    if (!keep(r)) {
      for (int64_t i = 0; i < width; i += kVec) store(to + i, Vec{});
      continue;
    }
    for (int64_t i = 0; i < full; i += kVec) store(to + i, load(from + i) * factor);
    if (full < width) store(to + full, load_partial(from + full, width - full) * factor);
  }
}

template <typename T>
static inline void store_row(T* to, const float* from, int64_t width, float factor) {
  const int64_t full = width / kVec * kVec;
  for (int64_t i = 0; i < full; i += kVec) store(to + i, load(from + i) * factor);
  if (full < width) store_partial(to + full, load(from + full) * factor, width - full);
}

// A matrix in fp32 whose rows may be read in whole vectors.
struct FloatRows {
  const float* data;
  int64_t stride;
};

// Rows [0, count) as they are where that is possible, else converted into `buffer`.
template <typename T>
static inline FloatRows as_float_rows(const T* rows, int64_t stride, int64_t count, int64_t width,
                                      const uint8_t* visible, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (!visible && width % kVec == 0) return {rows, stride};
  }
  const int64_t padded = round_up(width, kVec);
  copy_rows(rows, stride, count, width, 1.0f, buffer, padded,
            [&](int64_t r) { return !visible || visible[r] != 0; });
  return {buffer, padded};
}

// --- one (batch, head)
// ----------------------------------------------------------------------------

template <typename T>
FUSED_ATTN_INLINE const T* head_of(const HeadRows& rows, int64_t b, int64_t h) {
  return static_cast<const T*>(rows.data) + b * rows.stride_b + h * rows.stride_h;
}

FUSED_ATTN_INLINE int64_t pair_offset(const PairTensor& pair, int64_t b, int64_t h, int64_t t,
                                      int64_t s) {
  return b * pair.stride_b + h * pair.stride_h + t * pair.stride_t + s * pair.stride_s;
}

// What bounds the rows and columns of one (batch, head).
struct Head {
  int64_t b;
  int64_t h;
  int64_t rows;            // queries before the length
  int64_t keys;            // keys before the length, and before the last that the mask shows
  const uint8_t* visible;  // [keys] for a mask that is the same for all queries and has holes
};

// `buffer` has room for one byte a key.
static inline Head head_bounds(const AttentionInputs& in, int64_t head, uint8_t* buffer) {
  Head r{head / in.heads, head % in.heads, in.queries, in.keys, nullptr};
  if (in.query_lengths) r.rows = in.query_lengths[r.b];
  if (in.key_lengths) r.keys = in.key_lengths[r.b];
  if (in.mask.data && (in.mask.stride_t == 0 || in.queries == 1)) {
    const uint8_t* mask =
        static_cast<const uint8_t*>(in.mask.data) + pair_offset(in.mask, r.b, r.h, 0, 0);
    while (r.keys > 0 && !mask[(r.keys - 1) * in.mask.stride_s]) --r.keys;
    bool holes = false;
    for (int64_t s = 0; s < r.keys; ++s) {
      buffer[s] = mask[s * in.mask.stride_s];
      holes |= buffer[s] == 0;
    }
    if (holes) r.visible = buffer;
  }
  return r;
}

// Keys that query `t` may look at, as far as lengths and causality say.
FUSED_ATTN_INLINE int64_t key_limit(const AttentionInputs& in, const Head& head, int64_t t) {
  return in.is_causal ? std::min(head.keys, t + 1) : head.keys;
}

// --- logits of a row --------------------------------------------------------------------------

typedef uint8_t VecB __attribute__((vector_size(kVec)));

template <typename T>
static inline void add_bias(float* row, const T* bias, int64_t stride, int64_t count) {
  int64_t s = 0;
  if (stride == 1) {
    for (; s + kVec <= count; s += kVec) store(row + s, load(row + s) + load(bias + s));
    for (; s < count; ++s) row[s] += to_float(bias[s]);
  } else {
    for (; s < count; ++s) row[s] += to_float(bias[s * stride]);
  }
}

static inline void hide(float* row, const uint8_t* mask, int64_t stride, int64_t count) {
  int64_t s = 0;
  if (stride == 1) {
    for (; s + kVec <= count; s += kVec) {
      VecB bytes;
      std::memcpy(&bytes, mask + s, sizeof(bytes));
      const VecI shown = __builtin_convertvector(bytes, VecI) != 0;
      store(row + s, select(shown, load(row + s), broadcast(-kInfinity)));
    }
  }
  for (; s < count; ++s)
    if (!mask[s * stride]) row[s] = -kInfinity;
}

// Adds the bias to, and applies the mask to, logits of query t and keys [begin, begin + count).
// Lanes after the last are -inf.
static inline void finish_logits(const AttentionInputs& in, const Head& head, int64_t t,
                                 int64_t begin, int64_t count, float* row) {
  if (in.bias.data) {
    const int64_t offset = pair_offset(in.bias, head.b, head.h, t, begin);
    switch (in.bias.dtype) {
      case DType::kFloat32:
        add_bias(row, static_cast<const float*>(in.bias.data) + offset, in.bias.stride_s, count);
        break;
      case DType::kFloat16:
        add_bias(row, static_cast<const Half*>(in.bias.data) + offset, in.bias.stride_s, count);
        break;
      case DType::kBFloat16:
        add_bias(row, static_cast<const BFloat16*>(in.bias.data) + offset, in.bias.stride_s, count);
        break;
    }
  }
  if (in.mask.data)
    hide(row,
         static_cast<const uint8_t*>(in.mask.data) + pair_offset(in.mask, head.b, head.h, t, begin),
         in.mask.stride_s, count);
  for (int64_t s = count; s < round_up(count, kVec); ++s) row[s] = -kInfinity;
}

// 2^y for y <= 127, to about 1 unit in the last place: 0 below -126.5, NaN for NaN.
FUSED_ATTN_INLINE Vec exp2_flushed(Vec y) {
  // The constant is the first operand of max, so that NaN passes.
  y = max(broadcast(-127.0f), y);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 more makes it the
  // biased exponent.
  const Vec magic = broadcast(12582912.0f + 127.0f);
  const Vec shifted = y + magic;
  const Vec f = y - (shifted - magic);
  // Minimax for the relative error on [-0.5, 0.5]: 1.6e-8.
  Vec p = broadcast(1.535336191e-4f);
  p = p * f + 1.339887441e-3f;
  p = p * f + 9.618437358e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.0f;
  return p * as_vec(reinterpret_cast<VecI>(reinterpret_cast<VecU>(shifted) << 23));
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
