// A vector of floats as wide as the instruction set of the unit that includes it, with loads and
// stores that convert from and to fp32, fp16 and bf16. Built on the vector extensions of GCC and
// Clang, so the baseline also serves machines that are not x86.
//
// Include it from kernel headers only, inside no namespace; FUSED_ATTN_ISA names the unit.
#pragma once

#ifndef FUSED_ATTN_ISA
#error "vec.h belongs to kernel units, which define FUSED_ATTN_ISA"
#endif

#include "common/dtype.h"
#include "common/kernel_prelude.h"

#define FUSED_ATTN_INLINE inline __attribute__((always_inline))

namespace fused_attn {
namespace FUSED_ATTN_ISA {

#if defined(FUSED_ATTN_ISA_AVX512)
constexpr int kVec = 16;
#elif defined(FUSED_ATTN_ISA_AVX2)
constexpr int kVec = 8;
#else
constexpr int kVec = 4;
#endif

typedef float Vec __attribute__((vector_size(kVec * 4)));
typedef int32_t VecI __attribute__((vector_size(kVec * 4)));
typedef uint32_t VecU __attribute__((vector_size(kVec * 4)));
typedef uint16_t VecH __attribute__((vector_size(kVec * 2)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// x - 0 is x, which the compiler knows; 0 + x is not where x is -0, and would be computed.
FUSED_ATTN_INLINE Vec broadcast(float x) { return x - Vec{}; }

// Lane numbers 0, 1, 2, ...
FUSED_ATTN_INLINE VecI iota() {
  VecI r;
  for (int i = 0; i < kVec; ++i) r[i] = i;
  return r;
}

FUSED_ATTN_INLINE Vec select(VecI condition, Vec yes, Vec no) { return condition ? yes : no; }
// As std::max(b, a): the second operand where either is NaN. (GCC makes a comparison and a blend
// of `a > b ? a : b` when a is a constant; hence the intrinsics.)
FUSED_ATTN_INLINE Vec max(Vec a, Vec b) {
#if defined(FUSED_ATTN_ISA_AVX512)
  return reinterpret_cast<Vec>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(FUSED_ATTN_ISA_AVX2)
  return reinterpret_cast<Vec>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
FUSED_ATTN_INLINE Vec min(Vec a, Vec b) {
#if defined(FUSED_ATTN_ISA_AVX512)
  return reinterpret_cast<Vec>(
      _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(FUSED_ATTN_ISA_AVX2)
  return reinterpret_cast<Vec>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// Bit i: whether a > b in lane i.
FUSED_ATTN_INLINE uint32_t greater_lanes(Vec a, Vec b) {
#if defined(FUSED_ATTN_ISA_AVX512)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#elif defined(FUSED_ATTN_ISA_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(a > b)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(a > b)));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kVec; ++i) lanes |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return lanes;
#endif
}

// Lanes i and i + n / 2 first, then halves of that, as a tree.
template <typename V, typename Combine>
FUSED_ATTN_INLINE float reduce(V v, Combine combine) {
  if constexpr (sizeof(V) > 16) {
    typedef float HalfOfV __attribute__((vector_size(sizeof(V) / 2)));
    HalfOfV halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return reduce(static_cast<HalfOfV>(combine(halves[0], halves[1])), combine);
  } else {
    static_assert(sizeof(V) == 16, "four lanes");
    return combine(combine(v[0], v[2]), combine(v[1], v[3]));
  }
}

FUSED_ATTN_INLINE float reduce_add(Vec v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

FUSED_ATTN_INLINE float reduce_max(Vec v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Lane i of the result is the sum of r[i]: a transposition with an addition at
// each step.
template <int kHalf = kVec / 2>
FUSED_ATTN_INLINE Vec reduce_add_each(Vec (&r)[kVec]) {
  VecI low, high;
  for (int lane = 0; lane < kVec; ++lane) {
    low[lane] = (lane & kHalf) ? kVec + lane - kHalf : lane;
    high[lane] = (lane & kHalf) ? kVec + lane : lane + kHalf;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    const Vec a = r[i];
    const Vec b = r[i + kHalf];
    r[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
  if constexpr (kHalf > 1)
    return reduce_add_each<kHalf / 2>(r);
  else
    return r[0];
}

FUSED_ATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// --- loads and stores ---------------------------------------------------------------------

FUSED_ATTN_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

FUSED_ATTN_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

FUSED_ATTN_INLINE Vec load(const BFloat16* p) {
#if defined(FUSED_ATTN_ISA_AVX2)
  // GCC 12 makes five instructions of the conversion below.
  const VecU wide = reinterpret_cast<VecU>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  const VecU wide = __builtin_convertvector(h, VecU);
#endif
  VecU u = wide << 16;
  Vec v;
  std::memcpy(&v, &u, sizeof(v));
  return v;
}

FUSED_ATTN_INLINE void store(BFloat16* p, Vec v) {
  VecU u;
  std::memcpy(&u, &v, sizeof(v));
  // Round to nearest even; NaN stays a quiet NaN.
  VecU rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  VecI is_nan = v != v;
  rounded = is_nan ? (VecU{} + 0x7FC0u) : rounded;
  VecH h = __builtin_convertvector(rounded, VecH);
  std::memcpy(p, &h, sizeof(h));
}

FUSED_ATTN_INLINE Vec load(const Half* p) {
#if defined(FUSED_ATTN_ISA_AVX512)
  __m512 v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec&>(v);
#elif defined(FUSED_ATTN_ISA_AVX2)
  __m256 v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vec&>(v);
#else
  Vec v;
  for (int i = 0; i < kVec; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

FUSED_ATTN_INLINE void store(Half* p, Vec v) {
#if defined(FUSED_ATTN_ISA_AVX512)
  __m256i h = _mm512_cvtps_ph(reinterpret_cast<__m512&>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
#elif defined(FUSED_ATTN_ISA_AVX2)
  __m128i h = _mm256_cvtps_ph(reinterpret_cast<__m256&>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
#else
  for (int i = 0; i < kVec; ++i) p[i] = from_float<Half>(v[i]);
#endif
}

#if defined(FUSED_ATTN_ISA_AVX2)
// All ones in the first n lanes.
FUSED_ATTN_INLINE __m256i first_lanes(int64_t n) {
  return reinterpret_cast<__m256i>(iota() < static_cast<int32_t>(n));
}
#endif

// The first n lanes; the others hold `fill`. Reads nothing past p[n - 1]. (With AVX-512 the
// compiler makes one masked instruction of either loop.)
template <typename T>
FUSED_ATTN_INLINE Vec load_partial(const T* p, int64_t n, float fill = 0.0f) {
  Vec v = broadcast(fill);
#if defined(FUSED_ATTN_ISA_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    const __m256i lanes = first_lanes(n);
    return select(reinterpret_cast<VecI>(lanes),
                  reinterpret_cast<Vec>(_mm256_maskload_ps(p, lanes)), v);
  }
#endif
  for (int i = 0; i < kVec; ++i)
    if (i < n) v[i] = to_float(p[i]);
  return v;
}

template <typename T>
FUSED_ATTN_INLINE void store_partial(T* p, Vec v, int64_t n) {
#if defined(FUSED_ATTN_ISA_AVX2)
  if constexpr (std::is_same_v<T, float>)
    return _mm256_maskstore_ps(p, first_lanes(n), reinterpret_cast<__m256>(v));
#endif
  for (int i = 0; i < kVec; ++i)
    if (i < n) p[i] = from_float<T>(v[i]);
}

// --- functions ----------------------------------------------------------------------------

FUSED_ATTN_INLINE Vec as_vec(VecI i) {
  Vec v;
  std::memcpy(&v, &i, sizeof(v));
  return v;
}

// e^x to about 1 unit in the last place for x in [-87.3, 88.3]; 0 below, +inf above, NaN for
// NaN. x = n ln 2 + r with |r| <= ln 2 / 2 and a degree-6 polynomial in r.
FUSED_ATTN_INLINE Vec exp(Vec x) {
  const Vec clamped = min(max(x, broadcast(-87.4f)), broadcast(88.8f));
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clamped * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = clamped - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Vec p = broadcast(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, since n may be 128 just below the overflow.
  const VecI ni = __builtin_convertvector(n, VecI);
  const VecI half = ni >> 1;
  Vec result = p * as_vec((half + 127) << 23) * as_vec((ni - half + 127) << 23);
  result = select(x < broadcast(-87.33654f), Vec{}, result);
  result = select(x > broadcast(88.72283f), broadcast(kInfinity), result);
  return select(x != x, x, result);
}

// To about 2 units in the last place; NaN for NaN.
FUSED_ATTN_INLINE Vec tanh(Vec x) {
  const Vec size = max(x, -x);
  // An odd polynomial near 0, where the formula below would cancel (Cephes, tanhf).
  const Vec z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * x + x;
  const Vec far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return select(size < broadcast(0.625f), near, select(x < Vec{}, -far, far));
}

// 1 / (1 + e^-x); NaN for NaN.
FUSED_ATTN_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// The value without its sign.
FUSED_ATTN_INLINE Vec magnitude(Vec x) {
  return as_vec(reinterpret_cast<VecI>(x) & std::numeric_limits<int32_t>::max());
}

// `below` where the sign bit of x is set, else `above`.
FUSED_ATTN_INLINE Vec by_sign(Vec x, Vec below, Vec above) {
  return select(reinterpret_cast<VecI>(x) < VecI{}, below, above);
}

// Adding it rounds a number in [-127, 0] to an integer n and leaves n + 127, the exponent of 2^n,
// in the low bits: 2^-127 becomes 0.
constexpr float kExponent = 12582912.0f + 127.0f;  // 1.5 * 2^23

// 2^(n + r), where `shifted` is kExponent + n and |r| <= 1/2, to about 1 unit in the last place.
// The polynomial has the least relative error of its degree.
FUSED_ATTN_INLINE Vec exp2_of_negative(Vec shifted, Vec r) {
  Vec p = broadcast(1.5345789e-4f);
  p = p * r + 1.3399930861e-3f;
  p = p * r + 9.6184890476e-3f;
  p = p * r + 5.5503287784e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.9314720574e-1f;
  p = p * r + 1.0f;
  return p * as_vec(reinterpret_cast<VecI>(shifted) << 23);
}

// e^x for x <= 0, to about 1 unit in the last place: `exp` with less to watch. 0 below -87.7, NaN
// for NaN.
FUSED_ATTN_INLINE Vec exp_of_negative(Vec x) {
  x = max(broadcast(-88.0f), x);
  const Vec shifted = x * 1.44269504088896341f + kExponent;
  const Vec n = shifted - kExponent;
  Vec r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  return exp2_of_negative(shifted, r * 1.44269504088896341f);
}

// 1 / (1 + e^-x) and its derivative. Neither overflows nor cancels at either end.
struct Sigmoid {
  Vec value;
  Vec slope;
};

FUSED_ATTN_INLINE Sigmoid sigmoid_with_slope(Vec x) {
  const Vec e = exp_of_negative(-magnitude(x));
  const Vec r = 1.0f / (1.0f + e);
  const Vec below = e * r;
  return {by_sign(x, below, r), below * r};
}

// The standard normal distribution: P(X <= x) = (1 + erf(x / sqrt(2))) / 2 to about 3 units in the
// last place, and for x < 0, where that formula cancels, to as many as e^(-x^2 / 2), the second
// result, has: its density but for a factor. NaN for NaN.
//
// Below 0 the probability is e^(-x^2 / 2) times Mills' ratio over sqrt(2 pi) (DLMF 7.8.1,
// https://dlmf.nist.gov/7.8), for which is taken P(|x|) / Q(|x|) of the least relative error over
// [0, 13.4], by Remez's algorithm: 9e-9.
struct Normal {
  Vec probability;
  Vec bell;
};

FUSED_ATTN_INLINE Normal normal_distribution(Vec x) {
  constexpr float kMinusHalfLog2E = -0.72134751081466675f;  // nearest to -log2(e) / 2, by 1 in 10^8
  const Vec square = min(broadcast(176.0f), x * x);         // beyond, the bell is 0
  const Vec shifted = square * kMinusHalfLog2E + kExponent;
  const Vec bell = exp2_of_negative(shifted, square * kMinusHalfLog2E - (shifted - kExponent));
  const Vec a = min(broadcast(14.0f), magnitude(x));  // whose powers stay finite
  Vec p = broadcast(3.854847672e-3f);
  p = p * a + 3.891709544e-2f;
  p = p * a + 1.782163616e-1f;
  p = p * a + 4.316352405e-1f;
  p = p * a + 0.5f;
  Vec q = broadcast(9.662505624e-3f);
  q = q * a + 9.755903536e-2f;
  q = q * a + 4.562013973e-1f;
  q = q * a + 1.181840834f;
  q = q * a + 1.661155168f;
  q = q * a + 1.0f;
  const Vec below = bell * (p / q);
  return {by_sign(x, below, 1.0f - below), bell};
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
