// The library that Python loads to execute CUDA kernels on CPU tensors.
#include "common/schemas.h"

#include "common/cuda.cuh"

namespace {

// Two deliberate mistakes, so that tests can see whether a sanitizer watches over the tensors of a
// Python process.
__global__ void writes_behind(float* data, int64_t count) { data[count + threadIdx.x] = 0.0f; }

__global__ void all_write_one(float* data) { data[0] = static_cast<float>(threadIdx.x); }

void write_behind(const at::Tensor& x) {
  fused_attn::launch("writes_behind", writes_behind, dim3(1), dim3(1), 0, nullptr,
                     x.mutable_data_ptr<float>(), x.numel());
}

void race(const at::Tensor& x) {
  fused_attn::launch("all_write_one", all_write_one, dim3(1), dim3(2), 0, nullptr,
                     x.mutable_data_ptr<float>());
}

}  // namespace

TORCH_LIBRARY(fused_attn_cuda_host, m) {
  fused_attn::define_operators(m);
  m.def("launches() -> int", [] { return static_cast<int64_t>(cuda_host::launches); });
  m.def("write_behind(Tensor x) -> ()", &write_behind);
  m.def("race(Tensor x) -> ()", &race);
}
