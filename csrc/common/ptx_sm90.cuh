// Inline PTX of sm_90a: barriers in shared memory, copies of tiles by the tensor memory accelerator
// and matrix products of warpgroups. Executed on a CPU, the same names have the meaning that
// tests/cuda_host/ptx_sm90_host.h gives them.
//
// Only sm_90a has these instructions. A kernel with them, compiled for other architectures too, has
// its body in `#ifdef FUSED_ATTN_SM90A`, and is launched where the device is one.
//
// Reference: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cuda.h>

#include <type_traits>

#include "common/ptx.cuh"

#if defined(FUSED_ATTN_CUDA_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FUSED_ATTN_SM90A 1
#endif

namespace fused_attn::ptx {

// How 16-byte units are permuted in shared memory, by the length of a row in bytes; the numbers are
// those of a matrix descriptor.
enum class Swizzle : uint64_t { k128 = 1, k64 = 2, k32 = 3 };

// Which dimension of an operand of a product is contiguous: K, or the other one, M or N.
enum class Major { kK, kOuter };

// An operand in shared memory, for a product. Addresses are multiples of 16 bytes; a tile, of rows
// of 128 bytes at Swizzle::k128, begins at a multiple of 8 of them, and 8 rows begin `stride` bytes
// after the 8 before.
//
// kK: rows of M or N. `leading` is not used. 16 columns of K later is 32 bytes later in each row.
//
// kOuter: rows of K. The columns that do not fit a row are a tile `leading` bytes further.
__host__ __device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading,
                                                               uint32_t stride, Swizzle swizzle) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>(bytes >> 4 & 0x3FFF); };
  return field(address) | field(leading) << 16 | field(stride) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

}  // namespace fused_attn::ptx

