// Executes CUDA kernels on a CPU, from their own sources: docs/testing_kernels.md.
// Compile with -std=c++20 -DFUSED_ATTN_CUDA_HOST -fno-strict-aliasing -ffp-contract=off.
#pragma once

// Without nvcc these declare the types, and what they say of host and device is empty.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __restrict__
#define __restrict__  // another fiber may run at any call: a promise of no aliasing would be false
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#include "block.h"
#include "collectives.h"
#include "intrinsics.h"
#include "ptx_host.h"

#define threadIdx (::cuda_host::current->index)
#define blockIdx (::cuda_host::block_index)
#define blockDim (::cuda_host::block_dim)
#define gridDim (::cuda_host::grid_dim)

#define SHARED(T, name, ...)         \
  struct name##_tag;                 \
  using name##_type = T __VA_ARGS__; \
  name##_type& name = ::cuda_host::static_shared<name##_type, name##_tag>()
