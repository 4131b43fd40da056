// Helpers of the bindings: from torch's arguments to the kernels' own.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "common/dtype.h"
#include "common/strided_rows.h"

namespace fused_attn {

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

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

// The seed of a dropout, 0 where there is none.
inline uint64_t dropout_seed(const char* op, const std::optional<at::Tensor>& seed,
                             double dropout_p) {
  if (dropout_p == 0.0) return 0;
  TORCH_CHECK(seed.has_value(), op, ": dropout needs a seed");
  return static_cast<uint64_t>(seed->item<int64_t>());
}

// The rows of a tensor, without a copy when each is contiguous and two strides describe them.
// `keep_alive` owns what the result points to.
inline StridedRows strided_rows(const at::Tensor& tensor, at::Tensor& keep_alive) {
  const int64_t last = tensor.dim() - 1;
  int64_t sizes[2] = {1, 1};  // inner, outer
  int64_t strides[2] = {0, 0};
  int levels = 0;
  bool fits = tensor.size(last) == 1 || tensor.stride(last) == 1;
  for (int64_t d = last - 1; d >= 0 && fits; --d) {
    const int64_t size = tensor.size(d);
    const int64_t stride = tensor.stride(d);
    if (size == 1) continue;
    if (levels > 0 && stride == strides[levels - 1] * sizes[levels - 1]) {
      sizes[levels - 1] *= size;
    } else if (levels < 2) {
      sizes[levels] = size;
      strides[levels] = stride;
      ++levels;
    } else {
      fits = false;
    }
  }
  if (!fits) {
    keep_alive = tensor.contiguous();
    return {keep_alive.const_data_ptr(), std::numeric_limits<int64_t>::max(), 0, tensor.size(last)};
  }
  keep_alive = tensor;
  return {tensor.const_data_ptr(), levels == 2 ? sizes[0] : std::numeric_limits<int64_t>::max(),
          strides[1], strides[0]};
}

inline StridedRows strided_rows(const std::optional<at::Tensor>& tensor, at::Tensor& keep_alive) {
  return tensor ? strided_rows(*tensor, keep_alive) : StridedRows{};
}

// A parameter as kernels read it: fp32 and contiguous; null where there is none. `keep_alive` owns
// what the result points to.
inline const float* parameter(const std::optional<at::Tensor>& given, at::Tensor& keep_alive) {
  if (!given) return nullptr;
  keep_alive = given->to(at::kFloat).contiguous();
  return keep_alive.const_data_ptr<float>();
}

// Elements per task below which threads cost more than they save.
constexpr int64_t kGrain = 16384;

// Tasks of `elements` each that a thread takes at least.
inline int64_t task_grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1));
}

// The same for the columns of a sum over chunks: no thread writes to a cache line of another's.
inline int64_t column_grain(int64_t chunks) { return std::max<int64_t>(64, task_grain(chunks)); }

// Gradients of parameters are summed in chunks of rows: in an order that depends on the shape
// alone, so that they are the same bits for any number of threads.
struct RowChunks {
  int64_t chunk_rows;
  int64_t chunks;
};

inline RowChunks row_chunks(int64_t rows) {
  constexpr int64_t kMaxChunks = 64;
  constexpr int64_t kMinChunkRows = 16;
  const int64_t chunk_rows = std::max(kMinChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  return {chunk_rows, (rows + chunk_rows - 1) / chunk_rows};
}

}  // namespace fused_attn
