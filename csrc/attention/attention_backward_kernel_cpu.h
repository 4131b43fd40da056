// CPU kernel of attention, backward: raw pointers, no torch. Compiled once per instruction set.
//
// For each block of queries, tiles of keys: the weights again from the logits and the lse, their
// gradient, and from both the shares of dv, dk and dq. One thread adds up what goes into one sum,
// in the order of the loops, so that the result is the same bits however many threads run.
#pragma once

#include "attention/attention_tile.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

constexpr int kBlockQueries = 96;
constexpr int kTileKeys = 128;

static_assert(kMaskStep <= kBlockQueries);

// Memory of one thread.
struct BackwardScratch {
  explicit BackwardScratch(const AttentionInputs& in)
      : few(in.queries <= kFewQueries),
        rows(few ? kFewQueries : kBlockQueries),
        packed_keys(round_up(in.keys, kPanel) + kPanel),
        visible(in.keys),
        tiles(most_tiles(in.keys)),
        k_panels(few ? 0 : packed_keys * in.head_size),
        v_panels(few ? 0 : packed_keys * in.value_size),
        k_rows(packed_keys * round_up(in.head_size, kVec)),
        q(rows * kRowStride),
        grad_output(rows * kRowStride),
        dq(rows * kRowStride),
        weights(rows * kScoreStride),
        dscores(rows * kScoreStride),
        derivative(in.softcap > 0.0f ? rows * kScoreStride : 0),
        kept(in.keep_threshold ? rows * kKeptStride : 0),
        philox(in.seed) {}

  static constexpr int64_t kKeptStride = kTileKeys + kBlockElements;

  const bool few;
  const int64_t rows;
  const int64_t packed_keys;
  Scratch<uint8_t> visible;
  Scratch<KeyTile> tiles;
  Scratch<float> k_panels;
  Scratch<float> v_panels;
  Scratch<float> k_rows;       // where the keys cannot be used as they are
  Scratch<float> q;            // [rows, D], scaled
  Scratch<float> grad_output;  // [rows, Dv], times the scale of dropout
  Scratch<float> dq;           // [rows, D]
  Scratch<float> weights;      // [rows, kTileKeys]
  Scratch<float> dscores;      // [rows, kTileKeys]
  Scratch<float> derivative;   // [rows, kTileKeys], of the soft-cap
  Scratch<uint32_t> kept;      // [rows, kTileKeys], by dropout
  const PhiloxKeys philox;
};

// Sum of products of two rows.
template <typename T>
static inline float dot(const float* a, const T* b, int64_t width) {
  const int64_t full = width / kVec * kVec;
  Vec sum{};
  for (int64_t i = 0; i < full; i += kVec) sum += load(a + i) * load(b + i);
  if (full < width) sum += load(a + full) * load_partial(b + full, width - full);
  return reduce_add(sum);
}

// Of one row and tile: from logits, in place the weights that multiply the values, and from the
// gradient of those that of the logits. Zeros outside of `span`.
template <Activation kActivation, bool kDropout>
static inline void gradient_row(float* weights, float* dscores, const uint32_t* kept, Span span,
                                int64_t width, float lse, float delta) {
  const int64_t begin = round_down(span.begin, kVec);
  const int64_t end = span.begin == span.end ? begin : round_up(span.end, kVec);
  for (int64_t s = 0; s < begin; s += kVec) {
    store(weights + s, Vec{});
    store(dscores + s, Vec{});
  }
  for (int64_t s = begin; s < end; s += kVec) {
    const Vec x = load(weights + s);
    Vec dweight = load(dscores + s);
    if constexpr (kDropout) dweight = keep_or_zero(dweight, kept + s);
    Vec weight;
    Vec dscore;
    if constexpr (kActivation == Activation::kSoftmax) {
      weight = exp2_flushed((x - lse) * kLog2E);
      dscore = weight * (dweight - delta);
    } else if constexpr (kActivation == Activation::kSigmoid) {
      weight = sigmoid(x);
      dscore = weight * (1.0f - weight) * dweight;
    } else {
      weight = max(Vec{}, x);
      dscore = select(x > Vec{}, dweight, Vec{});
    }
    if constexpr (kDropout) weight = keep_or_zero(weight, kept + s);
    store(weights + s, weight);
    store(dscores + s, dscore);
  }
  for (int64_t s = end; s < width; s += kVec) {
    store(weights + s, Vec{});
    store(dscores + s, Vec{});
  }
}

