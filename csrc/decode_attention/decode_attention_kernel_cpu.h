// CPU kernel of decode_attention: raw pointers, no torch. Compiled once per instruction set.
//
// A task makes the logits of a block of queries against one chunk of keys, their weights, and the
// weighted sum of the values. Keys and values are read where they lie, by a pointer a row, so that
// a cache of any strides and an ancestry are the same thing; each is read from memory once for all
// queries of the family.
#pragma once

#include "common/scratch.h"
#include "common/vec.h"
#include "decode_attention/decode_attention.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

constexpr int64_t kCacheLine = 64;

// Bytes ahead of the arithmetic that are fetched into the cache: the processor's own prefetcher
// stops at the end of a page, and does not see the rows that an ancestry leads to.
constexpr int64_t kPrefetch = 8192;

// Stride of scores in scratch memory: room for a vector that begins at the last key.
constexpr int64_t kScoreStride = kDecodeChunk + 16;

// --- products ---------------------------------------------------------------------------------

template <typename T>
FUSED_ATTN_INLINE void prefetch(const T* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
}

// Rows of a cache. Pointers beyond `count`, as far as `ahead` and a vector, are prefetched, no
// more.
template <typename T>
struct Rows {
  const T* const* rows;
  int64_t count;
  int64_t ahead;
};

// scores[i, s] = q[i] . row s for kQueries queries, kVec / kQueries keys at a time: their
// products fill a vector of sums each, and these are summed up together.
template <int kQueries, typename T>
static void score_strip(const Rows<T>& rows, const float* q, int64_t width, float* scores) {
  constexpr int kKeys = kVec / kQueries;
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  for (int64_t s = 0; s < rows.count; s += kKeys) {
    const T* keys[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      keys[j] = rows.rows[std::min(s + j, rows.count - 1)];
      prefetch(rows.rows[s + j + rows.ahead], bytes);
    }
    Vec sums[kVec] = {};
    for (int64_t i = 0; i < width; i += kVec) {
      Vec k[kKeys];
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) k[j] = load(keys[j] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) {
        const Vec x = load(q + r * kDecodeMaxHeadSize + i);
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) sums[r * kKeys + j] += x * k[j];
      }
    }
    const Vec result = reduce_add_each(sums);
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r)
      std::memcpy(scores + r * kScoreStride + s,
                  reinterpret_cast<const float*>(&result) + r * kKeys, sizeof(float) * kKeys);
  }
}

// out[i] = sum over s of weights[i, s] row s, kColumns vectors from column `begin` on. Returns
// the column behind them.
template <int kQueries, int kColumns, typename T>
static int64_t sum_columns(const Rows<T>& rows, const float* weights, int64_t begin, int64_t width,
                           float* out) {
  constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T)) * kColumns * kVec;
  for (; begin + kColumns * kVec <= width; begin += kColumns * kVec) {
    Vec sums[kQueries][kColumns] = {};
    for (int64_t s = 0; s < rows.count; ++s) {
      const T* row = rows.rows[s] + begin;
      prefetch(rows.rows[s + rows.ahead] + begin, kBytes);
      Vec v[kColumns];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) v[j] = load(row + j * kVec);
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) {
        const Vec weight = broadcast(weights[r * kScoreStride + s]);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) sums[r][j] += weight * v[j];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j)
        store(out + r * kDecodeMaxHeadSize + begin + j * kVec, sums[r][j]);
  }
  return begin;
}

template <int kQueries, typename T>
static void value_strip(const Rows<T>& rows, const float* weights, int64_t width, float* out) {
  // Sums in registers: of 32 with AVX-512, else of 16.
#if defined(FUSED_ATTN_ISA_AVX512)
  constexpr int kMost = kQueries == 4 ? 4 : 8;
#else
  constexpr int kMost = 8 / kQueries;
#endif
  int64_t begin = sum_columns<kQueries, kMost>(rows, weights, 0, width, out);
  if constexpr (kMost > 4) begin = sum_columns<kQueries, 4>(rows, weights, begin, width, out);
  if constexpr (kMost > 2) begin = sum_columns<kQueries, 2>(rows, weights, begin, width, out);
  sum_columns<kQueries, 1>(rows, weights, begin, width, out);
}

