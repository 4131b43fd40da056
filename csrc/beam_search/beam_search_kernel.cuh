// CUDA kernels of beam_search. How they choose, and what bounds them, is in the op's README.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "beam_search/beam_search_cuda.h"
#include "common/cuda.cuh"
#include "common/device.cuh"
#include "common/ptx.cuh"

namespace fused_attn {
namespace beam_search {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = kBeamSearchCudaChunk;
static_assert(kWarps == kBeamSearchCudaSums);

// Groups of tokens or keys whose best one is known while a bound is sought.
constexpr int kGroups = 2 * kThreads;
constexpr int kGroupTokens = kChunk / kGroups;

// Keys that the merge and the ranking take in at a time.
constexpr int kTile = 2048;

constexpr float kLog2E = 1.4426950408889634f;

// --- keys -----------------------------------------------------------------------------------

// Whether a running score or a total can be chosen: not -inf and not NaN.
__device__ inline bool is_possible(float score) { return score > -INFINITY; }

// Bits in the order of the numbers. -0 counts as 0.
__device__ inline uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

// A logit and its token as one integer, never 0 for a number: the larger logit is the larger key,
// and among equal ones the lower token.
__device__ inline uint64_t make_key(float logit, uint32_t token) {
  return (static_cast<uint64_t>(ordered_bits(logit)) << 32) | (0xFFFFFFFFu - token);
}

__device__ inline float key_logit(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered ^ ((ordered >> 31) ? 0x80000000u : 0xFFFFFFFFu));
}

__device__ inline uint32_t key_token(uint64_t key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

// A total as a key of its sentence: among equal totals the lower beam, then the better place in the
// beam's own order.
__device__ inline uint64_t make_rank_key(float total, int beam, int place) {
  const uint32_t order =
      (0xFFFFu - static_cast<uint32_t>(beam)) << 16 | (0xFFFFu - static_cast<uint32_t>(place));
  return (static_cast<uint64_t>(ordered_bits(total)) << 32) | order;
}

__device__ inline int rank_key_beam(uint64_t key) {
  return 0xFFFF - static_cast<int>(key >> 16 & 0xFFFF);
}

__device__ inline int rank_key_place(uint64_t key) {
  return 0xFFFF - static_cast<int>(key & 0xFFFF);
}

// --- the best of many -------------------------------------------------------------------------

// How many a bound may let pass that is sought for `wanted`: an exact one takes more steps.
__host__ __device__ constexpr int at_most(int wanted) { return wanted + wanted / 8; }

// Shared memory of one block for its choice. Two buffers of keys are the dynamic part.
struct Selection {
  int capacity;          // of a buffer
  uint64_t* group_best;  // [kGroups]; 0 where the group is empty
  uint64_t* bound;
  int* count;
  int front = 0;  // where the keys are; the other buffer is spare

  __device__ uint64_t* keys() const {
    return reinterpret_cast<uint64_t*>(dynamic_shared()) + front;
  }
  __device__ uint64_t* spare() const {
    return reinterpret_cast<uint64_t*>(dynamic_shared()) + (capacity - front);
  }
  __device__ void swap() { front = capacity - front; }
};

// A bound that at least `wanted` and at most `at_most(wanted)` of the groups' best exceed, or
// `floor` if no more exceed that. By one warp; keys are different unless they are 0.
__device__ inline uint64_t find_bound(const volatile uint64_t* group_best, uint64_t floor,
                                      int wanted) {
  // Volatile, since the compiler would keep all of them in registers that the caller needs.
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto count_above = [&](uint64_t bound) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kGroups; i += kWarp) count += group_best[i + lane] > bound ? 1 : 0;
    return warp_sum(count);
  };
  if (count_above(floor) <= at_most(wanted)) return floor;
  uint64_t low = floor, high = 0;
#pragma unroll
  for (int i = 0; i < kGroups; i += kWarp) {
    const uint64_t best = group_best[i + lane];
    high = max(high, best);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    high = max(high, static_cast<uint64_t>(__shfl_xor_sync(
                         kFullMask, static_cast<unsigned long long>(high), offset)));
  // Too many exceed `low`, too few `high`.
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    const int count = count_above(middle);
    if (count > at_most(wanted))
      low = middle;
    else if (count < wanted)
      high = middle;
    else
      return middle;
  }
  return low;
}

