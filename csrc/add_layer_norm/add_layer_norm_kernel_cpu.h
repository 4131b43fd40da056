// CPU kernels of add_layer_norm: raw pointers, no torch. Compiled once per instruction set.
//
// A row is read from memory once: its sum stays in the L1 cache, in fp32, for the passes that
// follow. Rows that are longer than the cache read the sum from L2.
#pragma once

#include "add_layer_norm/add_layer_norm.h"
#include "common/rows.h"
#include "common/scratch.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

// One row of T or of fp32. Which of them is asked at each vector: the processor foresees the
// answer, and one kernel serves every mixture of dtypes.
template <typename T>
class MixedRow {
 public:
  MixedRow() = default;
  MixedRow(const StridedRows& rows, bool is_fp32, int64_t r)
      : is_fp32_(is_fp32),
        data_(!rows.data ? nullptr
              : is_fp32  ? static_cast<const void*>(row_of<float>(rows, r))
                         : static_cast<const void*>(row_of<T>(rows, r))) {}
  // Row r of a contiguous tensor that is written.
  MixedRow(void* tensor, bool is_fp32, int64_t width, int64_t r)
      : MixedRow(StridedRows{tensor, std::numeric_limits<int64_t>::max(), 0, width}, is_fp32, r) {}

  explicit operator bool() const { return data_ != nullptr; }

  template <typename Lanes>
  FUSED_ATTN_INLINE Vec load(int64_t i, Lanes lanes) const {
    return is_fp32() ? load_lanes(static_cast<const float*>(data_) + i, lanes)
                     : load_lanes(static_cast<const T*>(data_) + i, lanes);
  }

  template <typename Lanes>
  FUSED_ATTN_INLINE void store(int64_t i, Vec v, Lanes lanes) const {
    void* data = const_cast<void*>(data_);
    if (is_fp32())
      store_lanes(static_cast<float*>(data) + i, v, lanes);
    else
      store_lanes(static_cast<T*>(data) + i, v, lanes);
  }

  FUSED_ATTN_INLINE void prefetch_columns(int64_t i) const {
    if (is_fp32())
      prefetch(static_cast<const float*>(data_), i);
    else
      prefetch(static_cast<const T*>(data_), i);
  }

 private:
  FUSED_ATTN_INLINE bool is_fp32() const { return std::is_same_v<T, float> || is_fp32_; }

  bool is_fp32_ = false;
  const void* data_ = nullptr;
};

// --- forward --------------------------------------------------------------------------------

