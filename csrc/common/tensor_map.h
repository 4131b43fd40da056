// Descriptions of tensors in global memory, which the tensor memory accelerator reads tiles of.
#pragma once

#include "common/ptx_sm90.cuh"

namespace fused_attn {

// A matrix of 16-bit elements with contiguous rows.
struct Matrix {
  const void* data;  // at a multiple of 16 bytes
  bool is_bf16;      // else fp16
  uint64_t rows;
  uint64_t columns;
  uint64_t stride_bytes;  // from row to row, a multiple of 16
};

// Tiles of box_rows rows of box_columns columns, whose rows are as long as the swizzle's.
inline CUtensorMap tensor_map(const char* name, const Matrix& matrix, uint32_t box_rows,
                              uint32_t box_columns, ptx::Swizzle swizzle) {
  const cuuint64_t sizes[] = {matrix.columns, matrix.rows};
  const cuuint64_t strides[] = {matrix.stride_bytes};
  const cuuint32_t box[] = {box_columns, box_rows};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  CUtensorMap map;
#ifdef FUSED_ATTN_CUDA_HOST
  const auto encode = &cuda_host::encode_tensor_map;
#else
  // Looked up, so that the library can be loaded where there is no driver.
  static const auto encode = [name] {
    void* function = nullptr;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault),
               name);
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault),
               name);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
#endif
  const CUresult status = encode(
      &map, matrix.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzles[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(name) + ": a tensor map was refused: " +
                             std::to_string(static_cast<int>(status)));
  return map;
}

}  // namespace fused_attn
