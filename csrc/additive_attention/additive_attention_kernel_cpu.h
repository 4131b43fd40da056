// CPU kernels of additive_attention: raw pointers, no torch. Compiled once per instruction set.
//
// A pair of a query and a key costs a hyperbolic tangent a column. Where many pairs share their
// rows and no feature stands between, exponentials are taken of the rows alone:
//
//     tanh(q + k) = 1 - 2 / (1 + e^2q e^2k)
//
// leaves a multiplication and a reciprocal for each pair (`Form::kProduct`). Whether the numbers
// allow it is looked up first (`suits_products`); else the tangent is taken of the sum
// (`Form::kSum`).
#pragma once

#include "additive_attention/additive_attention.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

// --- functions ----------------------------------------------------------------------------------

// 1 / x to about 1 unit in the last place, for normal x whose reciprocal is normal.
FUSED_ATTN_INLINE Vec reciprocal(Vec x) {
#if defined(FUSED_ATTN_ISA_AVX512)
  const Vec r = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r + r * (1.0f - x * r);
#elif defined(FUSED_ATTN_ISA_AVX2)
  // Of 12 bits, which a step of the second order would leave with 23.
  const Vec r = reinterpret_cast<Vec>(_mm256_rcp_ps(reinterpret_cast<__m256>(x)));
  const Vec error = 1.0f - x * r;
  return r + r * (error + error * error);
#else
  return 1.0f / x;
#endif
}

// As `tanh`, in fewer operations: e^2x - 1 is taken without cancellation, and 1 is reached before
// it overflows. 2x is scaled to base 2 in one step, since the error that this leaves in e^2x where
// it is large does not reach the quotient.
FUSED_ATTN_INLINE Vec tanh_of_sum(Vec x) {
  // The constants are the first operands, so that NaN passes.
  const Vec y = min(broadcast(30.0f), max(broadcast(-30.0f), x * 2.88539008177792681f));
  const Vec shifted = y + kExponent;
  const Vec r = y - (shifted - kExponent);
  // (2^r - 1) / r with the coefficients of `exp2_of_negative`.
  Vec p = broadcast(1.5345789e-4f);
  p = p * r + 1.3399930861e-3f;
  p = p * r + 9.6184890476e-3f;
  p = p * r + 5.5503287784e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.9314720574e-1f;
  const Vec power = as_vec(reinterpret_cast<VecI>(shifted) << 23);
  const Vec less_one = p * r * power + (power - 1.0f);
  return less_one * reciprocal(less_one + 2.0f);
}

// --- rows
// -----------------------------------------------------------------------------------------

template <typename T>
FUSED_ATTN_INLINE const T* head_of(const SequenceRows& rows, int64_t b, int64_t h) {
  return static_cast<const T*>(rows.data) + b * rows.stride_b + h * rows.stride_h;
}

// Two vectors share a reciprocal.
FUSED_ATTN_INLINE int64_t padded_pairs(int64_t size) { return round_up(size, 2 * kVec); }

// out[i] = change(row[i]) for i < `columns`, a multiple of kVec; the row is 0 from `size` on.
template <typename T, typename Change>
FUSED_ATTN_INLINE void copy_row(const T* row, int64_t size, int64_t columns, float* out,
                                Change&& change) {
  int64_t i = 0;
  for (; i + kVec <= size; i += kVec) store(out + i, change(load(row + i)));
  for (; i < columns; i += kVec)
    store(out + i, change(i < size ? load_partial(row + i, size - i) : Vec{}));
}

// --- what takes part --------------------------------------------------------------------------

// Of some queries of a head: those that see a key, and the keys that one of them sees.
struct Visible {
  int32_t* queries;
  int32_t* keys;
  int64_t num_queries;
  int64_t num_keys;
  const uint8_t* mask;  // of the head, where it hides some of their pairs; else null
};

// Queries [begin, end) of a head. `seen` has room for the keys.
static inline Visible find_visible(const AdditiveInputs& in, int64_t b, int64_t h, int64_t begin,
                                   int64_t end, int32_t* queries, int32_t* keys, uint8_t* seen) {
  Visible visible{queries, keys, 0, 0, nullptr};
  const int64_t length = in.key_lengths ? in.key_lengths[b] : in.keys;
  if (length == 0) return visible;
  if (!in.mask.data) {
    for (int64_t t = begin; t < end; ++t) queries[visible.num_queries++] = static_cast<int32_t>(t);
    for (int64_t s = 0; s < length; ++s) keys[visible.num_keys++] = static_cast<int32_t>(s);
    return visible;
  }
  const uint8_t* mask = in.mask.data + b * in.mask.stride_b + h * in.mask.stride_h;
  int64_t pairs = 0;
  std::memset(seen, 0, length);
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* row = mask + t * in.mask.stride_t;
    int64_t count = 0;
    for (int64_t s = 0; s < length; ++s) {
      const uint8_t shown = row[s * in.mask.stride_s] != 0;
      seen[s] |= shown;
      count += shown;
    }
    if (count > 0) queries[visible.num_queries++] = static_cast<int32_t>(t);
    pairs += count;
  }
  for (int64_t s = 0; s < length; ++s)
    if (seen[s]) keys[visible.num_keys++] = static_cast<int32_t>(s);
  if (pairs < visible.num_queries * visible.num_keys) visible.mask = mask;
  return visible;
}