// Calls `strip(first query, integral_constant of how many)` for four queries at a time, two, one.
template <typename Strip>
FUSED_ATTN_INLINE void for_strips(int64_t queries, Strip&& strip) {
  int64_t i = 0;
  for (; i + 4 <= queries; i += 4) strip(i, std::integral_constant<int, 4>{});
  if (i + 2 <= queries) {
    strip(i, std::integral_constant<int, 2>{});
    i += 2;
  }
  if (i < queries) strip(i, std::integral_constant<int, 1>{});
}

// --- one block of queries and one chunk of keys ---------------------------------------------

struct Query {
  int64_t row;
  int64_t head;
  int64_t t;
  int64_t position;
  // The keys that lengths, causality and the window leave it, relative to the chunk.
  int64_t begin;
  int64_t end;

  int64_t index(const DecodeAttention& p) const { return (row * p.heads + head) * p.queries + t; }
};

// Pointers to rows: keys, values behind them, and what is only prefetched.
constexpr int64_t kMaxAhead = 64;
constexpr int64_t kPointers = 2 * kDecodeChunk + kMaxAhead + kVec;

// Memory of one thread.
struct DecodeScratch {
  explicit DecodeScratch(const DecodeAttention& p)
      : rows(kPointers),
        padded_rows(kPointers),
        q(kDecodeBlock * kDecodeMaxHeadSize),
        scores(kDecodeBlock * kScoreStride),
        output(kDecodeBlock * kDecodeMaxHeadSize),
        zeros(kDecodeMaxHeadSize),
        padded(kDecodeChunk * std::max(padded_width(p.head_size), padded_width(p.value_size))) {
    for (int64_t i = 0; i < kPointers; ++i) {
      rows.data()[i] = nullptr;
      padded_rows.data()[i] = nullptr;
    }
    for (int64_t i = 0; i < kDecodeMaxHeadSize; ++i) zeros.data()[i] = 0.0f;
  }

  // Of rows that are no whole vectors, and are copied for that reason.
  static int64_t padded_width(int64_t width) {
    return width % kVec == 0 ? 0 : round_up(width, kVec);
  }

  Scratch<const void*> rows;
  Scratch<const float*> padded_rows;
  Scratch<float> q;       // [kDecodeBlock, kDecodeMaxHeadSize], scaled
  Scratch<float> scores;  // [kDecodeBlock, kScoreStride]
  Scratch<float> output;  // [kDecodeBlock, kDecodeMaxHeadSize]
  Scratch<float> zeros;   // in any dtype
  Scratch<float> padded;  // [kDecodeChunk, head_size or value_size in whole vectors]
};

struct RowSum {
  float peak;
  float total;  // of e^(logit - peak); 0 where no key takes part
};

// Applies softcap, ALiBi and the mask to the scores of the keys that a query may look at.
static void finish_logits(const DecodeAttention& p, const Query& query, int64_t chunk_begin,
                          float* scores) {
  if (p.softcap != 0.0f || p.alibi_slopes) {
    const float slope = p.alibi_slopes ? p.alibi_slopes[query.head] : 0.0f;
    const Vec lanes = __builtin_convertvector(iota(), Vec);
    for (int64_t s = query.begin; s < query.end; s += kVec) {
      Vec x = load(scores + s);
      if (p.softcap != 0.0f) x = tanh(x / p.softcap) * p.softcap;
      const Vec distance = lanes + static_cast<float>(chunk_begin + s - query.position);
      store(scores + s, x - slope * max(distance, -distance));
    }
  }
  if (p.mask) {
    const uint8_t* mask = p.mask + query.row * p.mask_strides[0] + query.head * p.mask_strides[1] +
                          query.t * p.mask_strides[2] + chunk_begin * p.mask_strides[3];
    for (int64_t s = query.begin; s < query.end; ++s)
      if (!mask[s * p.mask_strides[3]]) scores[s] = -kInfinity;
  }
}

