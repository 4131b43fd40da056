// Sums of exponentials of logits in one pass, without waiting for their maximum.
//
// Include it from kernel headers only, as vec.h.
#pragma once

#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

// Logits summed at a time.
constexpr int64_t kSumBlock = 1024;
constexpr int kUnroll = 2;
static_assert(kSumBlock % (kUnroll * kVec) == 0);

// Bytes ahead of the sums that are fetched into the cache: the processor's own prefetcher stops at
// the end of a page, which is one block of fp32.
constexpr int64_t kPrefetch = 4096;
constexpr int64_t kCacheLine = 64;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct BlockSum {
  Vec sum;
  Vec max;
  bool is_far;  // a term was below 2^-126, and the sum is not to be used
};

// Exponentials are 2^(i / kSteps) * 2^(f / kSteps) with i an integer and |f| <= 1/2: the first
// factor from a table that registers hold, the second a polynomial. The table is looked up on a
// port that the arithmetic leaves idle, and saves two degrees.
//
// Of the table's entries the bits of 2^(j / kSteps) less j << kTableShift, exponent 0: adding
// (kSteps n + j) << kTableShift gives those of 2^(n - 127 + j / kSteps).
#if defined(FUSED_ATTN_ISA_AVX512)
constexpr int kSteps = 16;
constexpr int kTableShift = 19;
alignas(64) constexpr int32_t kPowers[kSteps] = {
    0,       -152893, -289342, -408621, -509968, -592590, -655657, -698305,
    -719629, -718684, -694486, -646004, -572163, -471841, -343865, -187011};
#else
constexpr int kSteps = 8;
constexpr int kTableShift = 20;
alignas(64) constexpr int32_t kPowers[kSteps] = {0,       -289342, -509968, -655657,
                                                 -719629, -694486, -572163, -343865};
#endif
static_assert((kSteps << kTableShift) == 1 << 23);

// Adding it rounds a small number i to an integer and leaves i + 127 * kSteps in the low bits.
constexpr float kRounding = 12582912.0f + 127.0f * kSteps;  // 1.5 * 2^23
// What is left of the smallest power of two that is not subnormal, 2^-126.
constexpr float kLowest = 12582912.0f + kSteps;
// Integers that may be taken from kRounding without leaving [2^23, 2^24], where the sum of it and
// any number is rounded to an integer.
constexpr float kMostSteps = 4000000.0f;

// a * b + c, rounded once where kIsFused.
#if defined(FUSED_ATTN_ISA_AVX512)
constexpr bool kIsFused = true;
FUSED_ATTN_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}
#elif defined(FUSED_ATTN_ISA_AVX2)
constexpr bool kIsFused = true;
FUSED_ATTN_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
}
#else
constexpr bool kIsFused = false;
FUSED_ATTN_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

// What exponentials are relative to: e^((x - value) / temperature) is 2^(i / kSteps) for
// i = (x - distant) * scale + rounding - kRounding.
struct Reference {
  float distant;   // 0 where the steps are whole
  float rounding;  // kRounding less the steps of the reference
  double value;
};

// Near `x`. Rounded to a whole number of steps where that can be, so that no subtraction is needed
// besides the one that the rounding does; x * scale must not be rounded by itself for that. The
// scale is not exactly kSteps / ln 2 / temperature, but the value is that of the scale.
static inline Reference make_reference(float x, float scale) {
  const float steps = x * scale;
  if (kIsFused && std::fabs(steps) <= kMostSteps) {
    const float rounded = (steps + 12582912.0f) - 12582912.0f;
    return {0.0f, kRounding - rounded, static_cast<double>(rounded) / scale};
  }
  // Of NaN and +inf any reference makes NaN.
  const float distant = std::fabs(x) < kInfinity ? x : 0.0f;
  return {distant, kRounding, distant};
}