// Leaves the `wanted` largest of keys[0, n) in s.keys(), the largest first, and returns how many.
// They are different and not 0. Barriers must stand between the keys' stores and the call, and
// between the call and the next store to *s.count.
__device__ inline int sort_best(Selection& s, int n, int wanted) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  while (n > max(kThreads, at_most(wanted))) {
#pragma unroll 1
    for (int group = thread; group < kGroups; group += kThreads) {
      uint64_t best = 0;
#pragma unroll 1
      for (int i = group; i < n; i += kGroups) best = max(best, s.keys()[i]);
      s.group_best[group] = best;
    }
    __syncthreads();
    if (thread < kWarp) {
      const uint64_t bound = find_bound(s.group_best, 0, wanted);
      if (thread == 0) {
        *s.bound = bound;
        *s.count = 0;
      }
    }
    __syncthreads();
    const uint64_t bound = *s.bound;
#pragma unroll 1
    for (int i = thread; i < n; i += kThreads)
      if (s.keys()[i] > bound) s.spare()[atomicAdd(s.count, 1)] = s.keys()[i];
    __syncthreads();
    n = *s.count;
    s.swap();
  }
  // Few are left: each counts those before it.
#pragma unroll 1
  for (int i = thread; i < n; i += kThreads) {
    const uint64_t key = s.keys()[i];
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < n; ++j) rank += s.keys()[j] > key ? 1 : 0;
    if (rank < wanted) s.spare()[rank] = key;
  }
  __syncthreads();
  s.swap();
  return min(n, wanted);
}

// --- scan -----------------------------------------------------------------------------------

// Keys that a block of the scan holds at most: those kept, and all of the groups that a bound lets
// pass.
__host__ __device__ constexpr int scan_capacity(int beams) {
  return beams + at_most(beams + 1) * kGroupTokens;
}

// E tokens from `token` on, of rows that begin anywhere: two aligned accesses, of which the second
// is the next thread's first. They reach from up to E tokens before to E behind these.
template <typename T, int E>
__device__ inline Pack<T, E> load_shifted(const T* row, int token) {
  const int bytes = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
  const T* first = row + (token - bytes / static_cast<int>(sizeof(T)));
  union {
    Pack<T, E> packs[2];
    uint32_t words[8];
  } both;
  both.packs[0] = load_pack<E>(first);
  both.packs[1] = load_pack<E>(first + E);
  if (bytes & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) both.words[i] = both.words[i + 2];
  }
  if (bytes & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) both.words[i] = both.words[i + 1];
  }
  if constexpr (sizeof(T) == 2) {
    if (bytes & 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) both.words[i] = (both.words[i] >> 16) | (both.words[i + 1] << 16);
    }
  }
  return both.packs[0];
}

// A thread's tokens of a chunk; -inf for those behind the end of the row.
template <typename T, bool kAligned, int E, int kPacks>
__device__ inline void load_chunk(const T* row, int first_token, int vocabulary, int chunk,
                                  Pack<T, E> (&packs)[kPacks]) {
  // Without a branch a thread, all loads are under way at once.
  const int chunk_end = (chunk + 1) * kChunk;
  if (kAligned ? chunk_end <= vocabulary : chunk > 0 && chunk_end + E <= vocabulary) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int token = first_token + i * kThreads * E;
      if constexpr (kAligned)
        packs[i] = load_pack<E>(row + token);
      else
        packs[i] = load_shifted<T, E>(row, token);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int token = first_token + i * kThreads * E;
    if (kAligned ? token + E <= vocabulary : token >= E && token + 2 * E <= vocabulary) {
      if constexpr (kAligned)
        packs[i] = load_pack<E>(row + token);
      else
        packs[i] = load_shifted<T, E>(row, token);
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e)
        packs[i].element[e] = token + e < vocabulary ? row[token + e] : from_float<T>(-INFINITY);
    }
  }
}