// Turns logits into weights relative to the largest; other scores of [begin, end) become 0.
static RowSum softmax(const Query& query, float* scores, int64_t begin, int64_t end) {
  // Vectors lie at multiples of kVec whatever the query's range, so that its total is the same sum
  // in any company.
  const int64_t first = query.begin / kVec * kVec;
  const int64_t last = std::max(first, round_up(query.end, kVec));
  for (int64_t s = first; s < query.begin; ++s) scores[s] = -kInfinity;
  for (int64_t s = query.end; s < last; ++s) scores[s] = -kInfinity;
  Vec peaks = broadcast(-kInfinity);
  for (int64_t s = first; s < last; s += kVec) peaks = max(load(scores + s), peaks);
  const float peak = reduce_max(peaks);
  // A row of -inf would give NaN: shift by 0 instead.
  const float shift = peak == -kInfinity ? 0.0f : peak;
  Vec totals{};
  for (int64_t s = first; s < last; s += kVec) {
    const Vec weight = exp(load(scores + s) - shift);
    store(scores + s, weight);
    totals += weight;
  }
  for (int64_t s = begin; s < first; ++s) scores[s] = 0.0f;
  for (int64_t s = last; s < end; ++s) scores[s] = 0.0f;
  return {peak, reduce_add(totals)};
}

static inline int64_t row_length(const DecodeAttention& p, int64_t row) {
  if (!p.lengths) return p.keys;
  return std::clamp<int64_t>(p.lengths[row / p.rows_per_length], 0, p.keys);
}

// What query `i` of a family and key head may look at in a chunk. Queries of the heads of a group
// and of a row are neighbours; with an ancestry they are those of one beam.
static Query make_query(const DecodeAttention& p, int64_t first_row, int64_t kv_head, int64_t i,
                        int64_t chunk_begin) {
  const int64_t group = p.heads / p.kv_heads;
  Query query{};
  query.t = i % p.queries;
  query.head = kv_head * group + i / p.queries % group;
  query.row = first_row + i / p.queries / group;
  const int64_t length = row_length(p, query.row);
  query.position = length - p.queries + query.t;
  const int64_t end = p.is_causal ? std::min(length, query.position + 1) : length;
  const int64_t begin = p.window < 0 ? 0 : query.position - p.window;
  query.begin = std::clamp<int64_t>(begin - chunk_begin, 0, kDecodeChunk);
  query.end = std::clamp<int64_t>(end - chunk_begin, query.begin, kDecodeChunk);
  return query;
}

// The cache row of a family's beam at a position.
static inline int64_t ancestor(const DecodeAttention& p, int64_t family, int64_t beam, int64_t s) {
  const int64_t at =
      family * p.ancestry_strides[0] + beam * p.ancestry_strides[1] + s * p.ancestry_strides[2];
  const int64_t parent = p.ancestry_is_wide ? static_cast<const int64_t*>(p.ancestry)[at]
                                            : static_cast<const int32_t*>(p.ancestry)[at];
  return family * p.beams + std::clamp<int64_t>(parent, 0, p.beams - 1);
}

// Copies rows that are no whole vectors, padded with zeros and in fp32.
template <typename T>
static Rows<float> pad_rows(const Rows<T>& rows, int64_t width, DecodeScratch& scratch) {
  const int64_t padded = round_up(width, kVec);
  const int64_t full = width / kVec * kVec;
  float* out = scratch.padded.data();
  for (int64_t s = 0; s < rows.count; ++s, out += padded) {
    for (int64_t i = 0; i < full; i += kVec) store(out + i, load(rows.rows[s] + i));
    store(out + full, load_partial(rows.rows[s] + full, width - full));
    scratch.padded_rows.data()[s] = out;
  }
  return {scratch.padded_rows.data(), rows.count, 0};
}

template <typename T>
static void score_rows(const Rows<T>& rows, int64_t queries, int64_t width, const float* q,
                       float* scores) {
  for_strips(queries, [&](int64_t i, auto count) {
    score_strip<decltype(count)::value>(rows, q + i * kDecodeMaxHeadSize, width,
                                        scores + i * kScoreStride);
  });
}

template <typename T>
static void sum_rows(const Rows<T>& rows, int64_t queries, int64_t width, const float* weights,
                     float* out) {
  for_strips(queries, [&](int64_t i, auto count) {
    value_strip<decltype(count)::value>(rows, weights + i * kScoreStride, width,
                                        out + i * kDecodeMaxHeadSize);
  });
}

