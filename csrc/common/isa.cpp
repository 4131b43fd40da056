#include "common/isa.h"

#include <ATen/Version.h>
#include <string>

namespace fused_attn {

static Isa detect() {
  const std::string capability = at::get_cpu_capability();
#if defined(FUSED_ATTN_BUILD_AVX512)
  if (capability == "AVX512") return Isa::kAvx512;
#endif
#if defined(FUSED_ATTN_BUILD_AVX2)
  if (capability == "AVX512" || capability == "AVX2") return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace fused_attn