// A slice of a row: grid [rows * slices].
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned || sizeof(T) == 2 ? 4 : 3)
    scan_kernel(const BeamSearchCuda p) {
  constexpr int E = 16 / sizeof(T);
  constexpr int kPacks = kChunk / kThreads / E;
  SHARED(uint64_t, group_best, [kGroups]);
  SHARED(uint64_t, bound_key, [1]);
  SHARED(int, count, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int64_t row = blockIdx.x / static_cast<uint32_t>(p.slices);
  const int slice = static_cast<int>(blockIdx.x % static_cast<uint32_t>(p.slices));
  // At the first step of a search all but one row of a sentence.
  if (!is_possible(p.scores[row])) return;
  const T* logits = static_cast<const T*>(p.logits) + row / p.beams * p.stride_batch +
                    row % p.beams * p.stride_beam;
  Selection s{scan_capacity(p.beams), group_best, bound_key, count};

  int kept = 0;
  // No key up to this one is among the best.
  uint64_t floor = 0;
  const int first_chunk = slice * p.chunks_per_slice;
  const int last_chunk = min(first_chunk + p.chunks_per_slice, p.chunks);
  if (slice == 0 && thread == 0) p.eos_logits[row] = to_float(logits[p.eos_token]);
  for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int first_token = chunk * kChunk + thread * E;
    Pack<T, E> packs[kPacks];
    load_chunk<T, kAligned>(logits, first_token, p.vocabulary, chunk, packs);

    // The best of each of two groups: what the best token's key is at least.
    uint64_t best[2];
    float reference = -FLT_MAX;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      float group_max = -INFINITY;
      int pack = 0;
#pragma unroll
      for (int i = group * kPacks / 2; i < (group + 1) * kPacks / 2; ++i) {
        float pack_max = -INFINITY;
#pragma unroll
        for (int e = 0; e < E; ++e) pack_max = fmaxf(pack_max, to_float(packs[i].element[e]));
        if (pack_max > group_max) {
          group_max = pack_max;
          pack = i;
        }
      }
      const int last_token = first_token + pack * kThreads * E + E - 1;
      best[group] =
          is_possible(group_max) ? make_key(group_max, static_cast<uint32_t>(last_token)) : 0;
      reference = fmaxf(reference, group_max);
    }

    const bool has_candidates = __syncthreads_or(best[0] > floor || best[1] > floor) != 0;
    if (has_candidates) {
      group_best[thread] = best[0];
      group_best[thread + kThreads] = best[1];
      __syncthreads();
      if (warp == 0) {
        // One more than is wanted, since one of them may end the sequence.
        const uint64_t bound = find_bound(group_best, floor, p.beams + 1);
        if (lane == 0) {
          *s.bound = bound;
          *s.count = kept;
        }
      }
    }

    // No logit of the thread is above the reference, so nothing overflows.
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
#pragma unroll
      for (int e = 0; e < E; ++e)
        sums[e % 4] += ptx::exp2_approx((to_float(packs[i].element[e]) - reference) * kLog2E);
    const float warp_reference = warp_max(reference);
    const float factor = ptx::exp2_approx((reference - warp_reference) * kLog2E);
    const float sum = warp_sum(((sums[0] + sums[1]) + (sums[2] + sums[3])) * factor);
    if (lane == 0)
      p.sums[(row * p.chunks + chunk) * kBeamSearchCudaSums + warp] = {warp_reference, sum};

    if (!has_candidates) continue;
    __syncthreads();
    const uint64_t bound = *s.bound;
    const float reach = bound == 0 ? -FLT_MAX : key_logit(bound);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      if (best[group] <= bound) continue;
#pragma unroll
      for (int i = group * kPacks / 2; i < (group + 1) * kPacks / 2; ++i)
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const float logit = to_float(packs[i].element[e]);
          if (!(logit >= reach)) continue;
          const int token = first_token + i * kThreads * E + e;
          const uint64_t key = make_key(logit, static_cast<uint32_t>(token));
          if (key > bound && token != p.eos_token) s.keys()[atomicAdd(s.count, 1)] = key;
        }
    }
    __syncthreads();
    const int n = *s.count;
    if (n == kept) continue;
    kept = sort_best(s, n, p.beams);
    if (kept == p.beams) floor = s.keys()[kept - 1];
  }
  uint64_t* out = p.slice_keys + (row * p.slices + slice) * p.beams;
  for (int i = thread; i < p.beams; i += kThreads) out[i] = i < kept ? s.keys()[i] : 0;
}

// --- merge of a row's slices ------------------------------------------------------------------

__host__ __device__ constexpr int tile_capacity(int beams) { return beams + kTile; }

