// What the forward and the backward kernel of attention share: a register-blocked matrix product,
// packing, what of a head takes part, and the logits of a tile. All arithmetic is on fp32 in memory
// that fits a cache; fp16 and bf16 are converted where they are packed.
#pragma once

#include "attention/attention.h"
#include "common/philox.h"
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

// Side of the squares in which a mask is looked through for what can be skipped.
constexpr int64_t kMaskStep = 64;
static_assert(kChunkAlignment % kMaskStep == 0 && kMaskTile % kMaskStep == 0);

// Up to so many queries a head, keys are read where they lie: transposing them would cost more.
constexpr int64_t kFewQueries = 8;

constexpr float kLog2E = 1.44269504088896341f;

FUSED_ATTN_INLINE int64_t round_down(int64_t n, int64_t multiple) {
  return n / multiple * multiple;
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

// The loops over strips are functions of their own: inlined among other variables, a strip's sums
// would not all stay in registers.

// All strips of some columns; strip i sums over spans[i].
template <int kColumns, int kStrideA, bool kTransposed>
__attribute__((noinline)) static void column_product(int64_t rows, const float* a, const float* b,
                                                     int64_t ldb, float* c, int64_t ldc,
                                                     bool accumulate, const Span* spans) {
  for (int64_t r = 0; r < rows; r += kStrip, ++spans) {
    const auto [begin, end] = *spans;
    strip_product<kColumns, kStrideA, kTransposed>(
        std::min<int64_t>(kStrip, rows - r), end - begin,
        a + (kTransposed ? r + begin * kStrideA : r * kStrideA + begin), b + begin * ldb, ldb,
        c + r * ldc, ldc, accumulate);
  }
}

// c[rows, width] of a tile (+)= a @ b, width a multiple of kVec. Strip i of the result sums over
// spans[i].
template <int kStrideA, bool kTransposed>
static inline void product(int64_t rows, int64_t width, const float* a, const float* b, int64_t ldb,
                           float* c, int64_t ldc, bool accumulate, const Span* spans) {
  int64_t j = 0;
  for (; j + kPanel <= width; j += kPanel)
    column_product<2, kStrideA, kTransposed>(rows, a, b + j, ldb, c + j, ldc, accumulate, spans);
  if (j < width)
    column_product<1, kStrideA, kTransposed>(rows, a, b + j, ldb, c + j, ldc, accumulate, spans);
}

// c[rows, width] of a tile = a @ panels, for the columns that each strip of rows needs.
__attribute__((noinline)) static void panel_product(int64_t rows, int64_t width, int64_t depth,
                                                    const float* a, const float* panels,
                                                    const Span* strips, float* c) {
  for (int64_t j = 0; j < width; j += kPanel)
    for (int64_t r = 0; r < rows; r += kStrip) {
      const Span& span = strips[r / kStrip];
      if (span.end <= j || span.begin >= j + kPanel) continue;
      strip_product<2, kRowStride, false>(std::min<int64_t>(kStrip, rows - r), depth,
                                          a + r * kRowStride, panels + j * depth, kPanel,
                                          c + r * kScoreStride + j, kScoreStride, false);
    }
}

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

// out[r * kScoreStride] and what follows = a[r] . the kVec rows that `row_of` gives.
template <typename RowOf>
FUSED_ATTN_INLINE void dot_group(int64_t rows, const float* a, int64_t width, RowOf&& row_of,
                                 float* out) {
  const int64_t full = width / kVec * kVec;
  for (int64_t r = 0; r < rows; ++r) {
    const float* factor = a + r * kRowStride;
    Vec sums[kVec];
#pragma GCC unroll 4
    for (int k = 0; k < kVec; k += 4) {
      Vec part[4] = {};
      for (int64_t i = 0; i < full; i += kVec) {
        const Vec f = load(factor + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) part[j] += f * load(row_of(k + j) + i);
      }
      if (full < width) {
        const Vec f = load(factor + full);
        for (int j = 0; j < 4; ++j) part[j] += f * load_partial(row_of(k + j) + full, width - full);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[k + j] = part[j];
    }
    store(out + r * kScoreStride, reduce_add_each(sums));
  }
}

// c[r, s] = a[r] . b[s] for few rows of `a` and the keys in `span`, which `visible` may zero.
template <typename T>
static void dot_product(int64_t rows, const float* a, const T* b, int64_t ldb, int64_t width,
                        Span span, const uint8_t* visible, float* c) {
  for (int64_t s = round_down(span.begin, kVec); s < span.end; s += kVec) {
    float* out = c + s;
    if (s >= span.begin && s + kVec <= span.end) {
      dot_group(rows, a, width, [&](int64_t k) { return b + (s + k) * ldb; }, out);
      if (!visible) continue;
    } else {
      // Lanes that are no key's repeat one.
      dot_group(
          rows, a, width,
          [&](int64_t k) { return b + std::clamp(s + k, span.begin, span.end - 1) * ldb; }, out);
    }
    for (int64_t k = 0; k < kVec; ++k)
      if (s + k < span.begin || s + k >= span.end || (visible && !visible[s + k]))
        for (int64_t r = 0; r < rows; ++r) out[r * kScoreStride + k] = 0.0f;
  }
}

// c[columns] (+)= the sum of weights[i] times row i of `b`. Several sums a column, since each
// addition waits for the one before it.
template <int kColumns, typename T>
FUSED_ATTN_INLINE void weigh_columns(int64_t depth, const float* weights, const T* b, int64_t ldb,
                                     float* c, bool accumulate) {
  constexpr int kSums = 8 / kColumns;
  Vec sums[kSums][kColumns] = {};
  int64_t i = 0;
  for (; i + kSums <= depth; i += kSums)
#pragma GCC unroll 8
    for (int k = 0; k < kSums; ++k)
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j)
        sums[k][j] += weights[i + k] * load(b + (i + k) * ldb + j * kVec);
  for (; i < depth; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) sums[0][j] += weights[i] * load(b + i * ldb + j * kVec);
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
    Vec total = sums[0][j];
#pragma GCC unroll 8
    for (int k = 1; k < kSums; ++k) total += sums[k][j];
    if (accumulate) total += load(c + j * kVec);
    store(c + j * kVec, total);
  }
}

