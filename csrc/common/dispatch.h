// Helpers of the CPU bindings: from torch's dtypes to the kernels' own.
#pragma once

#include <ATen/core/Tensor.h>

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

}  // namespace fused_attn