// matrix[i, j] = value for the hidden pairs of the visible queries and keys.
static inline void fill_hidden(const AdditiveInputs& in, const Visible& visible, float* matrix,
                               int64_t stride, float value) {
  if (!visible.mask) return;
  for (int64_t i = 0; i < visible.num_queries; ++i) {
    const uint8_t* row = visible.mask + visible.queries[i] * in.mask.stride_t;
    for (int64_t j = 0; j < visible.num_keys; ++j)
      if (!row[visible.keys[j] * in.mask.stride_s]) matrix[i * stride + j] = value;
  }
}

template <typename T>
static inline void point_at_rows(const T* head, int64_t stride, const int32_t* numbers,
                                 int64_t count, const T** rows) {
  for (int64_t i = 0; i < count; ++i) rows[i] = head + numbers[i] * stride;
}

// --- products
// -------------------------------------------------------------------------------------

// Calls `strip(first, integral_constant of how many)` for four of `count` at a time, two, one.
template <typename Strip>
FUSED_ATTN_INLINE void for_strips(int64_t count, Strip&& strip) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) strip(i, std::integral_constant<int, 4>{});
  if (i + 2 <= count) {
    strip(i, std::integral_constant<int, 2>{});
    i += 2;
  }
  if (i < count) strip(i, std::integral_constant<int, 1>{});
}

// out[i, j] for kRows rows and `count` columns, kVec / kRows columns at a time. `add(j, rows of b,
// sums)` adds the vectors whose lanes' sum is out[i, j + c] to sums[i * (kVec / kRows) + c]. Behind
// the last row of b comes the last again.
template <int kRows, typename B, typename Add>
FUSED_ATTN_INLINE void pair_sums(const B* const* b, int64_t count, float* out, int64_t stride,
                                 Add&& add) {
  constexpr int kColumns = kVec / kRows;
  for (int64_t j = 0; j < count; j += kColumns) {
    const B* columns[kColumns];
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) columns[c] = b[std::min(j + c, count - 1)];
    Vec sums[kVec] = {};
    add(j, columns, sums);
    float lanes[kVec];
    store(lanes, reduce_add_each(sums));
    const int64_t width = std::min<int64_t>(kColumns, count - j);
    for (int r = 0; r < kRows; ++r)
      std::memcpy(out + r * stride + j, lanes + r * kColumns, sizeof(float) * width);
  }
}

// out[i, j] = a[i] . b[j].
template <typename T>
static void dot_products(const T* const* a, int64_t rows, const T* const* b, int64_t count,
                         int64_t width, float* out, int64_t stride) {
  for_strips(rows, [&](int64_t first, auto strip) {
    constexpr int kRows = strip;
    constexpr int kColumns = kVec / kRows;
    const T* const* x = a + first;
    const auto add = [&](int64_t, const T* const(&y)[kColumns], Vec(&sums)[kVec]) {
      const auto step = [&](int64_t i, auto lanes) {
        Vec right[kColumns];
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; ++c) right[c] = load_lanes(y[c] + i, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vec left = load_lanes(x[r] + i, lanes);
#pragma GCC unroll 16
          for (int c = 0; c < kColumns; ++c) sums[r * kColumns + c] += left * right[c];
        }
      };
      int64_t i = 0;
      for (; i + kVec <= width; i += kVec) step(i, FullVec{});
      if (i < width) step(i, width - i);
    };
    pair_sums<kRows>(b, count, out + first * stride, stride, add);
  });
}