// c[width] (+)= weights[depth] @ b, width a multiple of kVec: a product for a single row.
template <typename T>
__attribute__((noinline)) static void weigh_rows(int64_t depth, int64_t width, const float* weights,
                                                 const T* b, int64_t ldb, float* c,
                                                 bool accumulate) {
  int64_t j = 0;
  for (; j + 8 * kVec <= width; j += 8 * kVec)
    weigh_columns<8>(depth, weights, b + j, ldb, c + j, accumulate);
  for (; j + 4 * kVec <= width; j += 4 * kVec)
    weigh_columns<4>(depth, weights, b + j, ldb, c + j, accumulate);
  for (; j < width; j += kVec) weigh_columns<1>(depth, weights, b + j, ldb, c + j, accumulate);
}

// Rows [0, count) of a matrix [count, width] as panels of kPanel columns of its transpose: element
// (row, i) goes to out[(row / kPanel * width + i) * kPanel + row % kPanel]. Rows before `first` or
// after the last, and those that `visible` says are to be ignored, are zero.
template <typename T>
static void pack_transposed(const T* rows, int64_t stride, int64_t first, int64_t count,
                            int64_t width, const uint8_t* visible, float* out) {
  for (int64_t row = 0; row < round_up(count, kPanel); row += kVec) {
    float* panel = out + row / kPanel * width * kPanel + row % kPanel;
    bool exists[kVec];
    for (int r = 0; r < kVec; ++r)
      exists[r] = row + r >= first && row + r < count && (!visible || visible[row + r]);
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

// --- one (batch, head) ------------------------------------------------------------------------

FUSED_ATTN_INLINE int64_t pair_offset(const PairTensor& pair, int64_t b, int64_t h, int64_t t,
                                      int64_t s) {
  return b * pair.stride_b + h * pair.stride_h + t * pair.stride_t + s * pair.stride_s;
}

// What one task does for one (batch, head).
struct Head {
  int64_t b;
  int64_t h;
  int64_t key_head;
  int64_t query_begin;  // of the rows of packed tensors
  int64_t key_begin;
  int64_t diagonal;
  int64_t keys;            // before the length, and before the last that a mask shows
  Span rows;               // the queries
  Span range;              // the keys that some of them may look at
  const uint8_t* visible;  // [keys], if a mask hides some of these from all of the queries
  const uint8_t* mask;     // null if no pair need be looked up
  int64_t mask_stride_t;
  int64_t mask_stride_s;
  const int32_t* tiles;  // of the block mask, [query_tiles, key_tiles]
  float slope;           // of ALiBi
};

template <typename T>
FUSED_ATTN_INLINE const T* queries_of(const HeadRows& rows, const Head& head, int64_t t) {
  return static_cast<const T*>(rows.data) + head.b * rows.stride_b + head.h * rows.stride_h +
         (head.query_begin + t) * rows.stride_row;
}

template <typename T>
FUSED_ATTN_INLINE T* queries_of(const OutputRows& rows, const Head& head, int64_t t) {
  return static_cast<T*>(rows.data) + head.b * rows.stride_b + head.h * rows.stride_h +
         (head.query_begin + t) * rows.stride_row;
}

template <typename T>
FUSED_ATTN_INLINE const T* keys_of(const HeadRows& rows, const Head& head, int64_t s) {
  return static_cast<const T*>(rows.data) + head.b * rows.stride_b + head.key_head * rows.stride_h +
         (head.key_begin + s) * rows.stride_row;
}

FUSED_ATTN_INLINE int64_t lse_offset(const AttentionInputs& in, const Head& head, int64_t t) {
  return head.b * in.lse_stride_b + head.h * in.lse_stride_h + head.query_begin + t;
}

FUSED_ATTN_INLINE float slope_of(const AttentionInputs& in, int64_t b, int64_t h) {
  return in.alibi_slopes ? in.alibi_slopes[b * in.alibi_stride_b + h * in.alibi_stride_h] : 0.0f;
}

// Keys that query t may look at, as far as lengths and the window say.
FUSED_ATTN_INLINE Span span_of(const AttentionInputs& in, const Head& head, int64_t t) {
  return window_of(in, head.diagonal, head.keys, t);
}

// Keys that some of the queries [begin, end) may look at.
FUSED_ATTN_INLINE Span span_of(const AttentionInputs& in, const Head& head, int64_t begin,
                               int64_t end) {
  const int64_t first = span_of(in, head, begin).begin;
  return {first, std::max(first, span_of(in, head, end - 1).end)};
}

FUSED_ATTN_INLINE Span relative(Span span, int64_t begin, int64_t width) {
  const int64_t first = std::clamp<int64_t>(span.begin - begin, 0, width);
  return {first, std::clamp<int64_t>(span.end - begin, first, width)};
}

typedef uint64_t MaskBytes __attribute__((vector_size(kMaskStep)));

FUSED_ATTN_INLINE bool any_set(MaskBytes bytes) {
  uint64_t all = 0;
  for (int i = 0; i < kMaskStep / 8; ++i) all |= bytes[i];
  return all != 0;
}

// Whether all of the first n bytes are set, each of which is 0 or not; others are ignored.
FUSED_ATTN_INLINE bool all_set(MaskBytes bytes, int64_t n) {
  uint8_t flat[kMaskStep];
  std::memcpy(flat, &bytes, sizeof(flat));
  return std::memchr(flat, 0, static_cast<size_t>(n)) == nullptr;
}

FUSED_ATTN_INLINE MaskBytes load_mask(const uint8_t* p, int64_t n) {
  MaskBytes bytes{};
  if (n == kMaskStep)
    std::memcpy(&bytes, p, sizeof(bytes));
  else
    std::memcpy(&bytes, p, static_cast<size_t>(n));
  return bytes;
}

// shown[s] for s in [0, keys): whether the mask shows key s to some of the rows.
static void find_shown_keys(const uint8_t* mask, int64_t stride_t, int64_t stride_s, int64_t rows,
                            int64_t keys, uint8_t* shown) {
  if (stride_t == 0) rows = 1;
  if (stride_s == 0) {
    bool any = false;
    for (int64_t t = 0; t < rows; ++t) any |= mask[t * stride_t] != 0;
    std::memset(shown, any, static_cast<size_t>(keys));
  } else if (stride_s == 1) {
    for (int64_t s = 0; s < keys; s += kMaskStep) {
      const int64_t n = std::min<int64_t>(kMaskStep, keys - s);
      MaskBytes any{};
      for (int64_t t = 0; t < rows; ++t) {
        any |= load_mask(mask + t * stride_t + s, n);
        if (t % 16 == 15 && all_set(any, n)) break;
      }
      std::memcpy(shown + s, &any, static_cast<size_t>(n));
    }
  } else {
    for (int64_t s = 0; s < keys; ++s) {
      shown[s] = 0;
      for (int64_t t = 0; t < rows && !shown[s]; ++t)
        shown[s] = mask[t * stride_t + s * stride_s] != 0;
    }
  }
}

// The same of a block mask, for rows and keys of the whole: clears what it hides from all rows.
static void clear_hidden_keys(const BlockMask& mask, const int32_t* tiles, Span rows, Span keys,
                              uint8_t* shown) {
  for (int64_t s = keys.begin; s < keys.end;) {
    const int64_t end = std::min(keys.end, round_down(s, kMaskTile) + kMaskTile);
    uint32_t any[4] = {};
    for (int64_t t = rows.begin; t < rows.end;) {
      const int64_t row_end = std::min(rows.end, round_down(t, kMaskTile) + kMaskTile);
      const int32_t tile = tiles[t / kMaskTile * mask.key_tiles + s / kMaskTile];
      if (tile == 1)
        for (uint32_t& word : any) word = ~0u;
      else if (tile > 1)
        for (int64_t r = t % kMaskTile; r < t % kMaskTile + row_end - t; ++r)
          for (int w = 0; w < 4; ++w) any[w] |= mask.bits[((tile - 2) * kMaskTile + r) * 4 + w];
      if ((any[0] & any[1] & any[2] & any[3]) == ~0u) break;
      t = row_end;
    }
    if ((any[0] & any[1] & any[2] & any[3]) != ~0u)
      for (int64_t i = s; i < end; ++i)
        if (!(any[i % kMaskTile / 32] >> (i % 32) & 1u)) shown[i] = 0;
    s = end;
  }
}

// The queries and keys of a task, and of the latter those that no mask hides from all of the
// former. `buffer` has room for one byte a key.
static Head head_bounds(const AttentionInputs& in, const AttentionTasks& tasks, int64_t index,
                        int64_t row_chunk, uint8_t* buffer) {
  Head head{};
  head.b = index / in.heads;
  head.h = index % in.heads;
  head.key_head = head.h / in.heads_per_key_head;
  const Sequence& sequence = in.sequences[head.b];
  head.query_begin = sequence.query_begin;
  head.key_begin = sequence.key_begin;
  head.diagonal = diagonal_of(in, sequence);
  head.keys = sequence.keys;
  head.rows = rows_of_chunk(in, tasks, sequence, row_chunk);
  head.range = keys_of_rows(in, sequence, head.rows);
  head.slope = slope_of(in, head.b, head.h);
  if (in.mask.data) {
    head.mask =
        static_cast<const uint8_t*>(in.mask.data) + pair_offset(in.mask, head.b, head.h, 0, 0);
    head.mask_stride_t = in.mask.stride_t;
    head.mask_stride_s = in.mask.stride_s;
  }
  if (in.block_mask.tiles)
    head.tiles =
        in.block_mask.tiles + head.b * in.block_mask.stride_b + head.h * in.block_mask.stride_h;
  const Span range = head.range;
  if ((!head.mask && !head.tiles) || range.begin == range.end) return head;

  const int64_t rows = head.rows.end - head.rows.begin;
  const int64_t keys = range.end - range.begin;
  if (head.mask)
    find_shown_keys(
        head.mask + head.rows.begin * head.mask_stride_t + range.begin * head.mask_stride_s,
        head.mask_stride_t, head.mask_stride_s, rows, keys, buffer + range.begin);
  else
    std::memset(buffer + range.begin, 1, static_cast<size_t>(keys));
  if (head.tiles) clear_hidden_keys(in.block_mask, head.tiles, head.rows, range, buffer);
  int64_t end = range.end;
  while (end > range.begin && !buffer[end - 1]) --end;
  head.keys = head.range.end = end;
  if (std::memchr(buffer + range.begin, 0, static_cast<size_t>(end - range.begin)))
    head.visible = buffer;
  if (head.mask && (rows == 1 || head.mask_stride_t == 0)) {
    head.mask = head.visible;
    head.mask_stride_t = 0;
    head.mask_stride_s = 1;
  }
  return head;
}

// Some neighbouring keys, of which some may take part.
struct KeyTile {
  int64_t begin;
  int64_t end;
  bool masked;           // the mask hides some pairs
  const uint32_t* bits;  // of the block mask, if it hides some: four words a row of its tile
};

enum class Shown { kNone, kSome, kAll };

// What the mask shows of the queries [begin, begin + rows) and at most kMaskStep keys.
static Shown classify(const Head& head, int64_t begin, int64_t rows, int64_t s, int64_t keys) {
  const uint8_t* mask = head.mask + begin * head.mask_stride_t + s * head.mask_stride_s;
  if (head.mask_stride_t == 0) rows = 1;
  if (head.mask_stride_s == 0) {
    for (int64_t t = 0; t < rows; ++t)
      if (mask[t * head.mask_stride_t]) return Shown::kSome;
    return Shown::kNone;
  }
  if (head.mask_stride_s != 1) return Shown::kSome;
  MaskBytes any{};
  MaskBytes all = ~any;
  for (int64_t t = 0; t < rows; ++t) {
    const MaskBytes bytes = load_mask(mask + t * head.mask_stride_t, keys);
    any |= bytes;
    all &= bytes;
    if (t % 8 == 7 && any_set(any) && !all_set(all, keys)) return Shown::kSome;
  }
  return !any_set(any) ? Shown::kNone : all_set(all, keys) ? Shown::kAll : Shown::kSome;
}

// Room that `plan_tiles` needs.
FUSED_ATTN_INLINE int64_t most_tiles(int64_t keys) { return keys / kMaskStep + 2; }

// The tiles, of at most `most` keys, of the queries [begin, begin + rows), which lie in one tile of
// the block mask. Those that a mask empties are left out.
static int64_t plan_tiles(const AttentionInputs& in, const Head& head, int64_t begin, int64_t rows,
                          int64_t most, KeyTile* tiles) {
  const Span span = span_of(in, head, begin, begin + rows);
  int64_t count = 0;
  if (span.begin == span.end) return 0;
  int64_t s = round_down(span.begin, kPanel);
  if (!head.mask && !head.tiles) {
    for (; s < span.end; s += most)
      tiles[count++] = {s, std::min(s + most, span.end), false, nullptr};
    return count;
  }
  for (int64_t end; s < span.end; s = end) {
    end = std::min(round_down(s, kMaskStep) + kMaskStep, span.end);
    const uint32_t* bits = nullptr;
    if (head.tiles) {
      const int32_t tile = head.tiles[begin / kMaskTile * in.block_mask.key_tiles + s / kMaskTile];
      if (tile == 0) continue;
      if (tile > 1) bits = in.block_mask.bits + (tile - 2) * kMaskTile * (kMaskTile / 32);
    }
    bool masked = false;
    if (head.mask) {
      const Shown shown = classify(head, begin, rows, s, end - s);
      if (shown == Shown::kNone) continue;
      masked = shown == Shown::kSome;
    }
    KeyTile* last = tiles + count - 1;
    if (count > 0 && last->end == s && last->masked == masked && last->bits == bits &&
        end - last->begin <= most)
      last->end = end;
    else
      tiles[count++] = {s, end, masked, bits};
  }
  return count;
}

// How many queries a block that begins at t has: `most`, or with a mask a square of it.
FUSED_ATTN_INLINE int64_t block_rows(const Head& head, int64_t t, int64_t most) {
  if (head.mask || head.tiles) most = round_down(t, kMaskStep) + kMaskStep - t;
  return std::min(most, head.rows.end - t);
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
  if (stride == 0) {
    if (!*mask) std::fill_n(row, count, -kInfinity);
    return;
  }
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

// Bit i of the words hides or shows logit i - offset, for logits [begin, end), whole vectors.
static inline void hide_bits(float* row, const uint32_t* words, int64_t offset, int64_t begin,
                             int64_t end) {
  VecU lane;
  for (int i = 0; i < kVec; ++i) lane[i] = 1u << i;
  for (int64_t s = begin; s < end; s += kVec) {
    const int64_t bit = offset + s;
    const VecI hidden = ((VecU{} + (words[bit / 32] >> (bit % 32))) & lane) == 0u;
    store(row + s, select(hidden, broadcast(-kInfinity), load(row + s)));
  }
}

// softcap * tanh(x / softcap) of whole vectors; the derivative too if there is room for it.
static inline void cap(float* row, int64_t begin, int64_t end, float softcap, float* derivative) {
  const float inverse = 1.0f / softcap;
  for (int64_t s = begin; s < end; s += kVec) {
    const Vec y = tanh(load(row + s) * inverse);
    store(row + s, y * softcap);
    if (derivative) store(derivative + s, 1.0f - y * y);
  }
}

// Query `position` is on the diagonal at that logit.
static inline void add_alibi(float* row, int64_t begin, int64_t end, float slope,
                             int64_t position) {
  for (int64_t s = begin; s < end; s += kVec) {
    const Vec distance = __builtin_convertvector(iota(), Vec) + static_cast<float>(s - position);
    store(row + s, load(row + s) - slope * max(distance, -distance));
  }
}

template <typename T>
FUSED_ATTN_INLINE void add_bias(const AttentionInputs& in, const Head& head, int64_t t, int64_t s,
                                float* row, int64_t count) {
  const T* bias = static_cast<const T*>(in.bias.data);
  add_bias(row, bias + pair_offset(in.bias, head.b, head.h, t, s), in.bias.stride_s, count);
}

// From scaled products to logits, for the keys `span` of a tile that query t may look at. Other
// lanes of their vectors become -inf. `span` is not empty. `derivative` is that of the soft-cap.
static void finish_logits(const AttentionInputs& in, const Head& head, const KeyTile& tile,
                          int64_t t, Span span, float* row, float* derivative) {
  const int64_t begin = round_down(span.begin, kVec);
  const int64_t end = round_up(span.end, kVec);
  const int64_t first = tile.begin + span.begin;
  const int64_t count = span.end - span.begin;
  if (in.softcap > 0.0f) cap(row, begin, end, in.softcap, derivative);
  if (in.bias.data) {
    float* logits = row + span.begin;
    switch (in.bias.dtype) {
      case DType::kFloat32:
        add_bias<float>(in, head, t, first, logits, count);
        break;
      case DType::kFloat16:
        add_bias<Half>(in, head, t, first, logits, count);
        break;
      case DType::kBFloat16:
        add_bias<BFloat16>(in, head, t, first, logits, count);
        break;
    }
  }
  if (in.alibi_slopes) add_alibi(row, begin, end, head.slope, t + head.diagonal - tile.begin);
  if (tile.masked)
    hide(row + span.begin, head.mask + t * head.mask_stride_t + first * head.mask_stride_s,
         head.mask_stride_s, count);
  if (tile.bits)
    hide_bits(row, tile.bits + t % kMaskTile * (kMaskTile / 32), tile.begin % kMaskTile, begin,
              end);
  for (int64_t s = begin; s < span.begin; ++s) row[s] = -kInfinity;
  for (int64_t s = span.end; s < end; ++s) row[s] = -kInfinity;
}

// Which weights dropout keeps, of the logits [begin, end) of a row: all ones or zero. Needs room
// for a whole number of blocks of counters.
static inline const uint32_t* kept_weights(const AttentionInputs& in, const PhiloxKeys& keys,
                                           const Head& head, const KeyTile& tile, int64_t t,
                                           int64_t begin, int64_t end, uint32_t* buffer) {
  const int64_t row = (head.b * in.heads + head.h) * in.queries + t;
  return dropout_keep(keys, in.keep_threshold, row * round_up(in.keys, 4) + tile.begin + begin,
                      end - begin, buffer);
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
