// From torch's tensors to CUDA kernels: device, stream, and where implementations are registered.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#ifndef FUSED_ATTN_CUDA_HOST
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fused_attn {

#ifdef FUSED_ATTN_CUDA_HOST

// The kernels are executed on the CPU, on CPU tensors: docs/testing_kernels.md.
struct CudaCall {
  explicit CudaCall(const at::Tensor&) {}
  cudaStream_t stream = nullptr;
  int multiprocessors = 4;
};

#define FUSED_ATTN_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(fused_attn_cuda_host, CPU, m)

#else

// Kernels launched while it lives run on the tensor's device, on PyTorch's current stream.
struct CudaCall {
  explicit CudaCall(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                          tensor.device().index()));
  }
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  int multiprocessors = 0;
};

#define FUSED_ATTN_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(fused_attn_C, CUDA, m)

#endif

// Calls function(element), element being of the kernels' type for the dtype.
template <class Function>
void with_element_type(at::ScalarType dtype, Function function) {
  switch (dtype) {
    case at::kFloat:
      return function(float{});
    case at::kHalf:
      return function(__half{});
    case at::kBFloat16:
      return function(__nv_bfloat16{});
    default:
      TORCH_CHECK(false, "fused_attn: no CUDA kernel for dtype ", dtype);
  }
}

}  // namespace fused_attn