// out[r] = sum over i of factors[r * row_stride + i * stride] rows[i], for kRows results.
template <int kRows, typename T>
static void weighted_sum(const T* const* rows, int64_t count, int64_t width, const float* factors,
                         int64_t row_stride, int64_t stride, T* const* out) {
  // Sums in registers: of 32 with AVX-512, else of 16.
#if defined(FUSED_ATTN_ISA_AVX512)
  constexpr int kMost = 4;
#else
  constexpr int kMost = 2;
#endif
  const auto columns = [&](int64_t begin, auto vectors, auto lanes) {
    constexpr int kColumns = vectors;
    Vec sums[kRows][kColumns] = {};
    for (int64_t i = 0; i < count; ++i) {
      Vec row[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) row[c] = load_lanes(rows[i] + begin + c * kVec, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec factor = broadcast(factors[r * row_stride + i * stride]);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[r][c] += factor * row[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) store_lanes(out[r] + begin + c * kVec, sums[r][c], lanes);
  };
  int64_t i = 0;
  for (; i + kMost * kVec <= width; i += kMost * kVec)
    columns(i, std::integral_constant<int, kMost>{}, FullVec{});
  for (; i + kVec <= width; i += kVec) columns(i, std::integral_constant<int, 1>{}, FullVec{});
  if (i < width) columns(i, std::integral_constant<int, 1>{}, width - i);
}

// The same for `results` of them.
template <typename T>
static void weighted_sums(const T* const* rows, int64_t count, int64_t width, const float* factors,
                          int64_t row_stride, int64_t stride, T* const* out, int64_t results) {
  for_strips(results, [&](int64_t first, auto strip) {
    weighted_sum<strip.value>(rows, count, width, factors + first * row_stride, row_stride, stride,
                              out + first);
  });
}

// --- which form --------------------------------------------------------------------------------

// e^2q e^2k and the product of two of them with a weight must not overflow, nor their reciprocals
// vanish.
constexpr float kMostArgument = 16.0f;
constexpr float kMostWeight = 1e9f;

// 1 - 2 / (1 + e) has an absolute error of about eps / 2, so the tangents must not be small: their
// mean square at least this, weighted as in the scores.
constexpr float kLeastSquare = 0.02f;

// What decides on the form: sums over the columns seen so far.
struct Range {
  Vec most_query{};
  Vec most_key{};
  Vec squares{};  // of q + k, averaged over the pairs
};

// Adds a column vector of queries and keys, given by `query(i)` and `key(j)`, with its weight.
template <typename Query, typename Key>
FUSED_ATTN_INLINE void extend(Range& range, int64_t queries, int64_t keys, Vec weight,
                              Query&& query, Key&& key) {
  Vec query_sum{}, query_squares{}, key_sum{}, key_squares{};
  for (int64_t i = 0; i < queries; ++i) {
    const Vec q = query(i);
    range.most_query = max(range.most_query, magnitude(q));
    query_sum += q;
    query_squares += q * q;
  }
  for (int64_t j = 0; j < keys; ++j) {
    const Vec k = key(j);
    range.most_key = max(range.most_key, magnitude(k));
    key_sum += k;
    key_squares += k * k;
  }
  const float a = 1.0f / static_cast<float>(queries);
  const float b = 1.0f / static_cast<float>(keys);
  range.squares += weight * weight *
                   (query_squares * a + key_squares * b + 2.0f * (query_sum * a) * (key_sum * b));
}

// `weight_squares` is the sum of the weights' squares.
static inline bool suits_products(const Range& range, float weight_squares) {
  // A NaN is among the squares, and comparisons with it are false.
  return weight_squares <= kMostWeight * kMostWeight &&
         reduce_max(range.most_query) + reduce_max(range.most_key) <= kMostArgument &&
         reduce_add(range.squares) >= kLeastSquare * weight_squares;
}

// --- scores
// ---------------------------------------------------------------------------------------

// Keys whose exponentials are in the cache at a time, beside those of all queries of the block.
constexpr int64_t kKeyTile = 16;

// Keys that are added to a query at a time, sharing loads of weights.
constexpr int kKeyGroup = 4;

// Memory of one thread for scores.
struct ScoreScratch {
  explicit ScoreScratch(const AdditiveInputs& in)
      : columns(padded_pairs(in.size)),
        weight(columns),
        rows((kQueryBlock + kKeyTile) * columns),
        feature_weight(in.features.data ? in.features_size * columns : 0),
        features(in.features.data ? round_up(in.keys, kKeyGroup) * in.features_size : 0) {}

  int64_t columns;
  Scratch<float> weight;  // of the head, 0 in the columns behind
  Scratch<float> rows;    // exponentials of queries and keys, or one query
  Scratch<float> feature_weight;
  Scratch<float> features;  // of one query
};

// Whether the scores of these rows may be taken from products.
template <typename T>
static bool rows_suit_products(const AdditiveInputs& in, const T* const* q, int64_t queries,
                               const T* const* k, int64_t keys, const float* weight) {
  // A single query shares nothing.
  if (in.features.data || queries < 2) return false;
  Range range;
  Vec weight_squares{};
  for (int64_t i = 0; i < in.size; i += kVec) {
    const auto visit = [&](auto lanes) {
      const Vec w = load(weight + i);
      weight_squares += w * w;
      extend(
          range, queries, keys, w, [&](int64_t t) { return load_lanes(q[t] + i, lanes); },
          [&](int64_t s) { return load_lanes(k[s] + i, lanes); });
    };
    if (i + kVec <= in.size)
      visit(FullVec{});
    else
      visit(in.size - i);
  }
  return suits_products(range, reduce_add(weight_squares));
}

// out[i, j] = sum over e of weight tanh(q[i] + k[j]), by exponentials of the rows.
template <typename T>
static void scores_of_products(const AdditiveInputs& in, const T* const* q, int64_t queries,
                               const T* const* k, int64_t keys, ScoreScratch& scratch, float* out,
                               int64_t stride) {
  const int64_t columns = scratch.columns;
  const float* weight = scratch.weight.data();
  const float* query_rows[kQueryBlock];
  const float* key_rows[kKeyTile];
  const auto double_exp = [](Vec x) { return exp(x + x); };
  for (int64_t i = 0; i < queries; ++i) {
    float* row = scratch.rows.data() + i * columns;
    copy_row(q[i], in.size, columns, row, double_exp);
    query_rows[i] = row;
  }
  for (int64_t begin = 0; begin < keys; begin += kKeyTile) {
    const int64_t count = std::min(kKeyTile, keys - begin);
    for (int64_t j = 0; j < count; ++j) {
      float* row = scratch.rows.data() + (kQueryBlock + j) * columns;
      copy_row(k[begin + j], in.size, columns, row, double_exp);
      key_rows[j] = row;
    }
    for_strips(queries, [&](int64_t first, auto strip) {
      constexpr int kRows = strip;
      constexpr int kColumns = kVec / kRows;
      const float* const* x = query_rows + first;
      const auto add = [&](int64_t, const float* const(&y)[kColumns], Vec(&sums)[kVec]) {
        for (int64_t i = 0; i < columns; i += 2 * kVec) {
          // The sum of two quotients is one quotient:
          // w (1 - 2 / a) + w' (1 - 2 / a') = w + w' - 2 (w a' + w' a) / (a a').
          const Vec w0 = -2.0f * load(weight + i);
          const Vec w1 = -2.0f * load(weight + i + kVec);
          const Vec sum = -0.5f * (w0 + w1);
#pragma GCC unroll 16
          for (int c = 0; c < kColumns; ++c) {
            const Vec k0 = load(y[c] + i);
            const Vec k1 = load(y[c] + i + kVec);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const Vec a0 = load(x[r] + i) * k0 + 1.0f;
              const Vec a1 = load(x[r] + i + kVec) * k1 + 1.0f;
              sums[r * kColumns + c] += (w0 * a1 + w1 * a0) * reciprocal(a0 * a1) + sum;
            }
          }
        }
      };
      pair_sums<kRows>(key_rows, count, out + first * stride + begin, stride, add);
    });
  }
}

// The features of one query and its keys, [keys, F], 0 where a pair is hidden and behind the last
// key, as far as the group goes.
template <typename T>
static void load_features(const AdditiveInputs& in, const Visible& visible, int64_t b, int64_t h,
                          int64_t t, float* out) {
  const PairFeatures& f = in.features;
  const T* row = static_cast<const T*>(f.data) + b * f.stride_b + h * f.stride_h + t * f.stride_t;
  const uint8_t* mask = visible.mask ? visible.mask + t * in.mask.stride_t : nullptr;
  for (int64_t j = 0; j < visible.num_keys; ++j, out += in.features_size) {
    const int64_t s = visible.keys[j];
    const bool shown = !mask || mask[s * in.mask.stride_s];
    for (int64_t i = 0; i < in.features_size; ++i)
      out[i] = shown ? to_float(row[s * f.stride_s + i * f.stride_f]) : 0.0f;
  }
  const int64_t behind = round_up(visible.num_keys, kKeyGroup) - visible.num_keys;
  std::fill_n(out, behind * in.features_size, 0.0f);
}

// x[c] += features[c, :] . weight[:, column vector], for a group of keys.
FUSED_ATTN_INLINE void add_features(const float* features, int64_t size, const float* weight,
                                    int64_t columns, Vec (&x)[kKeyGroup]) {
  for (int64_t f = 0; f < size; ++f) {
    const Vec w = load(weight + f * columns);
#pragma GCC unroll 4
    for (int c = 0; c < kKeyGroup; ++c) x[c] += features[c * size + f] * w;
  }
}

// Likewise, by the tangent of each sum.
template <typename T>
static void scores_of_sums(const AdditiveInputs& in, const Visible& visible, int64_t b, int64_t h,
                           const T* const* q, const T* const* k, ScoreScratch& scratch, float* out,
                           int64_t stride) {
  const int64_t columns = scratch.columns;
  const int64_t keys = visible.num_keys;
  const float* weight = scratch.weight.data();
  float* query = scratch.rows.data();
  const float* features = nullptr;
  for (int64_t i = 0; i < visible.num_queries; ++i) {
    copy_row(q[i], in.size, columns, query, [](Vec x) { return x; });
    if (in.features.data) {
      load_features<T>(in, visible, b, h, visible.queries[i], scratch.features.data());
      features = scratch.features.data();
    }
    const auto add = [&](int64_t j, const T* const(&rows)[kVec], Vec(&sums)[kVec]) {
#pragma GCC unroll 4
      for (int first = 0; first < kVec; first += kKeyGroup) {
        if (j + first >= keys) break;
        Vec part[kKeyGroup] = {};
        const auto step = [&](int64_t e, auto lanes) {
          const Vec base = load(query + e);
          Vec x[kKeyGroup];
#pragma GCC unroll 4
          for (int c = 0; c < kKeyGroup; ++c) x[c] = base + load_lanes(rows[first + c] + e, lanes);
          if (features)
            add_features(features + (j + first) * in.features_size, in.features_size,
                         scratch.feature_weight.data() + e, columns, x);
          const Vec w = load(weight + e);
#pragma GCC unroll 4
          for (int c = 0; c < kKeyGroup; ++c) part[c] += w * tanh_of_sum(x[c]);
        };
        int64_t e = 0;
        for (; e + kVec <= in.size; e += kVec) step(e, FullVec{});
        if (e < in.size) step(e, in.size - e);
#pragma GCC unroll 4
        for (int c = 0; c < kKeyGroup; ++c) sums[first + c] = part[c];
      }
    };
    pair_sums<1>(k, keys, out + i * stride, stride, add);
  }
}

// The weights of the head's parameters, padded.
static inline void load_weights(const AdditiveInputs& in, int64_t h, ScoreScratch& scratch) {
  const auto same = [](Vec x) { return x; };
  copy_row(in.score_weight + h * in.size, in.size, scratch.columns, scratch.weight.data(), same);
  if (!in.features.data) return;
  for (int64_t f = 0; f < in.features_size; ++f)
    copy_row(in.feature_weight + (h * in.features_size + f) * in.size, in.size, scratch.columns,
             scratch.feature_weight.data() + f * scratch.columns, same);
}

// --- forward
// --------------------------------------------------------------------------------------

// In place, over `count` scores; the row has room for whole vectors.
static inline void softmax(float* row, int64_t count) {
  const int64_t end = round_up(count, kVec);
  std::fill(row + count, row + end, -kInfinity);
  Vec most = broadcast(-kInfinity);
  for (int64_t j = 0; j < end; j += kVec) most = max(most, load(row + j));
  const Vec peak = broadcast(reduce_max(most));
  Vec sum{};
  for (int64_t j = 0; j < end; j += kVec) {
    const Vec e = exp(load(row + j) - peak);
    store(row + j, e);
    sum += e;
  }
  const float total = reduce_add(sum);
  for (int64_t j = 0; j < end; j += kVec) store(row + j, load(row + j) / total);
}

template <typename T>
static void forward_blocks(const AdditiveForward& p, int64_t begin, int64_t end) {
  const AdditiveInputs& in = p.in;
  const int64_t stride = round_up(in.keys, kVec);
  ScoreScratch scratch(in);
  Scratch<float> scores(kQueryBlock * stride);
  Scratch<int32_t> keys(in.keys);
  Scratch<uint8_t> seen(in.keys);
  Scratch<const T*> key_rows(in.keys);
  int32_t queries[kQueryBlock];
  const T* query_rows[kQueryBlock];
  T* context_rows[kQueryBlock];

  for (int64_t block = begin; block < end; ++block) {
    const int64_t head = block / p.query_blocks;
    const int64_t b = head / in.heads;
    const int64_t h = head % in.heads;
    const int64_t first = block % p.query_blocks * kQueryBlock;
    const int64_t last = std::min(first + kQueryBlock, in.queries);
    const Visible visible = find_visible(in, b, h, first, last, queries, keys.data(), seen.data());
    const int64_t count = visible.num_keys;

    float* weights = p.weights + (head * in.queries + first) * in.keys;
    if (count < in.keys || visible.num_queries < last - first)
      std::fill_n(weights, (last - first) * in.keys, p.context ? 0.0f : -kInfinity);
    if (p.context && visible.num_queries < last - first) {
      T* context = static_cast<T*>(p.context) + (head * in.queries + first) * in.value_size;
      std::fill_n(context, (last - first) * in.value_size, from_float<T>(0.0f));
    }
    if (visible.num_queries == 0) continue;

    load_weights(in, h, scratch);
    point_at_rows(head_of<T>(in.q, b, h), in.q.stride_row, queries, visible.num_queries,
                  query_rows);
    point_at_rows(head_of<T>(in.k, b, h), in.k.stride_row, keys.data(), count, key_rows.data());
    if (rows_suit_products(in, query_rows, visible.num_queries, key_rows.data(), count,
                           scratch.weight.data()))
      scores_of_products(in, query_rows, visible.num_queries, key_rows.data(), count, scratch,
                         scores.data(), stride);
    else
      scores_of_sums(in, visible, b, h, query_rows, key_rows.data(), scratch, scores.data(),
                     stride);
    fill_hidden(in, visible, scores.data(), stride, -kInfinity);

    for (int64_t i = 0; i < visible.num_queries; ++i) {
      float* row = scores.data() + i * stride;
      if (p.context) softmax(row, count);
      float* out = weights + (queries[i] - first) * in.keys;
      for (int64_t j = 0; j < count; ++j) out[keys.data()[j]] = row[j];
    }
    if (!p.context) continue;
    for (int64_t i = 0; i < visible.num_queries; ++i)
      context_rows[i] =
          static_cast<T*>(p.context) + (head * in.queries + queries[i]) * in.value_size;
    point_at_rows(head_of<T>(in.v, b, h), in.v.stride_row, keys.data(), count, key_rows.data());
    weighted_sums(key_rows.data(), count, in.value_size, scores.data(), stride, 1, context_rows,
                  visible.num_queries);
  }
}

// Calls run(T{}) with the type that `dtype` names.
template <typename Run>
static void for_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
  }
}

