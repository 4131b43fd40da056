// What kernels share: conversions, accesses of 16 bytes, reductions, Philox.
#pragma once

#include "common/cuda.cuh"

namespace fused_attn {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xFFFFFFFFu;

// ---- Element types -----------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---- Vectors -----------------------------------------------------------------------------------

// N elements that are loaded and stored at once, 16 bytes at most.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16);
  T element[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

// Two elements of 16 bits as a register of a matrix product holds them.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(sizeof(T) == 2);
  union {
    T element[2];
    uint32_t bits;
  } pair;
  pair.element[0] = from_float<T>(low);
  pair.element[1] = from_float<T>(high);
  return pair.bits;
}

// ---- Reductions: the same bits in every thread, whatever the schedule --------------------------

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
}

// ---- Random numbers ----------------------------------------------------------------------------

// The four words of counter (counter, 0, 0) of Philox 4x32-10: fused_attn/ops/_philox.py.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t word[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(0xD2511F53u) * word[0];
    const uint64_t product_1 = static_cast<uint64_t>(0xCD9E8D57u) * word[2];
    word[0] = static_cast<uint32_t>(product_1 >> 32) ^ word[1] ^ key[0];
    word[2] = static_cast<uint32_t>(product_0 >> 32) ^ word[3] ^ key[1];
    word[1] = static_cast<uint32_t>(product_1);
    word[3] = static_cast<uint32_t>(product_0);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return uint4{word[0], word[1], word[2], word[3]};
}

}  // namespace fused_attn