template <typename T, bool kHasDropout, bool kIsRms>
static void add_layer_norm_forward_rows(const AddLayerNormForward& parameters, int64_t begin,
                                        int64_t end) {
  const AddLayerNormForward p = parameters;  // a copy, which no store can have changed
  const int64_t width = p.width;
  const float inverse_width = 1.0f / static_cast<float>(width);
  const Vec scale = broadcast(p.keep_scale);
  Scratch<float> row(padded(width));
  Scratch<uint32_t> random(kHasDropout ? dropout_keep_capacity(width) : 0);
  const PhiloxKeys keys(p.seed);
  float* sum = row.data();

  for (int64_t r = begin; r < end; ++r) {
    const T* x = row_of<T>(p.x, r);
    const MixedRow<T> residual(p.residual, p.residual_is_fp32, r);
    const uint32_t* keep = nullptr;
    if constexpr (kHasDropout)
      keep = dropout_keep(keys, p.keep_threshold, r * width, width, random.data());
    T* output = static_cast<T*>(p.output) + r * width;
    const MixedRow<T> sum_out(p.sum, p.sum_is_fp32, width, r);
    const auto make_sum = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      Vec s = load_lanes(x + i, lanes);
      if (p.x_bias) [[unlikely]]
        s += load_lanes(p.x_bias + i, lanes);
      s = drop<kHasDropout>(s, keep, i, scale);
      if (residual) [[likely]]
        s += residual.load(i, lanes);
      if (sum_out) [[unlikely]] {
        // What is normalised is the sum that the caller sees, and that the backward reads.
        sum_out.store(i, s, lanes);
        s = sum_out.load(i, lanes);
      }
      return s;
    };

    // Deviations from an estimate of the mean, which are small where the mean is large: their sums
    // give what the estimate lacks, and the variance. The first estimate is the mean of the first
    // few elements, so that one pass does. RMSNorm takes 0, and no mean.
    const int64_t first = std::min<int64_t>(width, kVec);
    float estimate = 0.0f;
    if constexpr (!kIsRms)
      estimate = reduce_add(first == kVec ? make_sum(0, FullVec{}) : make_sum(0, first)) /
                 static_cast<float>(first);
    Vec deviations[kSlots] = {};
    Vec squares[kSlots] = {};
    for_vectors(width, [&](int64_t i, auto lanes, int slot) {
      if (slot == 0 && !p.stream_output) prefetch_to_write(output, i);
      const Vec s = make_sum(i, lanes);
      store(sum + i, s);
      const Vec d = zero_beyond(s - estimate, lanes);
      if constexpr (!kIsRms) deviations[slot] += d;
      squares[slot] += d * d;
    });
    float correction = total_of(deviations) * inverse_width;
    float variance = total_of(squares) * inverse_width - correction * correction;
    if (!kIsRms && correction * correction > variance) [[unlikely]] {
      // Those few are unlike the rest, and the difference of two large numbers says little.
      estimate += correction;
      std::fill_n(deviations, kSlots, Vec{});
      std::fill_n(squares, kSlots, Vec{});
      for_vectors(width, [&](int64_t i, auto lanes, int slot) {
        const Vec d = zero_beyond(load(sum + i) - estimate, lanes);
        deviations[slot] += d;
        squares[slot] += d * d;
      });
      correction = total_of(deviations) * inverse_width;
      variance = total_of(squares) * inverse_width - correction * correction;
    }
    const float rstd = 1.0f / std::sqrt(std::max(variance, 0.0f) + p.eps);

    const int64_t next = std::min(r + 1, end - 1);
    const T* next_x = row_of<T>(p.x, next);
    const MixedRow<T> next_residual(p.residual, p.residual_is_fp32, next);
    const auto write_output = [&](auto write) __attribute__((always_inline)) {
      for_vectors(width, [&](int64_t i, auto lanes, int slot) {
        if (slot == 0) {
          prefetch(next_x, i);
          if (next_residual) next_residual.prefetch_columns(i);
        }
        Vec result = ((load(sum + i) - estimate) - correction) * rstd;
        if (p.weight) [[likely]]
          result *= load_lanes(p.weight + i, lanes);
        if (p.bias) [[likely]]
          result += load_lanes(p.bias + i, lanes);
        write(output + i, result, lanes);
      });
    };
    if (p.stream_output) [[unlikely]]
      write_output([](auto... target) { stream_lanes(target...); });
    else
      write_output([](auto... target) { store_lanes(target...); });
    if constexpr (!kIsRms) p.mean[r] = estimate + correction;
    p.rstd[r] = rstd;
  }
  if (p.stream_output) end_streams();
}

template <typename T>
static void add_layer_norm_forward_typed(const AddLayerNormForward& p, int64_t begin, int64_t end) {
  const bool dropout = p.keep_threshold != 0;
  const bool is_rms = p.mean == nullptr;
  if (dropout && is_rms) return add_layer_norm_forward_rows<T, true, true>(p, begin, end);
  if (dropout) return add_layer_norm_forward_rows<T, true, false>(p, begin, end);
  if (is_rms) return add_layer_norm_forward_rows<T, false, true>(p, begin, end);
  return add_layer_norm_forward_rows<T, false, false>(p, begin, end);
}

void add_layer_norm_forward(const AddLayerNormForward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return add_layer_norm_forward_typed<float>(p, begin, end);
    case DType::kFloat16:
      return add_layer_norm_forward_typed<Half>(p, begin, end);
    case DType::kBFloat16:
      return add_layer_norm_forward_typed<BFloat16>(p, begin, end);
  }
}

// --- backward -------------------------------------------------------------------------------

// Rows that share one read and write of the partial gradients of weight and bias. More would not
// fit into the first-level cache.
constexpr int kGroup = 2;