void additive_attention_forward(const AdditiveForward& p, int64_t begin, int64_t end) {
  for_dtype(p.in.dtype, [&](auto element) { forward_blocks<decltype(element)>(p, begin, end); });
}

// --- backward: scores and values
// ------------------------------------------------------------------

template <typename T>
static void grad_scores_of_heads(const AdditiveBackward& p, int64_t begin, int64_t end) {
  const AdditiveInputs& in = p.in;
  Scratch<uint8_t> seen(in.keys);
  Scratch<float> weights(p.weights ? in.queries * in.keys : 0);
  Scratch<const T*> grad_rows(in.queries);
  Scratch<const T*> value_rows(in.keys);
  Scratch<T*> grad_value_rows(in.keys);

  for (int64_t head = begin; head < end; ++head) {
    const int64_t b = head / in.heads;
    const int64_t h = head % in.heads;
    const Visible visible = find_visible(in, b, h, 0, in.queries, p.queries + head * in.queries,
                                         p.keys + head * in.keys, seen.data());
    const int64_t queries = visible.num_queries;
    const int64_t keys = visible.num_keys;
    p.counts[2 * head] = queries;
    p.counts[2 * head + 1] = keys;
    if (queries == 0) continue;

    float* grad = p.grad_scores + head * in.queries * in.keys;
    const auto gathered = [&](const float* matrix, int64_t i, int64_t j) {
      return matrix[(head * in.queries + visible.queries[i]) * in.keys + visible.keys[j]];
    };
    if (p.grad_context.data) {
      point_at_rows(head_of<T>(p.grad_context, b, h), p.grad_context.stride_row, visible.queries,
                    queries, grad_rows.data());
      point_at_rows(head_of<T>(in.v, b, h), in.v.stride_row, visible.keys, keys, value_rows.data());
      dot_products(grad_rows.data(), queries, value_rows.data(), keys, in.value_size, grad, keys);
    } else {
      std::fill_n(grad, queries * keys, 0.0f);
    }
    if (p.grad_weights)
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t j = 0; j < keys; ++j) grad[i * keys + j] += gathered(p.grad_weights, i, j);
    if (!p.weights) {
      fill_hidden(in, visible, grad, keys, 0.0f);
      continue;
    }
    // The softmax. Where a weight is 0, so is the gradient, whatever came for it.
    for (int64_t i = 0; i < queries; ++i) {
      float* row = grad + i * keys;
      float* w = weights.data() + i * keys;
      float mean = 0.0f;
      for (int64_t j = 0; j < keys; ++j) {
        w[j] = gathered(p.weights, i, j);
        if (w[j] == 0.0f) row[j] = 0.0f;
        mean += w[j] * row[j];
      }
      for (int64_t j = 0; j < keys; ++j) row[j] = w[j] * (row[j] - mean);
    }
    if (p.grad_value && p.grad_context.data) {
      for (int64_t j = 0; j < keys; ++j)
        grad_value_rows.data()[j] =
            static_cast<T*>(p.grad_value) + (head * in.keys + visible.keys[j]) * in.value_size;
      weighted_sums(grad_rows.data(), queries, in.value_size, weights.data(), 1, keys,
                    grad_value_rows.data(), keys);
    }
  }
}

