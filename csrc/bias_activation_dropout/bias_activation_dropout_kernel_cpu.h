// CPU kernels of bias_activation_dropout: raw pointers, no torch. Compiled once per instruction
// set.
//
// A row is worked on in short blocks of columns: while the processor draws the dropout mask of one,
// which is arithmetic alone, it still waits for the data of the one before, and gets both done.
#pragma once

#include "bias_activation_dropout/bias_activation_dropout.h"
#include "common/rows.h"
#include "common/scratch.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

constexpr int64_t kBlockColumns = 128;
static_assert(kBlockColumns % kBlockElements == 0, "no random word of a whole block is left over");

// Calls body(start, count, keep) for the blocks of row r: columns [start, start + count), and their
// dropout mask where there is dropout. All blocks but the first begin with a counter of Philox.
template <typename Body>
FUSED_ATTN_INLINE void for_blocks(const PhiloxKeys& keys, uint32_t threshold, int64_t r,
                                  int64_t width, uint32_t* random, Body&& body) {
  int64_t count = kBlockColumns - (threshold ? r * width % 4 : 0);
  for (int64_t start = 0; start < width; start += count, count = kBlockColumns) {
    count = std::min(count, width - start);
    const uint32_t* keep = nullptr;
    if (threshold) keep = dropout_keep(keys, threshold, r * width + start, count, random);
    body(start, count, keep);
  }
}

// x + bias from column i; no bias is null.
template <typename T, typename Lanes>
FUSED_ATTN_INLINE Vec load_biased(const T* x, const float* bias, int64_t i, Lanes lanes) {
  Vec v = load_lanes(x + i, lanes);
  if (bias) v += load_lanes(bias + i, lanes);
  return v;
}

// f(x), and the gradient of x, given that of f(x).
struct Activated {
  Vec value;
  Vec gradient;
};

template <Unit kUnit>
FUSED_ATTN_INLINE Activated activate(Vec x, Vec gradient) {
  if constexpr (kUnit == Unit::kRelu) {
    // NaN stays NaN, and lets the gradient pass, as in torch.
    return {max(Vec{}, x), select(x <= Vec{}, Vec{}, gradient)};
  } else if constexpr (kUnit == Unit::kGelu) {
    constexpr float kDensity = 0.398942280401432678f;  // 1 / sqrt(2 pi)
    const Normal normal = normal_distribution(x);
    return {x * normal.probability, gradient * (normal.probability + x * normal.bell * kDensity)};
  } else if constexpr (kUnit == Unit::kGeluTanh) {
    // (1 + tanh(u)) / 2 is sigmoid(2 u).
    constexpr float kScale = 1.59576912160573071f;  // 2 sqrt(2 / pi)
    constexpr float kCubic = 0.044715f;
    const Sigmoid sigmoid = sigmoid_with_slope(kScale * (x + kCubic * x * x * x));
    // Beyond 20 the slope is 0, which an infinite square would turn into NaN.
    const Vec near = max(broadcast(-20.0f), min(broadcast(20.0f), x));
    const Vec inner = kScale * (1.0f + 3.0f * kCubic * near * near);
    return {x * sigmoid.value, gradient * (sigmoid.value + near * sigmoid.slope * inner)};
  } else if constexpr (kUnit == Unit::kSilu) {
    const Sigmoid sigmoid = sigmoid_with_slope(x);
    return {x * sigmoid.value, gradient * (sigmoid.value + x * sigmoid.slope)};
  } else if constexpr (kUnit == Unit::kSigmoid) {
    const Sigmoid sigmoid = sigmoid_with_slope(x);
    return {sigmoid.value, gradient * sigmoid.slope};
  } else {
    return {x, gradient};
  }
}