// Points the values that no query of the block may look at to zeros: 0 * NaN would be NaN.
static void hide_values(const DecodeAttention& p, const Query* queries, int64_t count,
                        const float* scores, int64_t begin, int64_t end, const void** values,
                        const float* zeros) {
  for (int64_t s = begin; s < end; ++s) {
    bool visible = false;
    for (int64_t i = 0; i < count && !visible; ++i)
      visible =
          s >= queries[i].begin && s < queries[i].end && scores[i * kScoreStride + s] != -kInfinity;
    if (!visible) values[s - begin] = zeros;
  }
}

// Output of one query: the sum over its keys if there is one chunk, else the chunk's share.
template <typename T>
static void store_query(const DecodeAttention& p, int64_t index, int64_t chunk, RowSum sum,
                        const float* output) {
  const int64_t full = p.value_size / kVec * kVec;
  if (p.chunks > 1) {
    const int64_t slot = chunk * p.families * p.beams * p.heads * p.queries + index;
    p.peaks[slot] = sum.peak;
    p.totals[slot] = sum.total;
    if (sum.total == 0.0f) return;
    for (int64_t i = 0; i < p.value_size; i += kVec)
      store(p.partial + slot * p.partial_stride + i, load(output + i));
    return;
  }
  const bool empty = sum.total == 0.0f;
  const float factor = empty ? 0.0f : 1.0f / sum.total;
  T* to = static_cast<T*>(p.output) + index * p.value_size;
  for (int64_t i = 0; i < p.value_size; i += kVec) {
    const Vec x = empty ? Vec{} : load(output + i) * factor;
    if (i < full)
      store(to + i, x);
    else
      store_partial(to + i, x, p.value_size - i);
  }
  p.lse[index] = empty ? -kInfinity : sum.peak + std::log(sum.total);
}

// Queries [first, first + count) of the rows from `first_row` on, in one chunk.
template <typename T>
static void attend_block(const DecodeAttention& p, int64_t family, int64_t beam, int64_t first_row,
                         int64_t kv_head, int64_t first, int64_t count, int64_t chunk,
                         DecodeScratch& scratch) {
  const int64_t chunk_begin = chunk * kDecodeChunk;
  Query queries[kDecodeBlock];
  RowSum sums[kDecodeBlock] = {};
  int64_t begin = kDecodeChunk, end = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Query query = make_query(p, first_row, kv_head, first + i, chunk_begin);
    queries[i] = query;
    if (query.begin == query.end) continue;
    begin = std::min(begin, query.begin);
    end = std::max(end, query.end);
  }
  float* output = scratch.output.data();
  if (begin < end) {
    const T* k = static_cast<const T*>(p.k.data) + kv_head * p.k.stride_head;
    const T* v = static_cast<const T*>(p.v.data) + kv_head * p.v.stride_head;
    const void** pointers = scratch.rows.data();
    const int64_t keys = end - begin;
    for (int64_t s = 0; s < keys; ++s) {
      const int64_t position = chunk_begin + begin + s;
      const int64_t row = p.ancestry ? ancestor(p, family, beam, position) : family;
      pointers[s] = k + row * p.k.stride_row + position * p.k.stride_position;
      pointers[keys + s] = v + row * p.v.stride_row + position * p.v.stride_position;
    }
    float* q = scratch.q.data();
    bool ragged = p.mask != nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const Query& query = queries[i];
      ragged |= query.begin != begin || query.end != end;
      const T* from = static_cast<const T*>(p.q.data) + query.row * p.q.stride_row +
                      query.head * p.q.stride_head + query.t * p.q.stride_position;
      const int64_t full = p.head_size / kVec * kVec;
      float* to = q + i * kDecodeMaxHeadSize;
      for (int64_t j = 0; j < full; j += kVec) store(to + j, load(from + j) * p.scale);
      if (full < p.head_size)
        store(to + full, load_partial(from + full, p.head_size - full) * p.scale);
    }

    float* scores = scratch.scores.data();
    const auto ahead = [](int64_t width) {
      return std::clamp<int64_t>(
          kPrefetch / std::max<int64_t>(1, width * static_cast<int64_t>(sizeof(T))), 1, kMaxAhead);
    };
    const Rows<T> key_rows{reinterpret_cast<const T* const*>(pointers), keys, ahead(p.head_size)};
    if (p.head_size % kVec == 0)
      score_rows(key_rows, count, p.head_size, q, scores + begin);
    else
      score_rows(pad_rows(key_rows, p.head_size, scratch), count, round_up(p.head_size, kVec), q,
                 scores + begin);
    for (int64_t i = 0; i < count; ++i)
      finish_logits(p, queries[i], chunk_begin, scores + i * kScoreStride);
    if (ragged)
      hide_values(p, queries, count, scores, begin, end, pointers + keys, scratch.zeros.data());
    for (int64_t i = 0; i < count; ++i)
      sums[i] = softmax(queries[i], scores + i * kScoreStride, begin, end);
    const Rows<T> value_rows{key_rows.rows + keys, keys, ahead(p.value_size)};
    if (p.value_size % kVec == 0)
      sum_rows(value_rows, count, p.value_size, scores + begin, output);
    else
      sum_rows(pad_rows(value_rows, p.value_size, scratch), count, round_up(p.value_size, kVec),
               scores + begin, output);
  }
  for (int64_t i = 0; i < count; ++i)
    store_query<T>(p, queries[i].index(p), chunk, sums[i], output + i * kDecodeMaxHeadSize);
}

