// CPU kernel of attention, forward: raw pointers, no torch. Compiled once per instruction set.
//
// For each block of queries, tiles of keys: logits into a scratch tile, a step of the online
// softmax row by row, weights times values into the block's accumulator. The keys are packed once a
// (batch, head), as panels of the transpose, so that a microkernel reads them in order.
#pragma once

#include "attention/attention_tile.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

constexpr int kBlockRows = 48;

// A row's online softmax: the largest logit so far, and the sum of exp(logit - peak).
struct RowState {
  float peak;
  float total;
};

// Turns logits [0, count) of a tile into weights, relative to the row's largest logit so far, and
// zeros as far as `width`. Returns what to multiply the row's accumulator by.
static inline float softmax_step(float* row, int64_t count, int64_t width, RowState& state) {
  const int64_t end = round_up(count, kVec);
  Vec peaks[4] = {broadcast(-kInfinity), broadcast(-kInfinity), broadcast(-kInfinity),
                  broadcast(-kInfinity)};
  int64_t s = 0;
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
  s = 0;
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
  for (s = end; s < width; s += kVec) store(row + s, Vec{});

  const float factor = before == peak ? 1.0f : std::exp(before - shift);
  state.total =
      state.total * factor + reduce_add((totals[0] + totals[1]) + (totals[2] + totals[3]));
  state.peak = peak;
  return factor;
}

// Memory of one thread.
struct ForwardScratch {
  explicit ForwardScratch(const AttentionInputs& in)
      : visible(in.keys),
        k(round_up(in.keys, kPanel) * in.head_size),
        v(in.keys * round_up(in.value_size, kVec)),
        q(kBlockRows * kRowStride),
        scores(kBlockRows * kScoreStride),
        output(kBlockRows * kRowStride) {}

  Scratch<uint8_t> visible;
  Scratch<float> k;       // panels of the transposed keys
  Scratch<float> v;       // where the values cannot be used as they are
  Scratch<float> q;       // [kBlockRows, D], scaled
  Scratch<float> scores;  // [kBlockRows, kBlockKeys]
  Scratch<float> output;  // [kBlockRows, Dv]
};

// Queries [begin, begin + rows) of a head.
template <typename T>
static void forward_block(const AttentionForward& p, const Head& head, int64_t begin, int64_t rows,
                          FloatRows v, ForwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  const int64_t D = in.head_size;
  const int64_t width = round_up(in.value_size, kVec);
  const int64_t keys = key_limit(in, head, begin + rows - 1);
  float* q = scratch.q.data();
  float* scores = scratch.scores.data();
  float* output = scratch.output.data();
  RowState state[kBlockRows];
  for (int64_t r = 0; r < rows; ++r) state[r] = {-kInfinity, 0.0f};

  copy_rows(head_of<T>(in.q, head.b, head.h) + begin * in.q.stride_row, in.q.stride_row, rows, D,
            in.scale, q, kRowStride, [](int64_t) { return true; });
  for (int64_t s = 0; s < keys; s += kBlockKeys) {
    const int64_t tile = std::min<int64_t>(kBlockKeys, keys - s);
    // Keys of this tile that the queries [first, last) of the block may look at.
    const auto limit = [&](int64_t, int64_t last) {
      return Span{0, std::clamp<int64_t>(key_limit(in, head, begin + last - 1) - s, 0, tile)};
    };
    for (int64_t j = 0; j < tile; j += kPanel) {
      const float* panel = scratch.k.data() + (s + j) * D;
      for (int64_t r = 0; r < rows; r += kStrip) {
        const int64_t strip = std::min<int64_t>(kStrip, rows - r);
        if (limit(r, r + strip).end <= j) continue;
        strip_product<2, kRowStride, false>(strip, D, q + r * kRowStride, panel, kPanel,
                                            scores + r * kScoreStride + j, kScoreStride, false);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t count = limit(r, r + 1).end;
      float* row = scores + r * kScoreStride;
      finish_logits(in, head, begin + r, s, count, row);
      const int64_t strip_end = std::min(rows, r / kStrip * kStrip + kStrip);
      const float factor = softmax_step(row, count, limit(r, strip_end).end, state[r]);
      if (s > 0 && factor != 1.0f)
        for (int64_t i = 0; i < width; i += kVec)
          store(output + r * kRowStride + i, load(output + r * kRowStride + i) * factor);
    }
    product<kScoreStride, false>(rows, width, scores, v.data + s * v.stride, v.stride, output,
                                 kRowStride, s > 0, limit);
  }

  const int64_t first = (head.b * in.heads + head.h) * in.queries + begin;
  T* out = static_cast<T*>(p.output) + first * in.value_size;
  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = state[r].total == 0.0f;
    if (empty)
      for (int64_t i = 0; i < width; i += kVec) store(output + r * kRowStride + i, Vec{});
    store_row(out + r * in.value_size, output + r * kRowStride, in.value_size,
              empty ? 0.0f : 1.0f / state[r].total);
    p.lse[first + r] = empty ? -kInfinity : state[r].peak + std::log(state[r].total);
  }
}

template <typename T>
static void forward_task(const AttentionForward& p, int64_t index, int64_t row_begin,
                         int64_t row_end, ForwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  const Head head = head_bounds(in, index, scratch.visible.data());
  const int64_t rows = std::clamp(head.rows, row_begin, row_end);
  FloatRows v{};
  if (rows > row_begin) {
    const int64_t keys = key_limit(in, head, rows - 1);
    pack_transposed(head_of<T>(in.k, head.b, head.h), in.k.stride_row, keys, in.head_size,
                    head.visible, scratch.k.data());
    v = as_float_rows(head_of<T>(in.v, head.b, head.h), in.v.stride_row, keys, in.value_size,
                      head.visible, scratch.v.data());
  }
  for (int64_t t = row_begin; t < rows; t += kBlockRows)
    forward_block<T>(p, head, t, std::min<int64_t>(kBlockRows, rows - t), v, scratch);
  const int64_t first = index * in.queries;
  std::fill_n(static_cast<T*>(p.output) + (first + rows) * in.value_size,
              (row_end - rows) * in.value_size, T{});
  std::fill(p.lse + first + rows, p.lse + first + row_end, -kInfinity);
}

template <typename T>
static void forward_tasks(const AttentionForward& p, AttentionTasks& tasks) {
  ForwardScratch scratch(p.in);
  while (const AttentionTask* task = tasks.take())
    for (int64_t i = task->first_head; i < task->last_head; ++i)
      forward_task<T>(p, tasks.heads[i], task->row_begin, task->row_end, scratch);
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
