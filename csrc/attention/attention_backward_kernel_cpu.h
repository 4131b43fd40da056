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

// Memory of one thread.
struct BackwardScratch {
  explicit BackwardScratch(const AttentionInputs& in)
      : visible(in.keys),
        k_panels(round_up(in.keys, kPanel) * in.head_size),
        v_panels(round_up(in.keys, kPanel) * in.value_size),
        k_rows(in.keys * round_up(in.head_size, kVec)),
        q(kBlockQueries * kRowStride),
        grad_output(kBlockQueries * kRowStride),
        dq(kBlockQueries * kRowStride),
        weights(kBlockQueries * kScoreStride),
        dscores(kBlockQueries * kScoreStride) {}

  Scratch<uint8_t> visible;
  Scratch<float> k_panels;
  Scratch<float> v_panels;
  Scratch<float> k_rows;       // where the keys cannot be used as they are
  Scratch<float> q;            // [kBlockQueries, D], scaled
  Scratch<float> grad_output;  // [kBlockQueries, Dv]
  Scratch<float> dq;           // [kBlockQueries, D]
  Scratch<float> weights;      // [kBlockQueries, kTileKeys]
  Scratch<float> dscores;      // [kBlockQueries, kTileKeys]
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

// From logits [0, count) and the gradient of the weights, in place: the weights and the gradient of
// the logits. Zeros as far as `width`.
static inline void gradient_row(float* weights, float* dscores, int64_t count, int64_t width,
                                float lse, float delta) {
  int64_t s = 0;
  for (; s < count; s += kVec) {
    const Vec weight = exp2_flushed((load(weights + s) - lse) * kLog2E);
    store(weights + s, weight);
    store(dscores + s, weight * (load(dscores + s) - delta));
  }
  for (; s < width; s += kVec) {
    store(weights + s, Vec{});
    store(dscores + s, Vec{});
  }
}

// Sum of weights times their gradients, from logits [0, count).
static inline float delta_of_row(const float* logits, const float* dweights, int64_t count,
                                 float lse) {
  Vec sum{};
  for (int64_t s = 0; s < count; s += kVec)
    sum += exp2_flushed((load(logits + s) - lse) * kLog2E) * load(dweights + s);
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

// Queries [begin, begin + rows) of a head; dk and dv are the head's.
template <typename T>
static void backward_block(const AttentionBackward& p, const Head& head, int64_t chunk,
                           int64_t begin, int64_t rows, FloatRows k, float* dk, float* dv,
                           BackwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  const int64_t D = in.head_size;
  const int64_t Dv = in.value_size;
  const int64_t keys = key_limit(in, head, begin + rows - 1);
  const int64_t first = (head.b * in.heads + head.h) * in.queries + begin;
  const float* lse = p.lse + first;
  float* q = scratch.q.data();
  float* grad_output = scratch.grad_output.data();
  float* dq = scratch.dq.data();
  float* weights = scratch.weights.data();
  float* dscores = scratch.dscores.data();

  // A query that looks at nothing takes part as zeros, whatever it holds.
  const auto active = [&](int64_t r) { return lse[r] != -kInfinity; };
  copy_rows(head_of<T>(in.q, head.b, head.h) + begin * in.q.stride_row, in.q.stride_row, rows, D,
            in.scale, q, kRowStride, active);
  copy_rows(head_of<T>(p.grad_output, head.b, head.h) + begin * p.grad_output.stride_row,
            p.grad_output.stride_row, rows, Dv, 1.0f, grad_output, kRowStride, active);
  // Logits, and gradients of the weights, of the keys [s, s + tile).
  const auto limit = [&](int64_t last, int64_t s, int64_t tile) {
    return std::clamp<int64_t>(key_limit(in, head, begin + last) - s, 0, tile);
  };
  const auto count_of = [&](int64_t r, int64_t s, int64_t tile) {
    return active(r) ? limit(r, s, tile) : 0;
  };
  const auto fill_tile = [&](int64_t s, int64_t tile) {
    const auto multiply = [&](const float* a, const float* panel, int64_t depth, float* c,
                              int64_t j) {
      for (int64_t r = 0; r < rows; r += kStrip) {
        const int64_t strip = std::min<int64_t>(kStrip, rows - r);
        if (limit(r + strip - 1, s, tile) <= j) continue;
        strip_product<2, kRowStride, false>(strip, depth, a + r * kRowStride, panel, kPanel,
                                            c + r * kScoreStride + j, kScoreStride, false);
      }
    };
    for (int64_t j = 0; j < tile; j += kPanel) {
      multiply(q, scratch.k_panels.data() + (s + j) * D, D, weights, j);
      multiply(grad_output, scratch.v_panels.data() + (s + j) * Dv, Dv, dscores, j);
    }
    for (int64_t r = 0; r < rows; ++r)
      finish_logits(in, head, begin + r, s, count_of(r, s, tile), weights + r * kScoreStride);
  };

  // The output times its gradient is the sum over keys of weight times gradient. An output that
  // was rounded to 16 bits would give that sum an error far above the gradients' own where they
  // nearly cancel, so there the sum itself is taken.
  constexpr bool kRounded = !std::is_same_v<T, float>;
  float delta[kBlockQueries];
  for (int64_t r = 0; r < rows; ++r)
    delta[r] = kRounded ? 0.0f
                        : dot(grad_output + r * kRowStride,
                              static_cast<const T*>(p.output) + (first + r) * Dv, Dv);
  if constexpr (kRounded) {
    for (int64_t s = 0; s < keys; s += kTileKeys) {
      const int64_t tile = std::min<int64_t>(kTileKeys, keys - s);
      fill_tile(s, tile);
      for (int64_t r = 0; r < rows; ++r)
        delta[r] += delta_of_row(weights + r * kScoreStride, dscores + r * kScoreStride,
                                 count_of(r, s, tile), lse[r]);
    }
  }

  for (int64_t s = 0; s < keys; s += kTileKeys) {
    const int64_t tile = std::min<int64_t>(kTileKeys, keys - s);
    // A single tile of 16-bit inputs is still there.
    if (!kRounded || keys > kTileKeys) fill_tile(s, tile);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t count = count_of(r, s, tile);
      float* drow = dscores + r * kScoreStride;
      gradient_row(weights + r * kScoreStride, drow, count, tile, lse[r], delta[r]);
      if (p.dbias) add_to_bias(p, head, chunk, begin + r, s, count, drow);
    }
    // Keys of this tile that the queries [.., last) of the block may look at, and queries that
    // may look at the keys from `first_key` on.
    const auto keys_of = [&](int64_t, int64_t last) { return Span{0, limit(last - 1, s, tile)}; };
    const auto queries_of = [&](int64_t first_key, int64_t) {
      return Span{in.is_causal ? std::clamp<int64_t>(s + first_key - begin, 0, rows) : 0, rows};
    };
    product<kScoreStride, true>(tile, round_up(Dv, kVec), weights, grad_output, kRowStride,
                                dv + s * p.dv_stride, p.dv_stride, true, queries_of);
    product<kScoreStride, true>(tile, round_up(D, kVec), dscores, q, kRowStride,
                                dk + s * p.dk_stride, p.dk_stride, true, queries_of);
    product<kScoreStride, false>(rows, round_up(D, kVec), dscores, k.data + s * k.stride, k.stride,
                                 dq, kRowStride, s > 0, keys_of);
  }
  T* out = static_cast<T*>(p.dq) + first * D;
  if (keys == 0) {
    std::memset(out, 0, sizeof(T) * static_cast<size_t>(rows * D));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) store_row(out + r * D, dq + r * kRowStride, D, in.scale);
}

template <typename T>
static void backward_head(const AttentionBackward& p, int64_t index, const AttentionTask& task,
                          BackwardScratch& scratch) {
  const AttentionInputs& in = p.in;
  const Head head = head_bounds(in, index, scratch.visible.data());
  const int64_t rows = std::clamp(head.rows, task.row_begin, task.row_end);
  const int64_t slice = (task.chunk * p.chunk_heads + index) * in.keys;
  float* dk = p.dk + slice * p.dk_stride;
  float* dv = p.dv + slice * p.dv_stride;
  std::fill(dk, dk + in.keys * p.dk_stride, 0.0f);
  std::fill(dv, dv + in.keys * p.dv_stride, 0.0f);
  FloatRows k{};
  if (rows > task.row_begin) {
    const int64_t keys = key_limit(in, head, rows - 1);
    const T* k_ptr = head_of<T>(in.k, head.b, head.h);
    pack_transposed(k_ptr, in.k.stride_row, keys, in.head_size, head.visible,
                    scratch.k_panels.data());
    pack_transposed(head_of<T>(in.v, head.b, head.h), in.v.stride_row, keys, in.value_size,
                    head.visible, scratch.v_panels.data());
    k = as_float_rows(k_ptr, in.k.stride_row, keys, in.head_size, head.visible,
                      scratch.k_rows.data());
  }
  for (int64_t t = task.row_begin; t < rows; t += kBlockQueries)
    backward_block<T>(p, head, task.chunk, t, std::min<int64_t>(kBlockQueries, rows - t), k, dk, dv,
                      scratch);
  std::fill_n(static_cast<T*>(p.dq) + (index * in.queries + rows) * in.head_size,
              (task.row_end - rows) * in.head_size, T{});
}

template <typename T>
static void backward_tasks(const AttentionBackward& p, AttentionTasks& tasks) {
  BackwardScratch scratch(p.in);
  while (const AttentionTask* task = tasks.take())
    for (int64_t i = task->first_head; i < task->last_head; ++i)
      backward_head<T>(p, tasks.heads[i], *task, scratch);
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
