// CPU kernel of attention, forward: raw pointers, no torch. Compiled once per instruction set.
//
// For each block of queries, tiles of keys: logits into a scratch tile, a step of the online
// softmax row by row, weights times values into the block's accumulator. The keys are packed once a
// key head, as panels of the transpose, so that a microkernel reads them in order; for few queries
// they are read where they lie, by all the heads that share them.
#pragma once

#include "attention/attention_tile.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

constexpr int kBlockRows = 48;
// With a mask, blocks are squares of it.
constexpr int kMostRows = kMaskStep;

// A row's online softmax: the largest logit so far, and the sum of exp(logit - peak).
struct RowState {
  float peak;
  float total;
};

static inline void zero(float* row, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; s += kVec) store(row + s, Vec{});
}

// Turns logits `span` of a tile into weights, relative to the row's largest logit so far. Returns
// what to multiply the row's accumulator by.
static inline float softmax_step(float* row, Span span, RowState& state) {
  const int64_t begin = round_down(span.begin, kVec);
  const int64_t end = round_up(span.end, kVec);
  Vec peaks[4] = {broadcast(-kInfinity), broadcast(-kInfinity), broadcast(-kInfinity),
                  broadcast(-kInfinity)};
  int64_t s = begin;
  for (; s + 4 * kVec <= end; s += 4 * kVec)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) peaks[j] = max(load(row + s + j * kVec), peaks[j]);
  for (; s < end; s += kVec) peaks[0] = max(load(row + s), peaks[0]);
  const float before = state.peak;
  const float peak =
      std::max(before, reduce_max(max(max(peaks[0], peaks[1]), max(peaks[2], peaks[3]))));
  // A row of -inf would give NaN: shift by 0 instead.
  const float shift = peak == -kInfinity ? 0.0f : peak;

  Vec totals[4] = {};
  s = begin;
  for (; s + 4 * kVec <= end; s += 4 * kVec)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec weight = exp2_flushed((load(row + s + j * kVec) - shift) * kLog2E);
      store(row + s + j * kVec, weight);
      totals[j] += weight;
    }
  for (; s < end; s += kVec) {
    const Vec weight = exp2_flushed((load(row + s) - shift) * kLog2E);
    store(row + s, weight);
    totals[0] += weight;
  }
  const float factor = before == peak ? 1.0f : std::exp(before - shift);
  state.total =
      state.total * factor + reduce_add((totals[0] + totals[1]) + (totals[2] + totals[3]));
  state.peak = peak;
  return factor;
}

// The same for weights that no sum divides; the state's total is 1 once some pair takes part.
template <Activation kActivation>
static inline void activate(float* row, Span span, RowState& state) {
  VecI seen{};
  const int64_t end = round_up(span.end, kVec);
  for (int64_t s = round_down(span.begin, kVec); s < end; s += kVec) {
    const Vec x = load(row + s);
    seen |= x != broadcast(-kInfinity);
    // NaN passes the second operand of max.
    store(row + s, kActivation == Activation::kSigmoid ? sigmoid(x) : max(Vec{}, x));
  }
  for (int lane = 0; lane < kVec; ++lane)
    if (seen[lane]) state.total = 1.0f;
}

// Memory of one thread.
struct ForwardScratch {
  explicit ForwardScratch(const AttentionInputs& in)
      : few(in.queries <= kFewQueries),
        rows(few                                   ? kFewQueries
             : in.mask.data || in.block_mask.tiles ? kMostRows
                                                   : kBlockRows),
        packed_keys(round_up(in.keys, kPanel) + kPanel),
        visible(in.keys),
        tiles(most_tiles(in.keys)),
        k(few ? 0 : packed_keys * in.head_size),
        v((few ? kBlockKeys : packed_keys) * round_up(in.value_size, kVec)),
        q(rows * kRowStride),
        scores(rows * kScoreStride),
        output(rows * kRowStride),
        kept(dropout_keep_capacity(in.keep_threshold ? kBlockKeys : 0)),
        philox(in.seed) {}

  const bool few;
  const int64_t rows;
  const int64_t packed_keys;
  Scratch<uint8_t> visible;
  Scratch<KeyTile> tiles;
  Scratch<float> k;       // panels of the transposed keys
  Scratch<float> v;       // where the values cannot be used as they are
  Scratch<float> q;       // [rows, D], scaled
  Scratch<float> scores;  // [rows, kBlockKeys]
  Scratch<float> output;  // [rows, Dv]
  Scratch<uint32_t> kept;
  const PhiloxKeys philox;
};

// Neighbouring queries of one head, or few of each of several heads that share a key head and its
// masks.
struct Block {
  int64_t begin;
  int64_t queries;
  int64_t heads;
};

