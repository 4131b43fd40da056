// Parameters of the bias_activation_dropout kernels. A null pointer is an absent tensor. T stands
// for the element type named by `dtype`; columns are `width`, with a gate 2 * width: gate, value.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided_rows.h"

namespace fused_attn {

// The activation of a unit.
enum class Unit { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kSigmoid };

struct BiasActivationDropoutForward {
  StridedRows x;         // [rows, columns]
  StridedRows residual;  // [rows, width] or null
  const float* bias;     // [columns] or null
  void* output;          // T [rows, width]
  int64_t width;
  Unit unit;
  bool is_gated;
  float keep_scale;  // 1 / (1 - dropout_p)
  uint32_t
      keep_threshold;  // an element is kept when its random word is at least this; 0: no dropout
  uint64_t seed;
  DType dtype;
};

struct BiasActivationDropoutBackward {
  StridedRows grad_output;  // [rows, width]
  StridedRows x;            // [rows, columns], or null: it passes through
  const float* bias;        // [columns] or null
  void* grad_x;             // T [rows, columns] or null
  float* partial_bias;      // [chunks, columns] or null
  int64_t rows;
  int64_t width;
  int64_t chunk_rows;
  Unit unit;
  bool is_gated;
  float keep_scale;
  uint32_t keep_threshold;
  uint64_t seed;
  DType dtype;
};

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Rows [begin, end).
    void bias_activation_dropout_forward(const BiasActivationDropoutForward& p, int64_t begin,
                                         int64_t end);
    // Chunks [begin, end) of `chunk_rows` rows.
    void bias_activation_dropout_backward(const BiasActivationDropoutBackward& p, int64_t begin,
                                          int64_t end);
    // total[i] = sum over chunks of partial[chunk, i], for columns [begin, end).
    void bias_activation_dropout_reduce(const float* partial, int64_t chunks, int64_t columns,
                                        float* total, int64_t begin, int64_t end);)