// Calls run(T{}, unit, is_gated) with the types and constants that the arguments name.
template <typename Run>
static void for_kind(DType dtype, Unit unit, bool is_gated, Run&& run) {
  const auto with_gate = [&](auto element, auto constant) {
    if (is_gated) return run(element, constant, std::true_type{});
    return run(element, constant, std::false_type{});
  };
  const auto with_unit = [&](auto element) {
    switch (unit) {
      case Unit::kIdentity:
        return with_gate(element, std::integral_constant<Unit, Unit::kIdentity>{});
      case Unit::kRelu:
        return with_gate(element, std::integral_constant<Unit, Unit::kRelu>{});
      case Unit::kGelu:
        return with_gate(element, std::integral_constant<Unit, Unit::kGelu>{});
      case Unit::kGeluTanh:
        return with_gate(element, std::integral_constant<Unit, Unit::kGeluTanh>{});
      case Unit::kSilu:
        return with_gate(element, std::integral_constant<Unit, Unit::kSilu>{});
      case Unit::kSigmoid:
        return with_gate(element, std::integral_constant<Unit, Unit::kSigmoid>{});
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return with_unit(float{});
    case DType::kFloat16:
      return with_unit(Half{});
    case DType::kBFloat16:
      return with_unit(BFloat16{});
  }
}

// --- forward --------------------------------------------------------------------------------

template <typename T, Unit kUnit, bool kIsGated>
static void forward_rows(const BiasActivationDropoutForward& p, int64_t begin, int64_t end) {
  const int64_t width = p.width;
  const Vec scale = broadcast(p.keep_scale);
  Scratch<uint32_t> random(dropout_keep_capacity(kBlockColumns));
  const PhiloxKeys keys(p.seed);

  for (int64_t r = begin; r < end; ++r) {
    const int64_t next = std::min(r + 1, end - 1);
    const auto block = [&](int64_t start, int64_t count, const uint32_t* keep) {
      const T* x = row_of<T>(p.x, r) + start;
      const T* next_x = row_of<T>(p.x, next) + start;
      const T* residual = p.residual.data ? row_of<T>(p.residual, r) + start : nullptr;
      const float* bias = p.bias ? p.bias + start : nullptr;
      T* output = static_cast<T*>(p.output) + r * width + start;
      for_vectors(count, [&](int64_t i, auto lanes, int slot) {
        if (slot == 0) {
          prefetch(next_x, i);
          if constexpr (kIsGated) prefetch(next_x + width, i);
          prefetch_to_write(output + width, i);
        }
        const Vec unit = load_biased(x, bias, i, lanes);
        Vec v = activate<kUnit>(unit, Vec{}).value;
        if constexpr (kIsGated) v *= load_biased(x, bias, width + i, lanes);
        if (keep) v = keep_or_zero(v * scale, keep + i);
        if (residual) v += load_lanes(residual + i, lanes);
        store_lanes(output + i, v, lanes);
      });
    };
    for_blocks(keys, p.keep_threshold, r, width, random.data(), block);
  }
}

void bias_activation_dropout_forward(const BiasActivationDropoutForward& p, int64_t begin,
                                     int64_t end) {
  for_kind(p.dtype, p.unit, p.is_gated, [&](auto element, auto unit, auto is_gated) {
    forward_rows<decltype(element), unit.value, is_gated.value>(p, begin, end);
  });
}

// --- backward -------------------------------------------------------------------------------

template <typename T, Unit kUnit, bool kIsGated>
static void backward_chunks(const BiasActivationDropoutBackward& p, int64_t begin, int64_t end) {
  constexpr bool kPasses = kUnit == Unit::kIdentity && !kIsGated;
  constexpr int kHalves = kIsGated ? 2 : 1;
  const int64_t width = p.width;
  const int64_t columns = kHalves * width;
  const Vec scale = broadcast(p.keep_scale);
  Scratch<uint32_t> random(dropout_keep_capacity(kBlockColumns));
  const PhiloxKeys keys(p.seed);

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* partial_row = p.partial_bias ? p.partial_bias + chunk * columns : nullptr;
    if (partial_row) std::fill_n(partial_row, columns, 0.0f);
    const int64_t last = std::min(p.rows, (chunk + 1) * p.chunk_rows);
    for (int64_t r = chunk * p.chunk_rows; r < last; ++r) {
      const int64_t next = std::min(r + 1, p.rows - 1);
      const auto block = [&](int64_t start, int64_t count, const uint32_t* keep) {
        const T* grad_output = row_of<T>(p.grad_output, r) + start;
        const T* next_grad_output = row_of<T>(p.grad_output, next) + start;
        const T* x = kPasses ? nullptr : row_of<T>(p.x, r) + start;
        const T* next_x = kPasses ? nullptr : row_of<T>(p.x, next) + start;
        const float* bias = p.bias ? p.bias + start : nullptr;
        T* grad_x = p.grad_x ? static_cast<T*>(p.grad_x) + r * columns + start : nullptr;
        float* partial = partial_row ? partial_row + start : nullptr;
        for_vectors(count, [&](int64_t i, auto lanes, int slot) {
          if (slot == 0) {
            prefetch(next_grad_output, i);
            if constexpr (!kPasses) prefetch(next_x, i);
            if constexpr (kIsGated) prefetch(next_x + width, i);
            if (grad_x) prefetch_to_write(grad_x + columns, i);
          }
          Vec g = load_lanes(grad_output + i, lanes);
          if (keep) g *= scale;
          Vec gradients[kHalves];
          if constexpr (kPasses) {
            gradients[0] = g;
          } else {
            const Vec unit = load_biased(x, bias, i, lanes);
            if constexpr (kIsGated) {
              const Vec value = load_biased(x, bias, width + i, lanes);
              const Activated gate = activate<kUnit>(unit, g * value);
              gradients[0] = gate.gradient;
              gradients[1] = g * gate.value;
            } else {
              gradients[0] = activate<kUnit>(unit, g).gradient;
            }
          }
          for (int half = 0; half < kHalves; ++half) {
            const int64_t column = half * width + i;
            // Last, since what is dropped may have a derivative of NaN.
            if (keep) gradients[half] = keep_or_zero(gradients[half], keep + i);
            if (partial) {
              const Vec sum = load_lanes(partial + column, lanes) + gradients[half];
              store_lanes(partial + column, sum, lanes);
            }
            if (grad_x) store_lanes(grad_x + column, gradients[half], lanes);
          }
        });
      };
      for_blocks(keys, p.keep_threshold, r, width, random.data(), block);
    }
  }
}

void bias_activation_dropout_backward(const BiasActivationDropoutBackward& p, int64_t begin,
                                      int64_t end) {
  for_kind(p.dtype, p.unit, p.is_gated, [&](auto element, auto unit, auto is_gated) {
    backward_chunks<decltype(element), unit.value, is_gated.value>(p, begin, end);
  });
}

void bias_activation_dropout_reduce(const float* partial, int64_t chunks, int64_t columns,
                                    float* total, int64_t begin, int64_t end) {
  sum_chunks(partial, chunks, columns, total, begin, end);
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
