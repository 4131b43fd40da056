// The schemas of the compiled library. Python sees them as torch.ops.fused_attn_C.*; they are
// private, and the functions in fused_attn.ops are the interface. Each op's *_cpu.cpp and
// *_cuda.cpp registers the implementations.
#include <torch/library.h>

#include "common/isa.h"
#include "common/schemas.h"

#ifdef FUSED_ATTN_BUILD_CUDA
namespace fused_attn {
std::string cuda_architectures();  // written by setup.py
}
#endif

namespace {

std::string cpu_isa_name() {
  switch (fused_attn::cpu_isa()) {
    case fused_attn::Isa::kAvx512:
      return "avx512";
    case fused_attn::Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> compiled_instruction_sets() {
  return {"baseline", FUSED_ATTN_IF_AVX2("avx2", ) FUSED_ATTN_IF_AVX512("avx512")};
}

}  // namespace

TORCH_LIBRARY(fused_attn_C, m) {
  m.def("cpu_isa() -> str", &cpu_isa_name);
  m.def("compiled_instruction_sets() -> str[]", &compiled_instruction_sets);
#ifdef FUSED_ATTN_BUILD_CUDA
  m.def("cuda_architectures() -> str", &fused_attn::cuda_architectures);
#endif
  fused_attn::define_operators(m);
}
