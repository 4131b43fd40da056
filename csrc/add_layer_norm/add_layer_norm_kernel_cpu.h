// CPU kernels of add_layer_norm: raw pointers, no torch. Compiled once per instruction set.
#pragma once

#include "add_layer_norm/add_layer_norm.h"
#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

template <typename T>
static void add_layer_norm_forward_rows(const AddLayerNormForward& p, int64_t begin, int64_t end) {
  const int64_t width = p.width;
  std::vector<float> row(width);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(p.x) + r * width;
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + r * width : nullptr;
    T* output = static_cast<T*>(p.output) + r * width;
    float total = 0.0f;
    for (int64_t i = 0; i < width; ++i) {
      row[i] = to_float(x[i]) + (residual ? to_float(residual[i]) : 0.0f);
      total += row[i];
    }
    const float mean = total / width;
    float squares = 0.0f;
    for (int64_t i = 0; i < width; ++i) squares += (row[i] - mean) * (row[i] - mean);
    const float rstd = 1.0f / std::sqrt(squares / width + p.eps);
    for (int64_t i = 0; i < width; ++i) {
      const float y = (row[i] - mean) * rstd;
      output[i] = from_float<T>(y * (p.weight ? p.weight[i] : 1.0f) + (p.bias ? p.bias[i] : 0.0f));
      if (p.sum) static_cast<T*>(p.sum)[r * width + i] = from_float<T>(row[i]);
    }
    p.mean[r] = mean;
    p.rstd[r] = rstd;
  }
}

void add_layer_norm_forward(const AddLayerNormForward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return add_layer_norm_forward_rows<float>(p, begin, end);
    case DType::kFloat16:
      return add_layer_norm_forward_rows<Half>(p, begin, end);
    case DType::kBFloat16:
      return add_layer_norm_forward_rows<BFloat16>(p, begin, end);
  }
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