// 2^(i / kSteps) in each lane for the integer in the low bits of kRounding + i.
FUSED_ATTN_INLINE Vec power_of_steps(Vec shifted) {
  const VecI index = reinterpret_cast<VecI>(shifted);
  VecI power;
#if defined(FUSED_ATTN_ISA_AVX512)
  power = reinterpret_cast<VecI>(
      _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(index), _mm512_load_si512(kPowers)));
#elif defined(FUSED_ATTN_ISA_AVX2)
  power = reinterpret_cast<VecI>(
      _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(kPowers)),
                                  reinterpret_cast<__m256i>(index)));
#else
  for (int i = 0; i < kVec; ++i) power[i] = kPowers[index[i] & (kSteps - 1)];
#endif
  return as_vec(power + (index << kTableShift));
}

// The lower of each lane's numbers as integers: of positive floats the lower, and any negative one
// is below these. It runs on any port, where the maximum of floats has two.
FUSED_ATTN_INLINE VecI lower_bits(VecI a, VecI b) { return a < b ? a : b; }

// sum + e^((x - reference) / temperature), to 1e-7 of the term; NaN for NaN and +inf.
//
// kFar: also where the term is below 2^-126; it counts as about that. Otherwise `lowest` tells.
template <bool kFar>
FUSED_ATTN_INLINE Vec add_exp(Vec sum, Vec x, Vec scale, Vec distant, Vec rounding, VecI& lowest) {
  if constexpr (kFar) x = x - distant;
  Vec shifted = multiply_add(x, scale, rounding);
  // NaN is the second operand, which max() returns.
  if constexpr (kFar)
    shifted = max(broadcast(kLowest), shifted);
  else
    lowest = lower_bits(lowest, reinterpret_cast<VecI>(shifted));
  Vec f = multiply_add(x, scale, rounding - shifted);
  if constexpr (kFar) f = max(broadcast(-1.0f), f);
  // 2^(f / kSteps): near-minimax in the relative error, exact at 0.
#if defined(FUSED_ATTN_ISA_AVX512)
  Vec p = broadcast(1.355080778e-05f);
  p = p * f + 9.384141450e-04f;
  p = p * f + 4.332169878e-02f;
#else
  Vec p = broadcast(1.0839104652404785e-4f);
  p = p * f + 3.7540255580097437e-3f;
  p = p * f + 8.664340525865555e-2f;
#endif
  p = p * f + 1.0f;
  return p * power_of_steps(shifted) + sum;
}

// Sum of e^((logit - reference) / temperature) and maximum by lane. A NaN is in the sum and not in
// the maximum.
template <bool kFar, typename T>
static inline BlockSum sum_block(const T* logits, int64_t count, const Reference& reference,
                                 float scale_of_all) {
  Vec sums[kUnroll] = {};
  Vec maxima[kUnroll];
  VecI lowest[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    maxima[u] = broadcast(kMinusInfinity);
    lowest[u] = reinterpret_cast<VecI>(broadcast(kInfinity));
  }
  const Vec scale = broadcast(scale_of_all);
  const Vec distant = broadcast(reference.distant);
  const Vec rounding = broadcast(reference.rounding);
  int64_t i = 0;
  for (; i + kUnroll * kVec <= count; i += kUnroll * kVec) {
    constexpr int64_t kStep = kUnroll * kVec * sizeof(T);
    const char* ahead = reinterpret_cast<const char*>(logits + i) + kPrefetch;
    for (int64_t line = 0; line < kStep; line += kCacheLine) __builtin_prefetch(ahead + line);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec x = load(logits + i + u * kVec);
      maxima[u] = max(x, maxima[u]);
      sums[u] = add_exp<kFar>(sums[u], x, scale, distant, rounding, lowest[u]);
    }
  }
  for (; i + kVec <= count; i += kVec) {
    const Vec x = load(logits + i);
    maxima[0] = max(x, maxima[0]);
    sums[0] = add_exp<kFar>(sums[0], x, scale, distant, rounding, lowest[0]);
  }
  if (i < count) {
    const Vec x = load_partial(logits + i, count - i, kMinusInfinity);
    maxima[0] = max(x, maxima[0]);
    sums[0] = add_exp<true>(sums[0], x, scale, distant, rounding, lowest[0]);
  }
  for (int u = 1; u < kUnroll; ++u) {
    sums[0] += sums[u];
    maxima[0] = max(maxima[0], maxima[u]);
    lowest[0] = lower_bits(lowest[0], lowest[u]);
  }
  return {sums[0], maxima[0], greater_lanes(broadcast(kLowest), as_vec(lowest[0])) != 0};
}