void additive_attention_grad_scores(const AdditiveBackward& p, int64_t begin, int64_t end) {
  for_dtype(p.in.dtype,
            [&](auto element) { grad_scores_of_heads<decltype(element)>(p, begin, end); });
}

// --- backward: queries, keys and score_weight -------------------------------------------------

// From a pair's rows, as its form has them, the tangent and its derivative, but for factors.
template <bool kIsProduct>
struct Slope {
  Vec value;
  Vec slope;

  FUSED_ATTN_INLINE Slope(Vec q, Vec k) {
    if constexpr (kIsProduct) {
      // With r = 1 / (1 + e^2q e^2k): tanh = 2 (1/2 - r), and its derivative 4 (r - r^2).
      const Vec r = reciprocal(q * k + 1.0f);
      value = 0.5f - r;
      slope = r - r * r;
    } else {
      value = tanh_of_sum(q + k);
      slope = 1.0f - value * value;
    }
  }

  static constexpr float kValueFactor = kIsProduct ? 2.0f : 1.0f;
  static constexpr float kSlopeFactor = kIsProduct ? 4.0f : 1.0f;
};

// Keys whose contributions are summed by themselves before they are added up: the error of a sum
// grows with how many numbers follow one another.
constexpr int64_t kSumTile = 64;

