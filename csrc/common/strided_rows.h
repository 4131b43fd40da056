// The rows of a tensor, as kernels on rows take them.
#pragma once

#include <cstdint>

namespace fused_attn {

// Rows of T [rows, width], each contiguous: row r begins at element
// (r / inner) * outer_stride + (r % inner) * inner_stride.
struct StridedRows {
  const void* data;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
};

}  // namespace fused_attn