// The largest logit; NaN where there is one.
template <typename T>
static float max_or_nan(const T* logits, int64_t count) {
  Vec maximum = broadcast(kMinusInfinity);
  Vec nan = {};  // 0, or NaN
  for (int64_t i = 0; i < count; i += kVec) {
    const Vec x =
        i + kVec <= count ? load(logits + i) : load_partial(logits + i, count - i, kMinusInfinity);
    maximum = max(x, maximum);
    nan += select(x != x, x, Vec{});
  }
  return reduce_max(maximum) + reduce_add(nan);
}

// Where a row looks for its first reference, before it looks at the whole block.
constexpr int64_t kSample = 64;

// sum over the logits of e^(logit / temperature - reference); the reference is -inf and the sum 0
// where all logits are -inf. The sum is NaN where a logit is NaN or +inf.
struct ExpSum {
  double sum;
  double reference;
};

// Leaves the maxima of each block by lane in `maxima`, kVec a block, unless that is null.
//
// The exponentials are relative to a reference that need not be the maximum, only near enough
// that nothing overflows and that the largest does not vanish: a block is summed and its maxima
// taken in one pass, and done again with its maximum as the reference if that exceeds the old
// one by more than kSlack. So sum * e^reference is at least a sample's largest exponential, and
// what the clamp adds for a logit far below is at most 1e-37 of it. Clamps are left out until a
// block turns out to need them; where they change nothing, the sum is the same bits.
template <typename T>
static ExpSum sum_exp(const T* logits, int64_t count, double temperature, float* maxima) {
  constexpr double kSlack = 16.0;
  typedef double VecD __attribute__((vector_size(kVec * 8)));
  // Finite for any temperature: 0 times it must be 0.
  const double exact_scale = kSteps * 1.4426950408889634 / temperature;
  const float scale = exact_scale < 1e38 ? static_cast<float>(exact_scale) : 1e38f;
  VecD sum = {};
  bool has_reference = false;
  bool is_far = false;
  Reference reference{};
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const T* block = logits + begin;
    const int64_t size = count - begin < kSumBlock ? count - begin : kSumBlock;
    if (!has_reference) {
      float near = max_or_nan(block, size < kSample ? size : kSample);
      if (near == kMinusInfinity) near = max_or_nan(block, size);
      if (near == kMinusInfinity) {
        if (maxima) store(maxima + begin / kSumBlock * kVec, broadcast(kMinusInfinity));
        continue;
      }
      reference = make_reference(near, scale);
      has_reference = true;
    }
    BlockSum part;
    if (!is_far) {
      part = sum_block<false>(block, size, reference, scale);
      is_far = part.is_far || reference.distant != 0.0f;
    }
    if (is_far) part = sum_block<true>(block, size, reference, scale);
    const float limit = static_cast<float>(reference.value + kSlack * temperature);
    if (greater_lanes(part.max, broadcast(limit)) != 0) {
      const Reference former = reference;
      reference = make_reference(reduce_max(part.max), scale);
      sum *= std::exp((former.value - reference.value) / temperature);
      part = sum_block<true>(block, size, reference, scale);
    }
    sum += __builtin_convertvector(part.sum, VecD);
    if (maxima) store(maxima + begin / kSumBlock * kVec, part.max);
  }
  double total = 0.0;
  for (int lane = 0; lane < kVec; ++lane) total += sum[lane];
  const double none = -std::numeric_limits<double>::infinity();
  return {total, has_reference ? reference.value / temperature : none};
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