template <typename T>
static void run_tasks(const DecodeAttention& p, std::atomic<int64_t>& next) {
  DecodeScratch scratch(p);
  const int64_t tasks = decode_attention_task_count(p);
  const int64_t in_a_row = p.heads / p.kv_heads * p.queries;
  while (true) {
    const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks) return;
    const int64_t chunk = task % p.chunks;
    const int64_t block = task / p.chunks % p.blocks;
    const int64_t kv_head = task / p.chunks / p.blocks % p.kv_heads;
    const int64_t family = task / p.chunks / p.blocks / p.kv_heads;
    const int64_t first = block * kDecodeBlock;
    const int64_t first_row = family * p.beams;
    if (p.ancestry) {
      // One beam after the other: what they share is in the cache after the first.
      const int64_t count = std::min(kDecodeBlock, in_a_row - first);
      for (int64_t beam = 0; beam < p.beams; ++beam)
        attend_block<T>(p, family, beam, first_row + beam, kv_head, first, count, chunk, scratch);
    } else {
      const int64_t count = std::min(kDecodeBlock, p.beams * in_a_row - first);
      attend_block<T>(p, family, 0, first_row, kv_head, first, count, chunk, scratch);
    }
  }
}

void decode_attention_tasks(const DecodeAttention& p, std::atomic<int64_t>& next) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run_tasks<float>(p, next);
    case DType::kFloat16:
      return run_tasks<Half>(p, next);
    case DType::kBFloat16:
      return run_tasks<BFloat16>(p, next);
  }
}

// --- merge --------------------------------------------------------------------------------------

template <typename T>
static void merge_queries(const DecodeAttention& p, int64_t begin, int64_t end) {
  const int64_t all = p.families * p.beams * p.heads * p.queries;
  alignas(64) float output[kDecodeMaxHeadSize];
  DecodeAttention whole = p;
  whole.chunks = 1;
  for (int64_t index = begin; index < end; ++index) {
    RowSum sum{-kInfinity, 0.0f};
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      const int64_t slot = chunk * all + index;
      if (p.totals[slot] != 0.0f) sum.peak = std::max(sum.peak, p.peaks[slot]);
    }
    const float shift = sum.peak == -kInfinity ? 0.0f : sum.peak;
    for (int64_t i = 0; i < p.value_size; i += kVec) store(output + i, Vec{});
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      const int64_t slot = chunk * all + index;
      if (p.totals[slot] == 0.0f) continue;
      const float factor = std::exp(p.peaks[slot] - shift);
      sum.total += p.totals[slot] * factor;
      const float* from = p.partial + slot * p.partial_stride;
      for (int64_t i = 0; i < p.value_size; i += kVec)
        store(output + i, load(output + i) + load(from + i) * factor);
    }
    store_query<T>(whole, index, 0, sum, output);
  }
}

void decode_attention_merge(const DecodeAttention& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_queries<float>(p, begin, end);
    case DType::kFloat16:
      return merge_queries<Half>(p, begin, end);
    case DType::kBFloat16:
      return merge_queries<BFloat16>(p, begin, end);
  }
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