// One vector of columns of all pairs of a head. `q` and `k` have a vector for each row; those of q
// become the gradients but for the weight, and `grad_k` has those of k. Returns the gradient of the
// weight.
template <bool kIsProduct>
static Vec pairs_backward(const float* grad, int64_t queries, int64_t keys, float* q,
                          const float* k, float* grad_k) {
  using S = Slope<kIsProduct>;
  for (int64_t j = 0; j < keys; ++j) store(grad_k + j * kVec, Vec{});
  Vec grad_weight{};
  for_strips(queries, [&](int64_t first, auto strip) {
    constexpr int kRows = strip;
    Vec x[kRows];
    Vec grad_query[kRows] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x[r] = load(q + (first + r) * kVec);
    const float* rows = grad + first * keys;
    for (int64_t begin = 0; begin < keys; begin += kSumTile) {
      const int64_t end = std::min(begin + kSumTile, keys);
      Vec of_query[kRows] = {};
      Vec of_weight{};
      for (int64_t j = begin; j < end; ++j) {
        const Vec key = load(k + j * kVec);
        Vec of_key{};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const S pair(x[r], key);
          const Vec g = broadcast(rows[r * keys + j]);
          of_query[r] += g * pair.slope;
          of_key += g * pair.slope;
          of_weight += g * pair.value;
        }
        store(grad_k + j * kVec, load(grad_k + j * kVec) + of_key);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) grad_query[r] += of_query[r];
      grad_weight += of_weight;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) store(q + (first + r) * kVec, grad_query[r] * S::kSlopeFactor);
  });
  for (int64_t j = 0; j < keys; ++j)
    store(grad_k + j * kVec, load(grad_k + j * kVec) * S::kSlopeFactor);
  return grad_weight * S::kValueFactor;
}