template <bool kDropout>
static inline void gradient_row(Activation activation, float* weights, float* dscores,
                                const uint32_t* kept, Span span, int64_t width, float lse,
                                float delta) {
  switch (activation) {
    case Activation::kSoftmax:
      return gradient_row<Activation::kSoftmax, kDropout>(weights, dscores, kept, span, width, lse,
                                                          delta);
    case Activation::kSigmoid:
      return gradient_row<Activation::kSigmoid, kDropout>(weights, dscores, kept, span, width, lse,
                                                          delta);
    case Activation::kRelu:
      return gradient_row<Activation::kRelu, kDropout>(weights, dscores, kept, span, width, lse,
                                                       delta);
  }
}

// Sum of weights times their gradients, from logits `span`; `kept` may be null.
static inline float delta_of_row(const float* logits, const float* dweights, const uint32_t* kept,
                                 Span span, float lse) {
  Vec sum{};
  if (span.begin == span.end) return 0.0f;
  for (int64_t s = round_down(span.begin, kVec); s < span.end; s += kVec) {
    const Vec weight = exp2_flushed((load(logits + s) - lse) * kLog2E);
    sum += weight * (kept ? keep_or_zero(load(dweights + s), kept + s) : load(dweights + s));
  }
  return reduce_add(sum);
}

static inline void add_to_bias(const AttentionBackward& p, const Head& head, int64_t chunk,
                               int64_t t, int64_t begin, int64_t count, const float* dscores) {
  float* out = p.dbias + chunk * p.dbias_chunk_stride +
               pair_offset(p.dbias_strides, head.b, head.h, t, begin);
  int64_t s = 0;
  if (p.dbias_strides.stride_s == 0) {
    Vec sum{};
    for (; s + kVec <= count; s += kVec) sum += load(dscores + s);
    float total = reduce_add(sum);
    for (; s < count; ++s) total += dscores[s];
    *out += total;
    return;
  }
  for (; s + kVec <= count; s += kVec) store(out + s, load(out + s) + load(dscores + s));
  for (; s < count; ++s) out[s] += dscores[s];
}

// Where rows of one chunk and key head are added up.
struct SumRows {
  float* data;
  int64_t stride;

  float* row(int64_t s) const { return data + s * stride; }
};

static inline SumRows sums_of(const AttentionBackward& p, const ChunkSums& sums,
                              const OutputRows& result, int64_t chunk, int64_t b, int64_t key_head,
                              int64_t first) {
  if (p.first_in_result && chunk == 0)
    return {static_cast<float*>(result.data) + b * result.stride_b + key_head * result.stride_h +
                first * result.stride_row,
            result.stride_row};
  return {sums.data + (chunk - p.first_in_result) * sums.stride_chunk + b * sums.stride_b +
              key_head * sums.stride_h + first * sums.stride_row,
          sums.stride_row};
}

static inline void clear_rows(const SumRows& sums, Span rows, int64_t width) {
  for (int64_t s = rows.begin; s < rows.end; ++s) std::fill_n(sums.row(s), width, 0.0f);
}