// log of the sum of e^logit over a row, the same number in all threads; NaN where a logit is NaN or
// +inf, -inf where all are.
__device__ inline double log_sum_exp(const BeamSearchSum* sums, int64_t count) {
  SHARED(float, warp_references, [kWarps]);
  SHARED(double, warp_sums, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  float reference = -FLT_MAX;
  for (int64_t i = thread; i < count; i += kThreads)
    reference = fmaxf(reference, sums[i].reference);
  reference = warp_max(reference);
  if (thread % kWarp == 0) warp_references[thread / kWarp] = reference;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) reference = fmaxf(reference, warp_references[w]);
  double sum = 0.0;
  for (int64_t i = thread; i < count; i += kThreads)
    sum += static_cast<double>(sums[i].sum) *
           exp(static_cast<double>(sums[i].reference) - static_cast<double>(reference));
  sum = warp_sum(sum);
  if (thread % kWarp == 0) warp_sums[thread / kWarp] = sum;
  __syncthreads();
  sum = 0.0;
  for (int w = 0; w < kWarps; ++w) sum += warp_sums[w];
  return static_cast<double>(reference) + log(sum);
}

// Grid [rows].
template <int kUnused = 0>
__global__ void __launch_bounds__(kThreads) merge_kernel(const BeamSearchCuda p) {
  SHARED(uint64_t, group_best, [kGroups]);
  SHARED(uint64_t, bound_key, [1]);
  SHARED(int, count, [1]);
  SHARED(int, before_eos, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  const float running = p.scores[row];
  if (!is_possible(running)) {
    if (thread == 0) {
      p.counts[row] = 0;
      p.eos_totals[row] = -INFINITY;
      p.row_invalid[row] = false;
    }
    return;
  }
  Selection s{tile_capacity(p.beams), group_best, bound_key, count};
  const uint64_t* candidates = p.slice_keys + row * p.slices * p.beams;
  const int64_t total_candidates = static_cast<int64_t>(p.slices) * p.beams;
  int kept = 0;
  uint64_t floor = 0;
  for (int64_t begin = 0; begin < total_candidates; begin += kTile) {
    const int64_t end = min(begin + kTile, total_candidates);
    __syncthreads();
    if (thread == 0) *s.count = kept;
    __syncthreads();
#pragma unroll 1
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      const uint64_t key = candidates[i];
      if (key > floor) s.keys()[atomicAdd(s.count, 1)] = key;
    }
    __syncthreads();
    const int n = *s.count;
    if (n == kept) continue;
    kept = sort_best(s, n, p.beams);
    if (kept == p.beams) floor = s.keys()[kept - 1];
  }

  const double normaliser = log_sum_exp(p.sums + row * p.chunks * kBeamSearchCudaSums,
                                        static_cast<int64_t>(p.chunks) * kBeamSearchCudaSums);
  const double score = running;
  // In this order, so that candidates of equal rows tie exactly when their score + logit do.
  const auto total_of = [&](float logit) {
    return static_cast<float>((score + static_cast<double>(logit)) - normaliser);
  };
  const float eos_logit = p.eos_logits[row];
  const uint64_t eos_key = make_key(eos_logit, static_cast<uint32_t>(p.eos_token));
  if (thread == 0) {
    *s.count = 0;
    *before_eos = 0;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < kept; i += kThreads) {
    const uint64_t key = s.keys()[i];
    const float total = total_of(key_logit(key));
    p.row_tokens[row * p.beams + i] = key_token(key);
    p.row_totals[row * p.beams + i] = total;
    // Totals fall along the list, so the possible ones come first.
    if (is_possible(total)) atomicAdd(s.count, 1);
    if (key > eos_key) atomicAdd(before_eos, 1);
  }
  __syncthreads();
  if (thread == 0) {
    const float total = total_of(eos_logit);
    p.counts[row] = *s.count;
    p.eos_totals[row] = is_possible(total) ? total : -INFINITY;
    p.eos_places[row] = *before_eos;
    p.row_invalid[row] = !(normaliser < static_cast<double>(INFINITY));
  }
}

// --- ranking of a sentence ------------------------------------------------------------------