template <typename T>
static void backward_groups(const AdditiveBackward& p, int64_t begin, int64_t end) {
  const AdditiveInputs& in = p.in;
  const int64_t groups = (in.size + kColumnGroup - 1) / kColumnGroup;
  Scratch<float> q(in.queries * kVec);
  Scratch<float> k(in.keys * kVec);
  Scratch<float> grad_k(in.keys * kVec);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t h = task / groups % in.heads;
    const int64_t chunk = task / groups / in.heads;
    const int64_t first_column = task % groups * kColumnGroup;
    const int64_t last_column = std::min(first_column + kColumnGroup, in.size);
    float* grad_weight =
        p.grad_score_weight ? p.grad_score_weight + (chunk * in.heads + h) * in.size : nullptr;
    if (grad_weight) std::fill(grad_weight + first_column, grad_weight + last_column, 0.0f);
    const int64_t last_batch = std::min((chunk + 1) * p.chunk_batch, in.batch);
    for (int64_t b = chunk * p.chunk_batch; b < last_batch; ++b) {
      const int64_t head = b * in.heads + h;
      const int64_t queries = p.counts[2 * head];
      const int64_t keys = p.counts[2 * head + 1];
      if (queries == 0) continue;
      const int32_t* query_numbers = p.queries + head * in.queries;
      const int32_t* key_numbers = p.keys + head * in.keys;
      const float* grad = p.grad_scores + head * in.queries * in.keys;
      const T* query = head_of<T>(in.q, b, h);
      const T* key = head_of<T>(in.k, b, h);
      T* grad_query = static_cast<T*>(p.grad_query);
      T* grad_key = static_cast<T*>(p.grad_key);

      const auto visit = [&](int64_t e, auto lanes) {
        for (int64_t i = 0; i < queries; ++i)
          store(q.data() + i * kVec,
                load_lanes(query + query_numbers[i] * in.q.stride_row + e, lanes));
        for (int64_t j = 0; j < keys; ++j)
          store(k.data() + j * kVec, load_lanes(key + key_numbers[j] * in.k.stride_row + e, lanes));
        Vec total;
        Range range;
        extend(
            range, queries, keys, broadcast(1.0f),
            [&](int64_t i) { return load(q.data() + i * kVec); },
            [&](int64_t j) { return load(k.data() + j * kVec); });
        // A single query shares nothing.
        if (queries > 1 && suits_products(range, static_cast<float>(lanes))) {
          const auto double_exp = [](float* row) {
            const Vec x = load(row);
            store(row, exp(x + x));
          };
          for (int64_t i = 0; i < queries; ++i) double_exp(q.data() + i * kVec);
          for (int64_t j = 0; j < keys; ++j) double_exp(k.data() + j * kVec);
          total = pairs_backward<true>(grad, queries, keys, q.data(), k.data(), grad_k.data());
        } else {
          total = pairs_backward<false>(grad, queries, keys, q.data(), k.data(), grad_k.data());
        }
        const Vec weight = load_lanes(in.score_weight + h * in.size + e, lanes);
        if (grad_query)
          for (int64_t i = 0; i < queries; ++i)
            store_lanes(grad_query + (head * in.queries + query_numbers[i]) * in.size + e,
                        load(q.data() + i * kVec) * weight, lanes);
        if (grad_key)
          for (int64_t j = 0; j < keys; ++j)
            store_lanes(grad_key + (head * in.keys + key_numbers[j]) * in.size + e,
                        load(grad_k.data() + j * kVec) * weight, lanes);
        if (grad_weight)
          store_lanes(grad_weight + e, load_lanes(grad_weight + e, lanes) + total, lanes);
      };
      int64_t e = first_column;
      for (; e + kVec <= last_column; e += kVec) visit(e, FullVec{});
      if (e < last_column) visit(e, last_column - e);
    }
  }
}

void additive_attention_backward(const AdditiveBackward& p, int64_t begin, int64_t end) {
  for_dtype(p.in.dtype, [&](auto element) { backward_groups<decltype(element)>(p, begin, end); });
}

// --- backward, with features --------------------------------------------------------------------

// What the gradients of one query are added to, and made from.
struct FeatureBackward {
  ScoreScratch& scratch;
  const float* query;          // [columns]
  float* grad_query;           // [columns]
  float* grad_keys;            // [keys, columns]
  float* grad_weight;          // [columns]
  float* grad_feature_weight;  // [F, columns]
  float* slopes;               // [kKeyGroup, columns]
};

// The pairs of a query with a group of keys, whose gradients of scores are `grad`, 0 behind the
// last key, and the gradients of their features.
template <typename T>
static void group_backward(const AdditiveInputs& in, const FeatureBackward& to,
                           const T* const (&rows)[kKeyGroup], const float (&grad)[kKeyGroup],
                           int64_t count, const float* features, float* grad_keys,
                           float* grad_features) {
  const int64_t columns = to.scratch.columns;
  const int64_t size = in.features_size;
  const float* feature_weight = to.scratch.feature_weight.data();
  const auto step = [&](int64_t e, auto lanes) {
    const Vec base = load(to.query + e);
    const Vec weight = load(to.scratch.weight.data() + e);
    Vec x[kKeyGroup];
#pragma GCC unroll 4
    for (int c = 0; c < kKeyGroup; ++c) x[c] = base + load_lanes(rows[c] + e, lanes);
    add_features(features, size, feature_weight + e, columns, x);
    Vec grad_query = load(to.grad_query + e);
    Vec grad_weight = load(to.grad_weight + e);
    Vec slope[kKeyGroup];
#pragma GCC unroll 4
    for (int c = 0; c < kKeyGroup; ++c) {
      const Vec value = tanh_of_sum(x[c]);
      grad_weight += grad[c] * value;
      slope[c] = grad[c] * weight * (1.0f - value * value);
      grad_query += slope[c];
      store(to.slopes + c * columns + e, slope[c]);
    }
    store(to.grad_query + e, grad_query);
    store(to.grad_weight + e, grad_weight);
    for (int64_t c = 0; c < count; ++c)
      store(grad_keys + c * columns + e, load(grad_keys + c * columns + e) + slope[c]);
    for (int64_t f = 0; f < size; ++f) {
      Vec sum = load(to.grad_feature_weight + f * columns + e);
#pragma GCC unroll 4
      for (int c = 0; c < kKeyGroup; ++c) sum += features[c * size + f] * slope[c];
      store(to.grad_feature_weight + f * columns + e, sum);
    }
  };
  int64_t e = 0;
  for (; e + kVec <= in.size; e += kVec) step(e, FullVec{});
  if (e < in.size) step(e, in.size - e);

  if (!grad_features) return;
  for (int64_t f = 0; f < size; ++f) {
    Vec sums[kKeyGroup] = {};
    for (e = 0; e < round_up(in.size, kVec); e += kVec) {
      const Vec w = load(feature_weight + f * columns + e);
#pragma GCC unroll 4
      for (int c = 0; c < kKeyGroup; ++c) sums[c] += load(to.slopes + c * columns + e) * w;
    }
    for (int64_t c = 0; c < count; ++c) grad_features[c * size + f] = reduce_add(sums[c]);
  }
}