// Queries [begin, begin + rows) of a head. `k` and the panels begin at the key `origin`.
template <typename T>
static void backward_block(const AttentionBackward& p, const Head& head, int64_t chunk,
                           int64_t begin, int64_t rows, FloatRows k, int64_t origin,
                           const SumRows& dk, const SumRows& dv, BackwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  const int64_t D = in.head_size;
  const int64_t Dv = in.value_size;
  const float* lse = p.lse + lse_offset(in, head, begin);
  float* q = scratch.q.data();
  float* grad_output = scratch.grad_output.data();
  float* dq = scratch.dq.data();
  float* weights = scratch.weights.data();
  float* dscores = scratch.dscores.data();
  const KeyTile* tiles = scratch.tiles.data();
  const int64_t count = plan_tiles(in, head, begin, rows, kTileKeys, scratch.tiles.data());
  if (count == 0) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(queries_of<T>(p.dq, head, begin + r), D, T{});
    return;
  }

  // A query that looks at nothing takes part as zeros, whatever it holds.
  const auto active = [&](int64_t r) { return lse[r] != -kInfinity; };
  copy_rows(queries_of<T>(in.q, head, begin), in.q.stride_row, rows, D, in.scale, q, kRowStride,
            active);
  // Dropout's scale belongs to the weights, and so to both products of them with grad_output.
  copy_rows(queries_of<T>(p.grad_output, head, begin), p.grad_output.stride_row, rows, Dv,
            in.keep_scale, grad_output, kRowStride, active);
  // Keys of a tile that query r, and that the queries of its strip, may look at.
  Span spans[kBlockQueries];
  Span strips[(kBlockQueries + kStrip - 1) / kStrip];
  const auto kept_of = [&](int64_t r) {
    return in.keep_threshold ? scratch.kept.data() + r * BackwardScratch::kKeptStride : nullptr;
  };
  // Logits, and gradients of the weights, of a tile.
  const auto fill_tile = [&](const KeyTile& tile) {
    const int64_t s = tile.begin;
    const int64_t width = tile.end - s;
    for (int64_t r = 0; r < rows; ++r)
      spans[r] = active(r) ? relative(span_of(in, head, begin + r), s, width) : Span{0, 0};
    for (int64_t r = 0; r < rows; r += kStrip)
      strips[r / kStrip] = relative(
          span_of(in, head, begin + r, begin + std::min<int64_t>(r + kStrip, rows)), s, width);
    if (scratch.few) {
      const Span span = relative(span_of(in, head, begin, begin + rows), s, width);
      const uint8_t* visible = head.visible ? head.visible + s : nullptr;
      dot_product(rows, q, keys_of<T>(in.k, head, s), in.k.stride_row, D, span, visible, weights);
      dot_product(rows, grad_output, keys_of<T>(in.v, head, s), in.v.stride_row, Dv, span, visible,
                  dscores);
    } else {
      const int64_t j = s - origin;
      panel_product(rows, width, D, q, scratch.k_panels.data() + j * D, strips, weights);
      panel_product(rows, width, Dv, grad_output, scratch.v_panels.data() + j * Dv, strips,
                    dscores);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Span span = spans[r];
      float* derivative =
          in.softcap > 0.0f ? scratch.derivative.data() + r * kScoreStride : nullptr;
      if (span.begin == span.end) continue;
      finish_logits(in, head, tile, begin + r, span, weights + r * kScoreStride, derivative);
      if (in.keep_threshold) {
        const int64_t first = round_down(span.begin, kVec);
        kept_weights(in, scratch.philox, head, tile, begin + r, first, round_up(span.end, kVec),
                     kept_of(r) + first);
      }
    }
  };

  // The output times its gradient is the sum over keys of weight times gradient. An output that
  // was rounded to 16 bits would give that sum an error far above the gradients' own where they
  // nearly cancel, so there the sum itself is taken; also of a single tile with dropout, whose
  // scale multiplies what does not cancel, since it costs no product there.
  constexpr bool kRounded = !std::is_same_v<T, float>;
  const bool divided = in.activation == Activation::kSoftmax;
  const bool is_summed = divided && (kRounded || (in.keep_threshold && count == 1));
  float delta[kBlockQueries] = {};
  if (divided) {
    if (is_summed) {
      for (int64_t i = 0; i < count; ++i) {
        fill_tile(tiles[i]);
        for (int64_t r = 0; r < rows; ++r)
          delta[r] += delta_of_row(weights + r * kScoreStride, dscores + r * kScoreStride,
                                   kept_of(r), spans[r], lse[r]);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r)
        delta[r] = dot(grad_output + r * kRowStride, queries_of<T>(p.output, head, begin + r), Dv) /
                   in.keep_scale;
    }
    if (p.grad_lse) {
      const float* grad_lse = p.grad_lse + lse_offset(in, head, begin);
      for (int64_t r = 0; r < rows; ++r)
        if (active(r)) delta[r] -= grad_lse[r];
    }
  }

  for (int64_t i = 0; i < count; ++i) {
    const KeyTile& tile = tiles[i];
    const int64_t s = tile.begin;
    const int64_t width = tile.end - s;
    // A single tile that was summed is still there.
    if (!is_summed || count > 1) fill_tile(tile);
    for (int64_t r = 0; r < rows; ++r) {
      const Span span = spans[r];
      float* row = weights + r * kScoreStride;
      float* drow = dscores + r * kScoreStride;
      if (in.keep_threshold)
        gradient_row<true>(in.activation, row, drow, kept_of(r), span, width, lse[r], delta[r]);
      else
        gradient_row<false>(in.activation, row, drow, nullptr, span, width, lse[r], delta[r]);
      if (p.dbias)
        add_to_bias(p, head, chunk, begin + r, s + span.begin, span.end - span.begin,
                    drow + span.begin);
      if (in.softcap > 0.0f && span.begin < span.end) {
        const float* derivative = scratch.derivative.data() + r * kScoreStride;
        for (int64_t j = round_down(span.begin, kVec); j < span.end; j += kVec)
          store(drow + j, load(drow + j) * load(derivative + j));
      }
    }
    // Queries that may look at the keys of each strip of keys: t + diagonal is between key - right
    // and key + left.
    Span columns[(kTileKeys + kStrip - 1) / kStrip];
    for (int64_t first = 0; first < width; first += kStrip) {
      const int64_t last = std::min<int64_t>(first + kStrip, width);
      const int64_t t = s - head.diagonal - begin;
      const int64_t from = std::clamp<int64_t>(t + first - in.right, 0, rows);
      columns[first / kStrip] = {from, std::clamp<int64_t>(t + last + in.left, from, rows)};
    }
    product<kScoreStride, true>(width, round_up(Dv, kVec), weights, grad_output, kRowStride,
                                dv.row(s), dv.stride, true, columns);
    product<kScoreStride, true>(width, round_up(D, kVec), dscores, q, kRowStride, dk.row(s),
                                dk.stride, true, columns);
    product<kScoreStride, false>(rows, round_up(D, kVec), dscores, k.data + (s - origin) * k.stride,
                                 k.stride, dq, kRowStride, i > 0, strips);
  }
  for (int64_t r = 0; r < rows; ++r)
    store_row(queries_of<T>(p.dq, head, begin + r), dq + r * kRowStride, D, in.scale);
}

