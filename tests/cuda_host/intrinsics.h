// Atomics and scalar functions that CUDA's headers declare for nvcc alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "block.h"

namespace cuda_host {

// A real atomic operation, so that ThreadSanitizer takes it for one.
template <class T, class Change>
T atomic_change(T* address, Change change) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  static_assert(sizeof(T) == sizeof(Bits));
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("atomic: misaligned address");
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(bits, __ATOMIC_RELAXED);
  Bits new_bits;
  T old;
  do {
    memcpy(&old, &old_bits, sizeof(T));
    const T changed = change(old);
    memcpy(&new_bits, &changed, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &old_bits, new_bits, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  Unobserved rig;
  ++progress;
  return old;
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_log(float x) { return std::log(x); }

}  // namespace cuda_host

template <class T>
T atomicAdd(T* address, T value) {
  return cuda_host::atomic_change(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return cuda_host::atomic_change(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, T value) {
  return cuda_host::atomic_change(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* address, T value) {
  return cuda_host::atomic_change(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return cuda_host::atomic_change(address, [&](T old) { return old == expected ? value : old; });
}
template <class T>
T atomicOr(T* address, T value) {
  return cuda_host::atomic_change(address, [&](T old) { return static_cast<T>(old | value); });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

inline float __uint_as_float(unsigned bits) { return cuda_host::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return cuda_host::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return cuda_host::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_host::bit_cast<int>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
// Each operation rounds by itself: without these, a compiler may fuse a product into a sum.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// glibc declares __expf and __logf, and does not export them.
#define __expf cuda_host::fast_exp
#define __logf cuda_host::fast_log
#define __trap() ::cuda_host::fail("__trap")
