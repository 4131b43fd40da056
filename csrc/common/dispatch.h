// Helpers of the CPU bindings: from torch's arguments to the kernels' own.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "common/dtype.h"

namespace fused_attn {

inline DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK(false, "fused_attn: no CPU kernel for dtype ", dtype);
  }
}

// A weight is kept when its random word is at least this: `keep_threshold` in _philox.py.
inline uint32_t keep_threshold(double dropout_p) {
  return static_cast<uint32_t>(std::min(dropout_p * 4294967296.0, 4294967295.0));
}

}  // namespace fused_attn