// The value itself, which the compiler must round: a fused multiply-add would not.
FUSED_ATTN_INLINE Vec rounded(Vec v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// What the second pass over a row needs to know. With y = the normalised sum and g = grad_output *
// weight, the gradient of the sum is rstd * (g - mean(g) - y * mean(g * y)) + grad_sum; RMSNorm
// has no mean(g).
template <typename T>
struct BackwardRow {
  const T* grad_output;
  MixedRow<T> grad_sum;
  const float* normalised;
  const uint32_t* keep;
  T* grad_x;
  MixedRow<T> grad_residual;
  float rstd;
  float mean_g;
  float mean_gy;
  // What the second pass asks for.
  const T* next_grad_output;
  T* next_grad_x;
};

// First pass over row r: y, and the means.
template <typename T, bool kHasDropout>
static BackwardRow<T> backward_statistics(const AddLayerNormBackward& parameters,
                                          const PhiloxKeys& keys, int64_t r, float* normalised,
                                          uint32_t* random) {
  const AddLayerNormBackward p = parameters;  // a copy, which no store can have changed
  const int64_t width = p.width;
  const int64_t next = std::min(r + kGroup, p.rows - 1);
  const MixedRow<T> x(p.x, p.x_is_fp32, r);
  const MixedRow<T> next_x(p.x, p.x_is_fp32, next);
  const MixedRow<T> residual(p.residual, p.residual_is_fp32, r);
  const MixedRow<T> next_residual(p.residual, p.residual_is_fp32, next);
  const T* grad_output = row_of<T>(p.grad_output, r);
  const uint32_t* keep = nullptr;
  if constexpr (kHasDropout) keep = dropout_keep(keys, p.keep_threshold, r * width, width, random);
  const Vec scale = broadcast(p.keep_scale);
  const Vec mean = broadcast(p.mean ? p.mean[r] : 0.0f);
  const Vec rstd = broadcast(p.rstd[r]);

  Vec sums[kSlots] = {};
  Vec products[kSlots] = {};
  for_vectors(width, [&](int64_t i, auto lanes, int slot) {
    if (slot == 0) {
      next_x.prefetch_columns(i);
      if (residual) next_residual.prefetch_columns(i);
    }
    Vec s = x.load(i, lanes);
    if (!p.x_is_sum) [[likely]] {
      if (p.x_bias) [[unlikely]]
        s += load_lanes(p.x_bias + i, lanes);
      s = drop<kHasDropout>(s, keep, i, scale);
      if (residual) [[likely]]
        s += residual.load(i, lanes);
    }
    const Vec y = (s - mean) * rstd;
    store(normalised + i, y);
    // Lanes beyond the row have g = 0.
    Vec g = load_lanes(grad_output + i, lanes);
    if (p.weight) [[likely]]
      g *= load_lanes(p.weight + i, lanes);
    sums[slot] += g;
    products[slot] += g * y;
  });

  BackwardRow<T> row;
  row.grad_output = grad_output;
  row.grad_sum = MixedRow<T>(p.grad_sum, p.grad_sum_is_fp32, r);
  row.normalised = normalised;
  row.keep = keep;
  row.grad_x = static_cast<T*>(p.grad_x) + r * width;
  row.grad_residual = MixedRow<T>(p.grad_residual, p.grad_residual_is_fp32, width, r);
  row.rstd = p.rstd[r];
  row.mean_g = p.mean ? total_of(sums) / static_cast<float>(width) : 0.0f;
  row.mean_gy = total_of(products) / static_cast<float>(width);
  row.next_grad_output = row_of<T>(p.grad_output, next);
  row.next_grad_x = static_cast<T*>(p.grad_x) + next * width;
  return row;
}

// Whether the gradients are those of most calls: of weight, bias and x, the last from the output
// alone. Asking for the others at each vector would take as long as a fifth of the kernel.
static bool is_plain(const AddLayerNormBackward& p) {
  return p.weight && p.partial_weight && p.partial_bias && !p.partial_x_bias && !p.grad_sum.data &&
         !p.grad_residual && p.keep_threshold == 0;
}

// Second pass over kRows rows: the gradients.
template <typename T, bool kHasDropout, bool kIsPlain, int kRows>
static void backward_gradients(const AddLayerNormBackward& p, const BackwardRow<T>* group,
                               float* partial_x_bias, float* partial_weight, float* partial_bias) {
  const Vec scale = broadcast(p.keep_scale);
  const float* weights = p.weight;
  const bool stream = p.stream_grad_x;
  BackwardRow<T> rows[kRows];  // a copy, which no store can have changed
  std::copy_n(group, kRows, rows);
  for_vectors(p.width, [&](int64_t i, auto lanes, int slot) {
    Vec grad_x_bias = {};
    Vec grad_weight = {};
    Vec grad_bias = {};
    Vec grads[kRows];
    // Every load comes before every store. Rows of a round width begin at one offset within a
    // page, and the processor takes a load that follows such a store for a read of what it wrote.
    if (!kIsPlain && partial_x_bias) grad_x_bias = load_lanes(partial_x_bias + i, lanes);
    if (kIsPlain || partial_weight) grad_weight = load_lanes(partial_weight + i, lanes);
    if (kIsPlain || partial_bias) grad_bias = load_lanes(partial_bias + i, lanes);
    const Vec weight = kIsPlain || weights ? load_lanes(weights + i, lanes) : broadcast(1.0f);
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      const BackwardRow<T>& row = rows[k];
      if (slot == 0) {
        prefetch(row.next_grad_output, i);
        if (!stream) prefetch_to_write(row.next_grad_x, i);
      }
      const Vec grad_output = load_lanes(row.grad_output + i, lanes);
      const Vec y = load(row.normalised + i);
      grad_weight += grad_output * y;
      grad_bias += grad_output;
      // The first pass summed g as rounded: what is not does not cancel to 0 at width 1.
      const Vec g = rounded(grad_output * weight);
      grads[k] = (g - row.mean_g - y * row.mean_gy) * row.rstd;
      if (!kIsPlain && row.grad_sum) grads[k] += row.grad_sum.load(i, lanes);
    }
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      const BackwardRow<T>& row = rows[k];
      if (!kIsPlain && row.grad_residual) row.grad_residual.store(i, grads[k], lanes);
      const Vec grad_x = drop<kHasDropout>(grads[k], row.keep, i, scale);
      grad_x_bias += grad_x;
      if (stream) [[unlikely]]
        stream_lanes(row.grad_x + i, grad_x, lanes);
      else
        store_lanes(row.grad_x + i, grad_x, lanes);
    }
    if (!kIsPlain && partial_x_bias) store_lanes(partial_x_bias + i, grad_x_bias, lanes);
    if (kIsPlain || partial_weight) store_lanes(partial_weight + i, grad_weight, lanes);
    if (kIsPlain || partial_bias) store_lanes(partial_bias + i, grad_bias, lanes);
  });
}

