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

// The keys of each round, ready for the vector of words that they change.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t key_0 = static_cast<uint32_t>(seed);
    uint32_t key_1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      first[round] = Vec64{} + key_0;
      second[round] = Vec64{} + key_1;
      key_0 += 0x9E3779B9u;
      key_1 += 0xBB67AE85u;
    }
  }

  Vec64 first[10];
  Vec64 second[10];
};

// Lanes (2 i, 2 i + 1) of the result hold lane 2 i (+ 1 with kOdd) of a and of b.
template <bool kOdd>
FUSED_ATTN_INLINE Vec64 interleave(Vec64 a, Vec64 b) {
#if defined(FUSED_ATTN_ISA_AVX512)
  const __m512i x = reinterpret_cast<__m512i>(a);
  const __m512i y = reinterpret_cast<__m512i>(b);
  return reinterpret_cast<Vec64>(kOdd ? _mm512_unpackhi_epi64(x, y) : _mm512_unpacklo_epi64(x, y));
#elif defined(FUSED_ATTN_ISA_AVX2)
  const __m256i x = reinterpret_cast<__m256i>(a);
  const __m256i y = reinterpret_cast<__m256i>(b);
  return reinterpret_cast<Vec64>(kOdd ? _mm256_unpackhi_epi64(x, y) : _mm256_unpacklo_epi64(x, y));
#else
  Vec64 r;
  for (int lane = 0; lane < kCounters; lane += 2) {
    r[lane] = a[lane + kOdd];
    r[lane + 1] = b[lane + kOdd];
  }
  return r;
#endif
}

// Blocks of counters that are computed side by side: each round waits for the one before it, so
// one block alone would leave the multipliers idle.
constexpr int kBlocks = 2;
constexpr int64_t kBlockElements = 4 * kBlocks * kCounters;

// The words of kBlocks * kCounters counters, compared with the threshold: all ones where a word is
// at least that, in the order of the elements.
FUSED_ATTN_INLINE void philox_keep(const PhiloxKeys& keys, uint32_t threshold, uint64_t counter,
                                   uint32_t* keep) {
  const Vec64 multiplier_0 = Vec64{} + 0xD2511F53u;
  const Vec64 multiplier_1 = Vec64{} + 0xCD9E8D57u;
  Vec64 words[kBlocks][4];
  for (int b = 0; b < kBlocks; ++b) {
    const Vec64 index = counter_of_lane() + (counter + b * kCounters);
    words[b][0] = index;
    words[b][1] = index >> 32;
    words[b][2] = Vec64{};
    words[b][3] = Vec64{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (auto& word : words) {
      const Vec64 product_0 = multiply_low(word[0], multiplier_0);
      const Vec64 product_1 = multiply_low(word[2], multiplier_1);
      word[0] = (product_1 >> 32) ^ word[1] ^ keys.first[round];
      word[2] = (product_0 >> 32) ^ word[3] ^ keys.second[round];
      word[1] = product_1;
      word[3] = product_0;
    }
  }
  const VecU least = VecU{} + threshold;
  for (const auto& word : words) {
    const Vec64 front = (word[0] & 0xFFFFFFFFu) | (word[1] << 32);
    const Vec64 back = (word[2] & 0xFFFFFFFFu) | (word[3] << 32);
    const VecI low = reinterpret_cast<VecU>(interleave<false>(front, back)) >= least;
    const VecI high = reinterpret_cast<VecU>(interleave<true>(front, back)) >= least;
    std::memcpy(keep, &low, sizeof(low));
    std::memcpy(keep + kVec, &high, sizeof(high));
    keep += 2 * kVec;
  }
}

// Room that `dropout_keep` needs for `count` elements, the last of which may be read as a vector.
inline int64_t dropout_keep_capacity(int64_t count) {
  return (count + 3 + kVec + kBlockElements - 1) / kBlockElements * kBlockElements;
}

// The dropout mask of elements [first, first + count): all ones where the element is kept, else
// zero. Writes to `buffer` and returns where in it the first element is.
FUSED_ATTN_INLINE const uint32_t* dropout_keep(const PhiloxKeys& keys, uint32_t threshold,
                                               int64_t first, int64_t count, uint32_t* buffer) {
  const int64_t skip = first % 4;
  uint64_t counter = static_cast<uint64_t>(first / 4);
  for (int64_t done = 0; done < skip + count; done += kBlockElements) {
    philox_keep(keys, threshold, counter, buffer + done);
    counter += kBlocks * kCounters;
  }
  return buffer + skip;
}

FUSED_ATTN_INLINE Vec keep_or_zero(Vec value, const uint32_t* keep) {
  VecU mask;
  std::memcpy(&mask, keep, sizeof(mask));
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(value) & mask);
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
