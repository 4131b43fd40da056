// Kernels that go through tensors row by row: loops over the vectors of a row, its tail included,
// prefetching, dropout.
//
// Include it from kernel headers only, as vec.h.
#pragma once

#include "common/philox.h"
#include "common/strided_rows.h"
#include "common/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

using FullVec = std::integral_constant<int64_t, kVec>;

template <typename T>
FUSED_ATTN_INLINE Vec load_lanes(const T* p, FullVec) {
  return load(p);
}

template <typename T>
FUSED_ATTN_INLINE Vec load_lanes(const T* p, int64_t lanes) {
  return load_partial(p, lanes);
}

template <typename T>
FUSED_ATTN_INLINE void store_lanes(T* p, Vec v, FullVec) {
  store(p, v);
}

template <typename T>
FUSED_ATTN_INLINE void store_lanes(T* p, Vec v, int64_t lanes) {
  store_partial(p, v, lanes);
}

// Stores past the caches, which then need not read the line first: for a row that begins at a cache
// line and ends at one, of a tensor that no cache would hold until somebody reads it. The baseline,
// and tails, store as ever.
template <typename T>
FUSED_ATTN_INLINE void stream_lanes(T* p, Vec v, FullVec) {
  T lanes[kVec];
  store(lanes, v);
#if defined(FUSED_ATTN_ISA_AVX512)
  if constexpr (sizeof(T) == 4)
    _mm512_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m512>(v));
  else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
#elif defined(FUSED_ATTN_ISA_AVX2)
  if constexpr (sizeof(T) == 4)
    _mm256_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m256>(v));
  else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes)));
#else
  std::memcpy(p, lanes, sizeof(lanes));
#endif
}

template <typename T>
FUSED_ATTN_INLINE void stream_lanes(T* p, Vec v, int64_t lanes) {
  store_lanes(p, v, lanes);
}

// Makes what was streamed visible to whom this thread wakes next.
FUSED_ATTN_INLINE void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

FUSED_ATTN_INLINE Vec zero_beyond(Vec v, FullVec) { return v; }

FUSED_ATTN_INLINE Vec zero_beyond(Vec v, int64_t lanes) {
  return select(iota() < static_cast<int32_t>(lanes), v, Vec{});
}

// Sums have this many accumulators: a chain of dependent additions would wait for each.
constexpr int kSlots = 4;

// Calls body(i, lanes, slot) for each vector of the row: columns [i, i + lanes).
template <typename Body>
FUSED_ATTN_INLINE void for_vectors(int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + kSlots * kVec <= width; i += kSlots * kVec) {
#pragma GCC unroll 4
    for (int slot = 0; slot < kSlots; ++slot) body(i + slot * kVec, FullVec{}, slot);
  }
  for (; i + kVec <= width; i += kVec) body(i, FullVec{}, 0);
  if (i < width) body(i, width - i, 0);
}

// The processor's own prefetcher does not cross from one row to the next in time. So each pass
// over a row, which finds its data in the cache, asks for a part of what the passes to come need:
// the lines of columns [i, i + kSlots * kVec) of another row. Called for slot 0 alone.
template <typename T>
FUSED_ATTN_INLINE void prefetch(const T* row, int64_t i) {
#pragma GCC unroll 8
  for (int64_t k = 0; k < kSlots * kVec; k += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + i + k);
}

template <typename T>
FUSED_ATTN_INLINE void prefetch_to_write(T* row, int64_t i) {
#pragma GCC unroll 8
  for (int64_t k = 0; k < kSlots * kVec; k += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + i + k, 1);
}

FUSED_ATTN_INLINE float total_of(const Vec (&slots)[kSlots]) {
  return reduce_add((slots[0] + slots[1]) + (slots[2] + slots[3]));
}

inline int64_t padded(int64_t width) { return (width + kVec - 1) / kVec * kVec; }

template <typename T>
FUSED_ATTN_INLINE const T* row_of(const StridedRows& rows, int64_t r) {
  const T* data = static_cast<const T*>(rows.data);
  // Rows with one stride do without the division, which takes as long as dozens of vectors.
  if (r < rows.inner) return data + r * rows.inner_stride;
  return data + (r / rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride;
}

// total[i] = sum over chunks of partial[chunk, i], in the order of the chunks, for columns [begin,
// end) of `width`.
static inline void sum_chunks(const float* partial, int64_t chunks, int64_t width, float* total,
                              int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) total[i] = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = begin; i < end; ++i) total[i] += partial[chunk * width + i];
}

template <bool kHasDropout>
FUSED_ATTN_INLINE Vec drop(Vec value, const uint32_t* keep, int64_t i, Vec scale) {
  if constexpr (kHasDropout) return keep_or_zero(value * scale, keep + i);
  return value;
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