template <typename T>
static void backward_head(const AttentionBackward& p, const AttentionTasks& tasks, int64_t index,
                          bool is_first, const AttentionTask& task, BackwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  const Head head = head_bounds(in, tasks, index, task.row_chunk, scratch.visible.data());
  const Sequence& sequence = in.sequences[head.b];
  const SumRows dk =
      sums_of(p, p.dk, p.dk_out, task.sum_chunk, head.b, head.key_head, head.key_begin);
  const SumRows dv =
      sums_of(p, p.dv, p.dv_out, task.sum_chunk, head.b, head.key_head, head.key_begin);
  if (is_first) {
    // `attention_finish` reads what a chunk's rows may look at as far as the window says.
    Span rows = keys_of_rows(in, sequence, head.rows);
    if (p.first_in_result && task.sum_chunk == 0)
      rows = {0, in.is_packed ? sequence.keys : in.keys};
    clear_rows(dk, rows, round_up(in.head_size, kVec));
    clear_rows(dv, rows, round_up(in.value_size, kVec));
  }
  const Span range = head.range;
  const int64_t origin = round_down(range.begin, kPanel);
  FloatRows k{};
  if (range.begin < range.end) {
    const int64_t keys = range.end - origin;
    const int64_t first = range.begin - origin;
    const uint8_t* visible = head.visible ? head.visible + origin : nullptr;
    const T* key_rows = keys_of<T>(in.k, head, origin);
    if (!scratch.few) {
      pack_transposed(key_rows, in.k.stride_row, first, keys, in.head_size, visible,
                      scratch.k_panels.data());
      pack_transposed(keys_of<T>(in.v, head, origin), in.v.stride_row, first, keys, in.value_size,
                      visible, scratch.v_panels.data());
    }
    k = as_float_rows(key_rows, in.k.stride_row, keys, in.head_size, visible,
                      scratch.k_rows.data());
  }
  for (int64_t t = head.rows.begin; t < head.rows.end;) {
    const int64_t rows = block_rows(head, t, kBlockQueries);
    backward_block<T>(p, head, task.sum_chunk, t, rows, k, origin, dk, dv, scratch);
    t += rows;
  }
  if (!in.is_packed && task.row_chunk == tasks.row_chunks - 1)
    for (int64_t t = head.rows.end; t < in.queries; ++t)
      std::fill_n(queries_of<T>(p.dq, head, t), in.head_size, T{});
}

