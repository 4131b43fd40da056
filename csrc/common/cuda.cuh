// What every kernel file includes: CUDA's headers and the two things that a kernel spells in a way
// of its own, shared memory and the launch, so that the same source can also be executed on a CPU
// (docs/testing_kernels.md).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FUSED_ATTN_CUDA_HOST
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// SHARED(float, sums, [2][32]); is a variable of the block.
#define SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#endif

namespace fused_attn {

// The block's dynamic shared memory, aligned for every instruction.
#ifdef FUSED_ATTN_CUDA_HOST
inline unsigned char* dynamic_shared() { return cuda_host::unit->arena; }
#else
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fused_attn_dynamic_shared[];
  return fused_attn_dynamic_shared;
}

inline void check_cuda(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that was reported is not the next launch's
  throw std::runtime_error(std::string(name) + ": CUDA: " + cudaGetErrorString(status));
}
#endif

// Launches a kernel; throws std::runtime_error when CUDA refuses.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, [[maybe_unused]] cudaStream_t stream, Arguments&&... arguments) {
#ifdef FUSED_ATTN_CUDA_HOST
  cuda_host::run(name, kernel, grid, block, shared_bytes, static_cast<Arguments&&>(arguments)...);
#else
  // Static and dynamic memory above 48 KiB together must be asked for. Kernels that have the latter
  // have less than 16 KiB of the former.
  if (shared_bytes > 32 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               name);
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  check_cuda(cudaGetLastError(), name);
#endif
}

}  // namespace fused_attn