// `k` are the panels, or null if the keys are to be read where they lie; they and `v` begin at the
// key `origin`.
template <typename T>
static void forward_block(const AttentionForward& p, const Head& first_head, const Block& block,
                          const float* k, FloatRows v, int64_t origin, ForwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  const int64_t D = in.head_size;
  const int64_t width = round_up(in.value_size, kVec);
  const int64_t rows = block.queries * block.heads;
  float* q = scratch.q.data();
  float* scores = scratch.scores.data();
  float* output = scratch.output.data();
  // Calls f(head, query, row) for all rows.
  const auto for_rows = [&](auto&& f) {
    Head head = first_head;
    for (int64_t i = 0; i < block.heads; ++i) {
      head.h = first_head.h + i;
      head.slope = slope_of(in, head.b, head.h);
      for (int64_t t = 0; t < block.queries; ++t) f(head, block.begin + t, i * block.queries + t);
    }
  };

  RowState state[kMostRows];
  for (int64_t r = 0; r < rows; ++r) state[r] = {-kInfinity, 0.0f};
  const KeyTile* tiles = scratch.tiles.data();
  const int64_t count =
      plan_tiles(in, first_head, block.begin, block.queries, kBlockKeys, scratch.tiles.data());
  if (count > 0)
    for (int64_t i = 0; i < block.heads; ++i) {
      Head head = first_head;
      head.h += i;
      copy_rows(queries_of<T>(in.q, head, block.begin), in.q.stride_row, block.queries, D, in.scale,
                q + i * block.queries * kRowStride, kRowStride, [](int64_t) { return true; });
    }
  else
    for (int64_t r = 0; r < rows; ++r) zero(output + r * kRowStride, 0, width);

  for (int64_t i = 0; i < count; ++i) {
    const KeyTile& tile = tiles[i];
    const int64_t s = tile.begin;
    const int64_t tile_keys = tile.end - s;
    // Keys of this tile that the queries of each strip may look at.
    Span strips[(kMostRows + kStrip - 1) / kStrip];
    for (int64_t r = 0; r < rows; r += kStrip)
      strips[r / kStrip] =
          relative(k ? span_of(in, first_head, block.begin + r,
                               block.begin + std::min<int64_t>(r + kStrip, rows))
                     : span_of(in, first_head, block.begin, block.begin + block.queries),
                   s, tile_keys);
    // Whether every query may look at every key, as far as lengths and the window say.
    const bool whole = span_of(in, first_head, block.begin).end >= tile.end &&
                       span_of(in, first_head, block.begin + block.queries - 1).begin <= s;
    // Whether products are logits.
    const bool plain = whole && tile_keys % kVec == 0 && !tile.masked && !tile.bits &&
                       !in.bias.data && !in.alibi_slopes && in.softcap == 0.0f;
    FloatRows values{v.data + (s - origin) * v.stride, v.stride};
    // A row or two take the values as they are.
    const bool weigh = !k && rows <= 2 && !first_head.visible && width == in.value_size;
    if (k) {
      panel_product(rows, tile_keys, D, q, k + (s - origin) * D, strips, scores);
    } else {
      const uint8_t* visible = first_head.visible ? first_head.visible + s : nullptr;
      dot_product(rows, q, keys_of<T>(in.k, first_head, s), in.k.stride_row, D, strips[0], visible,
                  scores);
      if (!weigh)
        values = as_float_rows(keys_of<T>(in.v, first_head, s), in.v.stride_row, tile_keys,
                               in.value_size, visible, scratch.v.data());
    }
    for_rows([&](const Head& head, int64_t t, int64_t r) {
      const Span strip = strips[r / kStrip];
      const Span span = whole ? Span{0, tile_keys} : relative(span_of(in, head, t), s, tile_keys);
      float* row = scores + r * kScoreStride;
      if (span.begin == span.end) {
        zero(row, round_down(strip.begin, kVec), strip.end);
        return;
      }
      if (!plain) finish_logits(in, head, tile, t, span, row, nullptr);
      float factor = 1.0f;
      if (in.activation == Activation::kSoftmax)
        factor = softmax_step(row, span, state[r]);
      else if (in.activation == Activation::kSigmoid)
        activate<Activation::kSigmoid>(row, span, state[r]);
      else
        activate<Activation::kRelu>(row, span, state[r]);
      const int64_t begin = round_down(span.begin, kVec);
      const int64_t end = round_up(span.end, kVec);
      if (in.keep_threshold) {
        const uint32_t* kept =
            kept_weights(in, scratch.philox, head, tile, t, begin, end, scratch.kept.data());
        for (int64_t j = begin; j < end; j += kVec)
          store(row + j, keep_or_zero(load(row + j), kept + j - begin));
      }
      if (!whole) {
        zero(row, round_down(strip.begin, kVec), begin);
        zero(row, end, strip.end);
      }
      if (i > 0 && factor != 1.0f)
        for (int64_t j = 0; j < width; j += kVec)
          store(output + r * kRowStride + j, load(output + r * kRowStride + j) * factor);
    });
    if (weigh) {
      const T* rows_of_v = keys_of<T>(in.v, first_head, s + strips[0].begin);
      for (int64_t r = 0; r < rows; ++r)
        weigh_rows(strips[0].end - strips[0].begin, width,
                   scores + r * kScoreStride + strips[0].begin, rows_of_v, in.v.stride_row,
                   output + r * kRowStride, i > 0);
      continue;
    }
    product<kScoreStride, false>(rows, width, scores, values.data, values.stride, output,
                                 kRowStride, i > 0, strips);
  }

  for_rows([&](const Head& head, int64_t t, int64_t r) {
    const bool empty = state[r].total == 0.0f;
    const bool divide = in.activation == Activation::kSoftmax;
    if (empty) zero(output + r * kRowStride, 0, width);
    store_row(queries_of<T>(p.output, head, t), output + r * kRowStride, in.value_size,
              empty    ? 0.0f
              : divide ? in.keep_scale / state[r].total
                       : in.keep_scale);
    p.lse[lse_offset(in, head, t)] = empty    ? -kInfinity
                                     : divide ? state[r].peak + std::log(state[r].total)
                                              : 0.0f;
  });
}

