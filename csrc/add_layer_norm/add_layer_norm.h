// Parameters of the add_layer_norm kernels. Rows are contiguous; a null pointer is an absent
// tensor. T stands for the element type named by `dtype`.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fused_attn {

struct AddLayerNormForward {
  const void* x;         // T [rows, width]
  const void* residual;  // T [rows, width] or null
  const float* weight;   // [width] or null
  const float* bias;     // [width] or null
  void* output;          // T [rows, width]
  void* sum;             // T [rows, width] or null
  float* mean;           // [rows]
  float* rstd;           // [rows]
  int64_t width;
  float eps;
  float dropout_p;
  uint64_t seed;
  DType dtype;
};

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Rows [begin, end).
    void add_layer_norm_forward(const AddLayerNormForward& p, int64_t begin, int64_t end);)