template <typename T>
static void features_backward_chunks(const AdditiveBackward& p, int64_t begin, int64_t end) {
  const AdditiveInputs& in = p.in;
  const int64_t size = in.features_size;
  ScoreScratch scratch(in);
  const int64_t columns = scratch.columns;
  Scratch<float> grad_query(columns);
  Scratch<float> grad_keys(in.keys * columns);
  Scratch<float> grad_weight(columns);
  Scratch<float> grad_feature_weight(size * columns);
  Scratch<float> slopes(kKeyGroup * columns);
  Scratch<float> grad_features(in.keys * size);
  const FeatureBackward to{scratch,          scratch.rows.data(), grad_query.data(),
                           grad_keys.data(), grad_weight.data(),  grad_feature_weight.data(),
                           slopes.data()};
  const auto store_row = [&](const float* row, T* out) {
    int64_t e = 0;
    for (; e + kVec <= in.size; e += kVec) store(out + e, load(row + e));
    if (e < in.size) store_partial(out + e, load(row + e), in.size - e);
  };

  for (int64_t task = begin; task < end; ++task) {
    const int64_t h = task % in.heads;
    const int64_t chunk = task / in.heads;
    load_weights(in, h, scratch);
    std::fill_n(grad_weight.data(), columns, 0.0f);
    std::fill_n(grad_feature_weight.data(), size * columns, 0.0f);
    const int64_t last_batch = std::min((chunk + 1) * p.chunk_batch, in.batch);
    for (int64_t b = chunk * p.chunk_batch; b < last_batch; ++b) {
      const int64_t head = b * in.heads + h;
      const Visible visible{
          p.queries + head * in.queries, p.keys + head * in.keys, p.counts[2 * head],
          p.counts[2 * head + 1],
          in.mask.data ? in.mask.data + b * in.mask.stride_b + h * in.mask.stride_h : nullptr};
      const int64_t keys = visible.num_keys;
      std::fill_n(grad_keys.data(), keys * columns, 0.0f);
      for (int64_t i = 0; i < visible.num_queries; ++i) {
        const int64_t t = visible.queries[i];
        const T* query = head_of<T>(in.q, b, h) + t * in.q.stride_row;
        const T* key = head_of<T>(in.k, b, h);
        const float* grad = p.grad_scores + head * in.queries * in.keys + i * keys;
        copy_row(query, in.size, columns, scratch.rows.data(), [](Vec x) { return x; });
        load_features<T>(in, visible, b, h, t, scratch.features.data());
        std::fill_n(grad_query.data(), columns, 0.0f);
        for (int64_t j = 0; j < keys; j += kKeyGroup) {
          const int64_t count = std::min<int64_t>(kKeyGroup, keys - j);
          const T* rows[kKeyGroup];
          float group_grad[kKeyGroup];
          for (int64_t c = 0; c < kKeyGroup; ++c) {
            rows[c] = key + visible.keys[std::min(j + c, keys - 1)] * in.k.stride_row;
            group_grad[c] = c < count ? grad[j + c] : 0.0f;
          }
          group_backward(in, to, rows, group_grad, count, scratch.features.data() + j * size,
                         grad_keys.data() + j * columns,
                         p.grad_features ? grad_features.data() + j * size : nullptr);
        }
        if (p.grad_query)
          store_row(grad_query.data(),
                    static_cast<T*>(p.grad_query) + (head * in.queries + t) * in.size);
        if (p.grad_features) {
          T* out = static_cast<T*>(p.grad_features) + (head * in.queries + t) * in.keys * size;
          for (int64_t j = 0; j < keys; ++j)
            for (int64_t f = 0; f < size; ++f)
              out[visible.keys[j] * size + f] = from_float<T>(grad_features.data()[j * size + f]);
        }
      }
      if (p.grad_key)
        for (int64_t j = 0; j < keys; ++j)
          store_row(grad_keys.data() + j * columns,
                    static_cast<T*>(p.grad_key) + (head * in.keys + visible.keys[j]) * in.size);
    }
    const int64_t part = chunk * in.heads + h;
    if (p.grad_score_weight)
      std::copy_n(grad_weight.data(), in.size, p.grad_score_weight + part * in.size);
    if (p.grad_feature_weight)
      for (int64_t f = 0; f < size; ++f)
        std::copy_n(grad_feature_weight.data() + f * columns, in.size,
                    p.grad_feature_weight + (part * size + f) * in.size);
  }
}

void additive_attention_features_backward(const AdditiveBackward& p, int64_t begin, int64_t end) {
  for_dtype(p.in.dtype,
            [&](auto element) { features_backward_chunks<decltype(element)>(p, begin, end); });
}

void additive_attention_reduce(const float* partial, int64_t chunks, int64_t columns, float* total,
                               int64_t begin, int64_t end) {
  sum_chunks(partial, chunks, columns, total, begin, end);
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