template <typename T>
static void clear_rows(const AttentionForward& p, const Head& head, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    std::fill_n(queries_of<T>(p.output, head, t), p.in.value_size, T{});
    p.lse[lse_offset(p.in, head, t)] = -kInfinity;
  }
}

// Heads [first, last) of the plan, which are neighbours: those that share a key head follow each
// other.
template <typename T>
static void forward_task(const AttentionForward& p, const AttentionTasks& tasks,
                         const AttentionTask& task, ForwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  // Whether what was found out and packed for one head serves the next.
  const bool shared = in.mask.stride_h == 0 && in.block_mask.stride_h == 0;
  Head head{};
  FloatRows v{};
  int64_t origin = 0;
  for (int64_t index = task.first_head; index < task.last_head;) {
    const bool same = index > task.first_head && shared && index % in.heads_per_key_head != 0;
    if (same) {
      ++head.h;
      head.slope = slope_of(in, head.b, head.h);
    } else {
      head = head_bounds(in, tasks, index, task.row_chunk, scratch.visible.data());
      origin = round_down(head.range.begin, kPanel);
    }
    Block block{head.rows.begin, 0, 1};
    const int64_t queries = head.rows.end - head.rows.begin;
    if (scratch.few) {
      if (shared && queries > 0)
        block.heads = std::min({in.heads_per_key_head - head.h % in.heads_per_key_head,
                                task.last_head - index, kFewQueries / queries});
      block.queries = queries;
      if (queries > 0) forward_block<T>(p, head, block, nullptr, v, origin, scratch);
    } else {
      const Span range = head.range;
      if (!same && range.begin < range.end) {
        const int64_t keys = range.end - origin;
        const uint8_t* visible = head.visible ? head.visible + origin : nullptr;
        pack_transposed(keys_of<T>(in.k, head, origin), in.k.stride_row, range.begin - origin, keys,
                        in.head_size, visible, scratch.k.data());
        v = as_float_rows(keys_of<T>(in.v, head, origin), in.v.stride_row, keys, in.value_size,
                          visible, scratch.v.data());
      }
      for (; block.begin < head.rows.end; block.begin += block.queries) {
        block.queries = block_rows(head, block.begin, kBlockRows);
        forward_block<T>(p, head, block, scratch.k.data(), v, origin, scratch);
      }
    }
    if (!in.is_packed && task.row_chunk == tasks.row_chunks - 1)
      for (int64_t i = 0; i < block.heads; ++i) {
        Head cleared = head;
        cleared.h += i;
        clear_rows<T>(p, cleared, head.rows.end, in.queries);
      }
    index += block.heads;
    head.h += block.heads - 1;
  }
}

template <typename T>
static void forward_tasks(const AttentionForward& p, AttentionTasks& tasks) {
  ForwardScratch scratch(p.in);
  while (const AttentionTask* task = tasks.take()) forward_task<T>(p, tasks, *task, scratch);
}

void attention_forward(const AttentionForward& p, AttentionTasks& tasks) {
  switch (p.in.dtype) {
    case DType::kFloat32:
      return forward_tasks<float>(p, tasks);
    case DType::kFloat16:
      return forward_tasks<Half>(p, tasks);
    case DType::kBFloat16:
      return forward_tasks<BFloat16>(p, tasks);
  }
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