#ifdef FUSED_ATTN_CUDA_HOST
#include "ptx_sm90_host.h"
#else
namespace fused_attn::ptx {

// ---- mbarrier ----------------------------------------------------------------------------------

// A phase ends when `arrivals` threads have arrived and all bytes that they announced are there.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// After the last of them, for the units that complete copies.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and announces what copies will bring in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended; phases count from 0.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- Tensor memory accelerator -----------------------------------------------------------------

// One thread copies a tile whose first element is (x, y), x along rows, to a multiple of 1024
// bytes; zeros outside of the tensor, which count as bytes too.
__device__ __forceinline__ void tma_load_2d(uint32_t destination, const CUtensorMap* map,
                                            uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// ---- Warpgroups: 128 threads from a multiple of 128 ---------------------------------------------

// Registers a thread, for all threads of a warpgroup; a multiple of 8 from 24 to 256.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Before the first product of a group: what threads did to registers comes first.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// The products since the last commit are a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// After a wait: the compiler, which does not know what is under way, reads no accumulator earlier.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// clang-format off
// Ten registers of a list by their numbers' first digits; accumulators as operands.
#define FUSED_ATTN_TEN(t)                                                                        \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, "   \
  "%" #t "9, "
#define FUSED_ATTN_LIST_32 FUSED_ATTN_TEN() FUSED_ATTN_TEN(1) FUSED_ATTN_TEN(2) "%30, %31"
#define FUSED_ATTN_LIST_64                                                                       \
  FUSED_ATTN_TEN() FUSED_ATTN_TEN(1) FUSED_ATTN_TEN(2) FUSED_ATTN_TEN(3) FUSED_ATTN_TEN(4)       \
  FUSED_ATTN_TEN(5) "%60, %61, %62, %63"
#define FUSED_ATTN_LIST_128                                                                      \
  FUSED_ATTN_TEN() FUSED_ATTN_TEN(1) FUSED_ATTN_TEN(2) FUSED_ATTN_TEN(3) FUSED_ATTN_TEN(4)       \
  FUSED_ATTN_TEN(5) FUSED_ATTN_TEN(6) FUSED_ATTN_TEN(7) FUSED_ATTN_TEN(8) FUSED_ATTN_TEN(9)      \
  FUSED_ATTN_TEN(10) FUSED_ATTN_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define FUSED_ATTN_D8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define FUSED_ATTN_D32(i)                                                                        \
  FUSED_ATTN_D8(i), FUSED_ATTN_D8(i + 8), FUSED_ATTN_D8(i + 16), FUSED_ATTN_D8(i + 24)
#define FUSED_ATTN_OPERANDS_32 FUSED_ATTN_D32(0)
#define FUSED_ATTN_OPERANDS_64 FUSED_ATTN_D32(0), FUSED_ATTN_D32(32)
#define FUSED_ATTN_OPERANDS_128 FUSED_ATTN_OPERANDS_64, FUSED_ATTN_D32(64), FUSED_ATTN_D32(96)

// d[64, n] = a[64, 16] @ b[16, n], plus d where `adds`. p0 and so on are the numbers of the operands
// behind the `count` accumulators.
#define FUSED_ATTN_WGMMA_SHARED(n, count, type, p0, p1, p2, p3, p4)                              \
  asm volatile(                                                                                  \
      "{\n"                                                                                      \
      ".reg .pred adds;\n"                                                                       \
      "setp.ne.b32 adds, %" #p2 ", 0;\n"                                                         \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                            \
      " {" FUSED_ATTN_LIST_##count "}, %" #p0 ", %" #p1 ", adds, 1, 1, %" #p3 ", %" #p4 ";\n"    \
      "}\n"                                                                                      \
      : FUSED_ATTN_OPERANDS_##count                                                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(kA == Major::kOuter),                   \
        "n"(kB == Major::kOuter)                                                                 \
      : "memory")
#define FUSED_ATTN_WGMMA_REGISTERS(n, count, type, p0, p1, p2, p3, p4, p5, p6)                   \
  asm volatile(                                                                                  \
      "{\n"                                                                                      \
      ".reg .pred adds;\n"                                                                       \
      "setp.ne.b32 adds, %" #p5 ", 0;\n"                                                         \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                            \
      " {" FUSED_ATTN_LIST_##count "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4          \
      ", adds, 1, 1, %" #p6 ";\n"                                                                \
      "}\n"                                                                                      \
      : FUSED_ATTN_OPERANDS_##count                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)),         \
        "n"(kB == Major::kOuter)                                                                 \
      : "memory")
#define FUSED_ATTN_WGMMA_OF_TYPE(form, n, count, ...)                                            \
  if constexpr (std::is_same_v<T, __nv_bfloat16>)                                                \
    FUSED_ATTN_WGMMA_##form(n, count, "bf16", __VA_ARGS__);                                      \
  else                                                                                           \
    FUSED_ATTN_WGMMA_##form(n, count, "f16", __VA_ARGS__)
// clang-format on

// d[64, kN] (+)= a[64, 16] @ b[16, kN], of operands that descriptors find in shared memory. Warp w
// of the warpgroup has rows 16 w to 16 w + 15 of d: lane l rows l / 4 and l / 4 + 8, of every 8
// columns 2 (l % 4) and the next, d[4 j + 2 h + c] being column 8 j + 2 (l % 4) + c of row l / 4 +
// 8 h.
template <class T, int kN, Major kA, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool adds) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (kN == 64) {
    FUSED_ATTN_WGMMA_OF_TYPE(SHARED, 64, 32, 32, 33, 34, 35, 36);
  } else if constexpr (kN == 128) {
    FUSED_ATTN_WGMMA_OF_TYPE(SHARED, 128, 64, 64, 65, 66, 67, 68);
  } else {
    FUSED_ATTN_WGMMA_OF_TYPE(SHARED, 256, 128, 128, 129, 130, 131, 132);
  }
}

// The same with a in registers: rows as of d, a[i] being columns 2 (l % 4) + 8 (i / 2) and the next
// of row l / 4 + 8 (i % 2).
template <class T, int kN, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool adds) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (kN == 64) {
    FUSED_ATTN_WGMMA_OF_TYPE(REGISTERS, 64, 32, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (kN == 128) {
    FUSED_ATTN_WGMMA_OF_TYPE(REGISTERS, 128, 64, 64, 65, 66, 67, 68, 69, 70);
  } else {
    FUSED_ATTN_WGMMA_OF_TYPE(REGISTERS, 256, 128, 128, 129, 130, 131, 132, 133, 134);
  }
}

#undef FUSED_ATTN_WGMMA_OF_TYPE
#undef FUSED_ATTN_WGMMA_REGISTERS
#undef FUSED_ATTN_WGMMA_SHARED
#undef FUSED_ATTN_OPERANDS_128
#undef FUSED_ATTN_OPERANDS_64
#undef FUSED_ATTN_OPERANDS_32
#undef FUSED_ATTN_D32
#undef FUSED_ATTN_D8
#undef FUSED_ATTN_LIST_128
#undef FUSED_ATTN_LIST_64
#undef FUSED_ATTN_LIST_32
#undef FUSED_ATTN_TEN

}  // namespace fused_attn::ptx
#endif
