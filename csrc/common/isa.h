// The instruction sets that the CPU kernels were compiled for, and the choice among them.
#pragma once

#if defined(FUSED_ATTN_BUILD_AVX2)
#define FUSED_ATTN_IF_AVX2(...) __VA_ARGS__
#else
#define FUSED_ATTN_IF_AVX2(...)
#endif
#if defined(FUSED_ATTN_BUILD_AVX512)
#define FUSED_ATTN_IF_AVX512(...) __VA_ARGS__
#else
#define FUSED_ATTN_IF_AVX512(...)
#endif

// Declares kernel functions in the namespace of each instruction set.
#define FUSED_ATTN_DECLARE_KERNELS(...)               \
  namespace fused_attn {                              \
  namespace baseline {                                \
  __VA_ARGS__                                         \
  }                                                   \
  FUSED_ATTN_IF_AVX2(namespace avx2{__VA_ARGS__})     \
  FUSED_ATTN_IF_AVX512(namespace avx512{__VA_ARGS__}) \
  }

// Calls `function(...)` of the best instruction set that this machine has.
#define FUSED_ATTN_CALL_KERNEL(function, ...)                                                    \
  do {                                                                                           \
    switch (::fused_attn::cpu_isa()) {                                                           \
      FUSED_ATTN_IF_AVX512(                                                                      \
          case ::fused_attn::Isa::kAvx512 : ::fused_attn::avx512::function(__VA_ARGS__); break;) \
      FUSED_ATTN_IF_AVX2(                                                                        \
          case ::fused_attn::Isa::kAvx2 : ::fused_attn::avx2::function(__VA_ARGS__); break;)     \
      default:                                                                                   \
        ::fused_attn::baseline::function(__VA_ARGS__);                                           \
    }                                                                                            \
  } while (false)

namespace fused_attn {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The instruction set in use: the best one that was compiled and that PyTorch itself would use
// here, so that ATEN_CPU_CAPABILITY=default|avx2|avx512 governs both.
Isa cpu_isa();

}  // namespace fused_attn
