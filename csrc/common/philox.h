// Philox 4x32-10: the dropout masks of the CPU kernels, bit for bit those of
// fused_attn/ops/_philox.py. Element i takes word i % 4 of counter (i / 4, 0, 0).
//
// Reference: Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405
//
// Include it from kernel headers only, as vec.h.
#pragma once

#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

// Four counters are four vectors of 64-bit lanes with the word in the low half: that is the form
// in which the instruction set multiplies 32 x 32 bits, and what is left in the high half never
// reaches a low one.
constexpr int kCounters = kVec / 2;
typedef uint64_t Vec64 __attribute__((vector_size(kCounters * 8)));

// Product of the low halves of each lane.
FUSED_ATTN_INLINE Vec64 multiply_low(Vec64 a, Vec64 b) {
#if defined(FUSED_ATTN_ISA_AVX512)
  return reinterpret_cast<Vec64>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(FUSED_ATTN_ISA_AVX2)
  return reinterpret_cast<Vec64>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec64>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Number of a lane's counter within its block: even lanes hold the first half, odd lanes the
// second, so that interleaving the lanes of two vectors gives neighbours.
FUSED_ATTN_INLINE Vec64 counter_of_lane() {
  Vec64 r;
  for (int lane = 0; lane < kCounters; ++lane)
    r[lane] = static_cast<uint64_t>((lane % 2) * (kCounters / 2) + lane / 2);
  return r;
}

// Words of counters [counter, counter + kCounters), compared with the threshold: all ones where
// the word is at least that. 4 * kCounters results, in the order of the elements.
FUSED_ATTN_INLINE void philox_keep(uint64_t seed, uint32_t threshold, uint64_t counter,
                                   uint32_t* keep) {
  const Vec64 multiplier_0 = Vec64{} + 0xD2511F53u;
  const Vec64 multiplier_1 = Vec64{} + 0xCD9E8D57u;
  const Vec64 index = counter_of_lane() + counter;
  Vec64 word_0 = index;
  Vec64 word_1 = index >> 32;
  Vec64 word_2 = Vec64{};
  Vec64 word_3 = Vec64{};
  uint32_t key_0 = static_cast<uint32_t>(seed);
  uint32_t key_1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Vec64 product_0 = multiply_low(word_0, multiplier_0);
    const Vec64 product_1 = multiply_low(word_2, multiplier_1);
    word_0 = (product_1 >> 32) ^ word_1 ^ (Vec64{} + key_0);
    word_2 = (product_0 >> 32) ^ word_3 ^ (Vec64{} + key_1);
    word_1 = product_1;
    word_3 = product_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  const Vec64 first = (word_0 & 0xFFFFFFFFu) | (word_1 << 32);
  const Vec64 second = (word_2 & 0xFFFFFFFFu) | (word_3 << 32);
  Vec64 low;
  Vec64 high;
#if defined(FUSED_ATTN_ISA_AVX512)
  low = reinterpret_cast<Vec64>(
      _mm512_unpacklo_epi64(reinterpret_cast<__m512i>(first), reinterpret_cast<__m512i>(second)));
  high = reinterpret_cast<Vec64>(
      _mm512_unpackhi_epi64(reinterpret_cast<__m512i>(first), reinterpret_cast<__m512i>(second)));
#elif defined(FUSED_ATTN_ISA_AVX2)
  low = reinterpret_cast<Vec64>(
      _mm256_unpacklo_epi64(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second)));
  high = reinterpret_cast<Vec64>(
      _mm256_unpackhi_epi64(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second)));
#else
  for (int lane = 0; lane < kCounters; lane += 2) {
    low[lane] = first[lane];
    low[lane + 1] = second[lane];
    high[lane] = first[lane + 1];
    high[lane + 1] = second[lane + 1];
  }
#endif
  const VecU least = VecU{} + threshold;
  const VecI keep_low = reinterpret_cast<VecU>(low) >= least;
  const VecI keep_high = reinterpret_cast<VecU>(high) >= least;
  std::memcpy(keep, &keep_low, sizeof(keep_low));
  std::memcpy(keep + kVec, &keep_high, sizeof(keep_high));
}

// Room that `dropout_keep` needs for `count` elements, the last of which may be read as a vector.
inline int64_t dropout_keep_capacity(int64_t count) {
  constexpr int64_t kBlock = 4 * kCounters;
  return (count + 3 + kVec + kBlock - 1) / kBlock * kBlock;
}

// The dropout mask of elements [first, first + count): all ones where the element is kept, else
// zero. Writes to `buffer` and returns where in it the first element is.
FUSED_ATTN_INLINE const uint32_t* dropout_keep(uint64_t seed, uint32_t threshold, int64_t first,
                                               int64_t count, uint32_t* buffer) {
  const int64_t skip = first % 4;
  uint64_t counter = static_cast<uint64_t>(first / 4);
  for (int64_t done = 0; done < skip + count; done += 4 * kCounters, counter += kCounters)
    philox_keep(seed, threshold, counter, buffer + done);
  return buffer + skip;
}

FUSED_ATTN_INLINE Vec keep_or_zero(Vec value, const uint32_t* keep) {
  VecU mask;
  std::memcpy(&mask, keep, sizeof(mask));
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(value) & mask);
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
