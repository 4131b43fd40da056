// The library that Python loads to execute CUDA kernels on CPU tensors.
#include "common/schemas.h"

#include "cuda_host.h"

TORCH_LIBRARY(fused_attn_cuda_host, m) {
  fused_attn::define_operators(m);
  m.def("launches() -> int", [] { return static_cast<int64_t>(cuda_host::launches); });
}