// Impossible candidates in the order of beams and tokens, for slots [filled, beams). Each row has
// fewer possible ones than `beams` then, and its list holds them all.
__device__ inline void fill_impossible(const BeamSearchCuda& p, int64_t b, int filled) {
  const int thread = static_cast<int>(threadIdx.x);
  int64_t* tokens = p.tokens + b * p.beams;
  int64_t* parents = p.parents + b * p.beams;
  float* next_scores = p.next_scores + b * p.beams;
  for (int beam = 0; beam < p.beams && filled < p.beams; ++beam) {
    const int64_t row = b * p.beams + beam;
    const uint32_t* taken = p.row_tokens + row * p.beams;
    const int taken_count = p.counts[row];
    const int needed = p.beams - filled;
    const int end = min(p.vocabulary, needed + taken_count + 1);
#pragma unroll 1
    for (int token = thread; token < end; token += kThreads) {
      bool is_free = token != p.eos_token;
      int place = token - (p.eos_token < token ? 1 : 0);
      for (int i = 0; i < taken_count; ++i) {
        const int other = static_cast<int>(taken[i]);
        is_free = is_free && other != token;
        place -= other < token ? 1 : 0;
      }
      if (is_free && place < needed) {
        tokens[filled + place] = token;
        parents[filled + place] = beam;
        next_scores[filled + place] = -INFINITY;
      }
    }
    filled += min(needed, p.vocabulary - 1 - taken_count);
  }
  // A vocabulary of the end of sequence alone.
  for (int i = filled + thread; i < p.beams; i += kThreads) {
    tokens[i] = p.eos_token;
    parents[i] = 0;
    next_scores[i] = -INFINITY;
  }
}

// Grid [sentences].
template <int kUnused = 0>
__global__ void __launch_bounds__(kThreads) rank_kernel(const BeamSearchCuda p) {
  SHARED(uint64_t, group_best, [kGroups]);
  SHARED(uint64_t, eos_keys, [kBeamSearchCudaMaxBeams]);
  SHARED(uint64_t, bound_key, [1]);
  SHARED(int, count, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x;
  const int64_t first_row = b * p.beams;
  Selection s{tile_capacity(p.beams), group_best, bound_key, count};

  int is_invalid = 0;
#pragma unroll 1
  for (int beam = thread; beam < p.beams; beam += kThreads) {
    is_invalid |= p.row_invalid[first_row + beam] ? 1 : 0;
    const float total = p.eos_totals[first_row + beam];
    eos_keys[beam] =
        is_possible(total) ? make_rank_key(total, beam, p.eos_places[first_row + beam]) : 0;
    p.finished_scores[first_row + beam] = -INFINITY;
    p.finished_parents[first_row + beam] = 0;
  }
  is_invalid = __syncthreads_or(is_invalid);
  if (thread == 0) p.invalid[b] = is_invalid != 0;

  // The best of all beams come first, then the second of all beams, ...: once a tile, which holds
  // one of each beam at least, has none that is good enough, nor have those behind it.
  int kept = 0;
  uint64_t floor = 0;
  for (int begin = 0; begin < p.beams * p.beams; begin += kTile) {
    const int end = min(begin + kTile, p.beams * p.beams);
    __syncthreads();
    if (thread == 0) *s.count = kept;
    __syncthreads();
#pragma unroll 1
    for (int i = begin + thread; i < end; i += kThreads) {
      const int beam = i % p.beams;
      const int index = i / p.beams;
      const int64_t row = first_row + beam;
      if (index >= p.counts[row]) continue;
      const int place = index + (index >= p.eos_places[row] ? 1 : 0);
      const uint64_t key = make_rank_key(p.row_totals[row * p.beams + index], beam, place);
      if (key > floor) s.keys()[atomicAdd(s.count, 1)] = key;
    }
    __syncthreads();
    const int n = *s.count;
    if (n == kept) break;
    kept = sort_best(s, n, p.beams);
    if (kept == p.beams) floor = s.keys()[kept - 1];
  }

#pragma unroll 1
  for (int i = thread; i < kept; i += kThreads) {
    const uint64_t key = s.keys()[i];
    const int beam = rank_key_beam(key);
    const int64_t row = first_row + beam;
    const int place = rank_key_place(key);
    const int index = place - (place > p.eos_places[row] ? 1 : 0);
    p.tokens[first_row + i] = p.row_tokens[row * p.beams + index];
    p.parents[first_row + i] = beam;
    p.next_scores[first_row + i] = p.row_totals[row * p.beams + index];
  }
#pragma unroll 1
  for (int beam = thread; beam < p.beams; beam += kThreads) {
    const uint64_t key = eos_keys[beam];
    if (key == 0) continue;
    int rank = 0;
    for (int i = 0; i < kept; ++i) rank += s.keys()[i] > key ? 1 : 0;
    for (int i = 0; i < p.beams; ++i) rank += eos_keys[i] > key ? 1 : 0;
    if (rank < p.beams) {
      p.finished_scores[first_row + rank] = p.eos_totals[first_row + beam];
      p.finished_parents[first_row + rank] = beam;
    }
  }
  if (kept < p.beams) fill_impossible(p, b, kept);
}

}  // namespace beam_search
}  // namespace fused_attn