template <typename T>
static void backward_tasks(const AttentionBackward& p, AttentionTasks& tasks) {
  BackwardScratch scratch(p.in);
  while (const AttentionTask* task = tasks.take())
    for (int64_t i = task->first_head; i < task->last_head; ++i) {
      const int64_t index = tasks.heads ? tasks.heads[i] : i;
      const bool is_first = i == task->first_head || index % p.in.heads_per_key_head == 0;
      backward_head<T>(p, tasks, index, is_first, *task, scratch);
    }
}

// Rows [0, rows) of one gradient and key head: the chunks that have a share, in their order.
template <typename T>
static void finish_rows(const AttentionBackward& p, const ChunkSums& sums, const OutputRows& result,
                        int64_t b, int64_t key_head, int64_t first, int64_t rows, int64_t width,
                        const Span* ranges, int64_t chunks) {
  T* out = static_cast<T*>(result.data) + b * result.stride_b + key_head * result.stride_h +
           first * result.stride_row;
  SumRows chunk_rows[kMostChunks];
  for (int64_t c = 0; c < chunks; ++c)
    chunk_rows[c] = sums_of(p, sums, result, c, b, key_head, first);
  const int64_t padded = round_up(width, kVec);
  float buffer[kMaxHeadSize];
  for (int64_t s = 0; s < rows; ++s) {
    float* total = p.first_in_result ? chunk_rows[0].row(s) : buffer;
    if (!p.first_in_result) std::fill_n(total, padded, 0.0f);
    for (int64_t c = p.first_in_result; c < chunks; ++c) {
      if (s < ranges[c].begin || s >= ranges[c].end) continue;
      const float* share = chunk_rows[c].row(s);
      for (int64_t i = 0; i < padded; i += kVec)
        store(total + i, load(total + i) + load(share + i));
    }
    if (!p.first_in_result) store_row(out + s * result.stride_row, total, width, 1.0f);
  }
}

template <typename T>
static void finish_heads(const AttentionBackward& p, const AttentionTasks& tasks,
                         int64_t head_chunks, int64_t begin, int64_t end) {
  const AttentionInputs& in = p.in;
  const int64_t key_heads = in.heads / in.heads_per_key_head;
  const int64_t chunks = head_chunks * tasks.row_chunks;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / key_heads;
    const Sequence& sequence = in.sequences[b];
    Span ranges[kMostChunks];
    for (int64_t c = 0; c < chunks; ++c)
      ranges[c] =
          keys_of_rows(in, sequence, rows_of_chunk(in, tasks, sequence, c % tasks.row_chunks));
    const int64_t rows = in.is_packed ? sequence.keys : in.keys;
    finish_rows<T>(p, p.dk, p.dk_out, b, i % key_heads, sequence.key_begin, rows, in.head_size,
                   ranges, chunks);
    finish_rows<T>(p, p.dv, p.dv_out, b, i % key_heads, sequence.key_begin, rows, in.value_size,
                   ranges, chunks);
  }
}

void attention_finish(const AttentionBackward& p, const AttentionTasks& tasks, int64_t head_chunks,
                      int64_t begin, int64_t end) {
  switch (p.in.dtype) {
    case DType::kFloat32:
      return finish_heads<float>(p, tasks, head_chunks, begin, end);
    case DType::kFloat16:
      return finish_heads<Half>(p, tasks, head_chunks, begin, end);
    case DType::kBFloat16:
      return finish_heads<BFloat16>(p, tasks, head_chunks, begin, end);
  }
}

void attention_backward(const AttentionBackward& p, AttentionTasks& tasks) {
  switch (p.in.dtype) {
    case DType::kFloat32:
      return backward_tasks<float>(p, tasks);
    case DType::kFloat16:
      return backward_tasks<Half>(p, tasks);
    case DType::kBFloat16:
      return backward_tasks<BFloat16>(p, tasks);
  }
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