template <typename T, bool kHasDropout, bool kIsPlain>
static void add_layer_norm_backward_chunks(const AddLayerNormBackward& p, int64_t begin,
                                           int64_t end) {
  const int64_t width = p.width;
  const int64_t row_room = padded(width);
  const int64_t random_room = kHasDropout ? dropout_keep_capacity(width) : 0;
  Scratch<float> normalised(kGroup * row_room);
  Scratch<uint32_t> random(kGroup * random_room);
  const PhiloxKeys keys(p.seed);
  // The chunk's part of a parameter's gradient, zeroed.
  const auto part_of = [&](float* partial, int64_t chunk) {
    return partial ? std::fill_n(partial + chunk * width, width, 0.0f) - width : nullptr;
  };

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* partial_x_bias = part_of(p.partial_x_bias, chunk);
    float* partial_weight = part_of(p.partial_weight, chunk);
    float* partial_bias = part_of(p.partial_bias, chunk);
    const int64_t last = std::min(p.rows, (chunk + 1) * p.chunk_rows);
    for (int64_t r = chunk * p.chunk_rows; r < last; r += kGroup) {
      static_assert(kGroup == 2, "the last group of a chunk is whole or one row");
      const int count = last - r >= kGroup ? kGroup : 1;
      BackwardRow<T> rows[kGroup];
      for (int k = 0; k < count; ++k)
        rows[k] = backward_statistics<T, kHasDropout>(
            p, keys, r + k, normalised.data() + k * row_room, random.data() + k * random_room);
      if (count == kGroup)
        backward_gradients<T, kHasDropout, kIsPlain, kGroup>(p, rows, partial_x_bias,
                                                             partial_weight, partial_bias);
      else
        backward_gradients<T, kHasDropout, kIsPlain, 1>(p, rows, partial_x_bias, partial_weight,
                                                        partial_bias);
    }
  }
  if (p.stream_grad_x) end_streams();
}

template <typename T>
static void add_layer_norm_backward_typed(const AddLayerNormBackward& p, int64_t begin,
                                          int64_t end) {
  if (p.keep_threshold != 0) return add_layer_norm_backward_chunks<T, true, false>(p, begin, end);
  if (is_plain(p)) return add_layer_norm_backward_chunks<T, false, true>(p, begin, end);
  return add_layer_norm_backward_chunks<T, false, false>(p, begin, end);
}

void add_layer_norm_backward(const AddLayerNormBackward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return add_layer_norm_backward_typed<float>(p, begin, end);
    case DType::kFloat16:
      return add_layer_norm_backward_typed<Half>(p, begin, end);
    case DType::kBFloat16:
      return add_layer_norm_backward_typed<BFloat16>(p, begin, end);
  }
}

void add_layer_norm_reduce(const float* partial, int64_t chunks, int64_t width, float* total,
                           int64_t begin, int64_t end) {
  sum_chunks(partial, chunks, width, total, begin, end);
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
