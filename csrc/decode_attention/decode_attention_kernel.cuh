// CUDA kernels of decode_attention.
//
// Each warp walks over steps of a few keys with a pipeline and an online softmax of its own, so
// that no warp waits for another before the end, when they are merged. A step's keys and values
// come to shared memory once, for all queries of the block.
//
// With an ancestry a step's keys are pairs of a position and a row that some beams of the block
// descend from: where the histories of beams have merged, that is one row for all of them.
// Positions with several rows take as many steps.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/device.cuh"
#include "common/ptx.cuh"
#include "decode_attention/decode_attention_cuda.h"

namespace fused_attn {
namespace decode_attention {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr float kLog2E = 1.4426950408889634f;

// e^x to a relative error of 2^-22 for x <= 0.
__device__ inline float exp_fast(float x) { return ptx::exp2_approx(x * kLog2E); }

// --- shapes of tiles ----------------------------------------------------------------------------

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// Keys of a step.
template <typename T>
constexpr int kKeys = sizeof(T) == 2 ? 16 : 8;

// Steps under way, the one that is computed included.
template <int kHeadDim>
constexpr int kStages = kHeadDim == 64 ? 3 : 2;

// Bytes of a row of keys or queries in shared memory: whole lines of 128.
template <typename T>
__host__ __device__ constexpr int row_bytes(int width) {
  return (width * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
}

template <typename T, int kHeadDim>
__host__ __device__ constexpr int stage_bytes(int head_size) {
  return kKeys<T> * (row_bytes<T>(head_size) + row_bytes<T>(kHeadDim));
}

template <typename T, int kQueries, int kHeadDim>
__host__ __device__ constexpr int shared_bytes(int head_size) {
  return kQueries * row_bytes<T>(head_size) +
         kWarps * kStages<kHeadDim> * stage_bytes<T, kHeadDim>(head_size);
}

// Where chunk `chunk` of row `row` lies, so that the chunks that are read at once, eight rows of
// one column or, in fp32, two rows of four, are in different banks.
template <typename T>
__device__ inline int place(int row, int chunk, int bytes) {
  const int swizzled = sizeof(T) == 2 ? chunk ^ (row & 7) : chunk ^ ((row & 1) << 2);
  return row * bytes + swizzled * 16;
}

// --- queries of a block -------------------------------------------------------------------------

struct Range {
  int first;
  int last;
};

struct Query {
  int64_t index;   // in [rows, heads, queries]; -1: there is none
  int64_t offset;  // in q
  int64_t mask;    // offset in the mask
  int first;       // the keys that lengths, causality and the window leave it
  int last;
  int position;
  int beam;  // among those of the block; 0 for all where there is no ancestry
  float slope;
};

__device__ inline int row_length(const DecodeAttentionCuda& p, int row) {
  if (p.lengths == nullptr) return p.keys;
  const int64_t at = row / p.rows_per_length * p.stride_length;
  const int64_t length = p.lengths_are_wide ? static_cast<const int64_t*>(p.lengths)[at]
                                            : static_cast<const int32_t*>(p.lengths)[at];
  return static_cast<int>(max(int64_t{0}, min(length, static_cast<int64_t>(p.keys))));
}

struct Block {
  int family;
  int kv_head;
  int split;
  int first_query;  // in the family and key head
  int first_beam;
  int beams;  // that its queries are of; 1 where there is no ancestry
};

__device__ inline uint32_t all_beams(const Block& block) { return (1u << block.beams) - 1; }

template <int kQueries>
__device__ inline Block locate_block(const DecodeAttentionCuda& p) {
  const int group = p.heads / p.kv_heads;
  const int in_a_row = group * p.queries;
  const int total = p.beams * in_a_row;
  const int blocks = (total + kQueries - 1) / kQueries;
  unsigned rest = blockIdx.x;
  Block block;
  block.first_query = static_cast<int>(rest % blocks) * kQueries;
  rest /= blocks;
  block.split = static_cast<int>(rest % p.splits);
  rest /= p.splits;
  block.kv_head = static_cast<int>(rest % p.kv_heads);
  block.family = static_cast<int>(rest / p.kv_heads);
  block.first_beam = block.first_query / in_a_row;
  const int last_beam = (min(block.first_query + kQueries, total) - 1) / in_a_row;
  block.beams = p.ancestry == nullptr ? 1 : last_beam - block.first_beam + 1;
  return block;
}

// The keys that every query of the block looks at.
template <int kQueries>
__device__ inline Range common_range(const Query* queries) {
  Range range{0, INT_MAX};
  for (int i = 0; i < kQueries; ++i) {
    if (queries[i].index < 0) continue;
    range.first = max(range.first, queries[i].first);
    range.last = min(range.last, queries[i].last);
  }
  return range;
}

__device__ inline Query make_query(const DecodeAttentionCuda& p, const Block& block, int i) {
  const int group = p.heads / p.kv_heads;
  const int in_family = block.first_query + i;
  Query query{-1, 0, 0, 0, 0, 0, 0, 0.0f};
  if (in_family >= p.beams * group * p.queries) return query;
  const int t = in_family % p.queries;
  const int head = block.kv_head * group + in_family / p.queries % group;
  const int beam = in_family / p.queries / group;
  const int row = block.family * p.beams + beam;
  const int length = row_length(p, row);
  query.index = (static_cast<int64_t>(row) * p.heads + head) * p.queries + t;
  query.offset = row * p.q.stride_row + head * p.q.stride_head + t * p.q.stride_position;
  query.mask = row * p.mask_strides[0] + head * p.mask_strides[1] + t * p.mask_strides[2];
  query.position = length - p.queries + t;
  query.last = max(0, p.is_causal ? min(length, query.position + 1) : length);
  const int64_t first = p.window < 0 ? 0 : query.position - p.window;
  query.first = static_cast<int>(max(int64_t{0}, first));
  query.beam = p.ancestry == nullptr ? 0 : beam - block.first_beam;
  query.slope = p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[head * p.stride_slope];
  return query;
}

// Queries, the ranges of keys that any query of a beam looks at, and the queries' vectors in shared
// memory, zeros where there is no query. Ends with a barrier.
template <typename T, int kQueries>
__device__ inline void load_queries(const DecodeAttentionCuda& p, const Block& block,
                                    Query* queries, Range* ranges, unsigned char* shared_q) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kQueries) queries[thread] = make_query(p, block, thread);
  __syncthreads();
  if (thread < block.beams) {
    Range range{p.keys, 0};
    for (int i = 0; i < kQueries; ++i) {
      const Query& query = queries[i];
      if (query.index < 0 || query.beam != thread || query.first >= query.last) continue;
      range.first = min(range.first, query.first);
      range.last = max(range.last, query.last);
    }
    ranges[thread] = range;
  }
  const int bytes = row_bytes<T>(p.head_size);
  const int chunks = bytes / 16;
  for (int i = thread; i < kQueries * chunks; i += kThreads) {
    const int row = i / chunks;
    const int begin = i % chunks * kChunk<T>;
    const T* from = static_cast<const T*>(p.q.data) + queries[row].offset + begin;
    Pack<T, kChunk<T>> pack;
    if (queries[row].index >= 0 && p.q.is_aligned && begin < p.head_size) {
      pack = load_pack<kChunk<T>>(from);
    } else {
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e)
        pack.element[e] =
            queries[row].index >= 0 && begin + e < p.head_size ? from[e] : from_float<T>(0.0f);
    }
    store_pack(reinterpret_cast<T*>(shared_q + place<T>(row, i % chunks, bytes)), pack);
  }
  __syncthreads();
}

// --- the keys of a warp, step after step --------------------------------------------------------

// What is known of a step when its keys are asked for.
template <typename T>
struct StepInfo {
  int base;                  // the first key's position
  bool is_whole;             // all keys are loaded, and all beams of the block look at them
  uint32_t beams[kKeys<T>];  // of the block, that look at each key; 0: not loaded
};

template <typename T, int kHeadDim>
class KeySteps {
 public:
  __device__ KeySteps(const DecodeAttentionCuda& p, const Block& block, const Range* ranges,
                      unsigned char* stages, StepInfo<T>* infos)
      : p_(p), block_(block), ranges_(ranges), stages_(stages), infos_(infos) {
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    all_beams_ = all_beams(block);
    is_aligned_ = p.k.is_aligned && p.v.is_aligned;
    k_bytes_ = row_bytes<T>(p.head_size);
    v_bytes_ = row_bytes<T>(p.value_size);
    const int column = lane_ % kLanes * kChunk<T>;
    const int64_t row = p.ancestry == nullptr ? block.family : 0;
    k_head_ = static_cast<const T*>(p.k.data) + block.kv_head * p.k.stride_head +
              row * p.k.stride_row + column;
    v_head_ = static_cast<const T*>(p.v.data) + block.kv_head * p.v.stride_head +
              row * p.v.stride_row + column;
    int first = p.keys, last = 0;
    for (int beam = 0; beam < block.beams; ++beam) {
      first = min(first, ranges[beam].first);
      last = max(last, ranges[beam].last);
    }
    begin_ = max(first, block.split * p.keys_per_split);
    end_ = min(last, (block.split + 1) * p.keys_per_split);
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    base_ = begin_ / kKeys<T> * kKeys<T> + (warp - kWarps) * kKeys<T>;
  }

  // Asks for the next step's keys and values, if there is one; commits a group in any case.
  __device__ void fill() {
    uint32_t beams = 0;
    int row = -1;
    if (next(beams, row)) {
      const int key = lane_ % kKeys<T>;
      const bool is_whole = __all_sync(kFullMask, beams == all_beams_) != 0;
      if (lane_ < kKeys<T>) infos_[stage_].beams[key] = beams;
      if (lane_ == 0) {
        infos_[stage_].base = base_;
        infos_[stage_].is_whole = is_whole;
      }
      unsigned char* k = stages_ + stage_ * stage_bytes<T, kHeadDim>(p_.head_size);
      unsigned char* v = k + kKeys<T> * k_bytes_;
      if (is_aligned_) {
        copy(row, ptx::shared_address(k), ptx::shared_address(v));
      } else {
        load(p_.k, p_.head_size, k_bytes_, row, k);
        load(p_.v, p_.value_size, row_bytes<T>(kHeadDim), row, v);
      }
      ++filled_;
      stage_ = stage_ + 1 == kStages<kHeadDim> ? 0 : stage_ + 1;
    }
    ptx::cp_async_commit();
  }
  __device__ int filled() const { return filled_; }

 private:
  // The next step, for the key `lane % kKeys`: which beams look at it, and its row of the cache.
  __device__ bool next(uint32_t& beams, int& row) {
    constexpr int kStride = kWarps * kKeys<T>;
    if (p_.ancestry == nullptr) {
      if (base_ + kStride >= end_) return false;
      base_ += kStride;
      const int position = base_ + lane_ % kKeys<T>;
      if (position >= begin_ && position < end_) {
        beams = 1;
        row = block_.family;
      }
      return true;
    }
    while (__ballot_sync(kFullMask, remaining_ != 0) == 0) {
      if (base_ + kStride >= end_) return false;
      base_ += kStride;
      const int position = base_ + lane_ % kKeys<T>;
      if (position < begin_ || position >= end_) continue;
      for (int beam = 0; beam < block_.beams; ++beam) {
        const Range range = ranges_[beam];
        if (position >= range.first && position < range.last) remaining_ |= 1u << beam;
      }
    }
    // The row of the first beam that has not had its key, and all beams that share it.
    for (int beam = 0; beam < block_.beams; ++beam) {
      if ((remaining_ >> beam & 1) == 0) continue;
      const int parent = ancestor(beam, base_ + lane_ % kKeys<T>);
      if (row < 0) row = parent;
      if (parent == row) beams |= 1u << beam;
    }
    remaining_ &= ~beams;
    return true;
  }

  __device__ int ancestor(int beam, int position) const {
    const int64_t at = block_.family * p_.ancestry_strides[0] +
                       (block_.first_beam + beam) * p_.ancestry_strides[1] +
                       position * p_.ancestry_strides[2];
    const int64_t parent = p_.ancestry_is_wide ? static_cast<const int64_t*>(p_.ancestry)[at]
                                               : static_cast<const int32_t*>(p_.ancestry)[at];
    const int64_t last = p_.beams - 1;
    return block_.family * p_.beams + static_cast<int>(max(int64_t{0}, min(parent, last)));
  }

  // Eight lanes a row, four rows at a time; zeros where there is no key and behind the width.
  static constexpr int kLanes = 8;
  static constexpr int kRows = kWarp / kLanes;

  // Matrix products take 16 columns at a time.
  static __device__ int chunks(int width) { return (width + 15) / 16 * 16 / kChunk<T>; }

  // Chunks of 16 bytes, asynchronously.
  __device__ void copy(int row, uint32_t k, uint32_t v) const {
    const int column = lane_ % kLanes * kChunk<T>;
    const int64_t position = base_ + lane_ / kLanes;
    const T* k_from = k_head_ + position * p_.k.stride_position;
    const T* v_from = v_head_ + position * p_.v.stride_position;
#pragma unroll
    for (int first = 0; first < kKeys<T>; first += kRows) {
      const int key = first + lane_ / kLanes;
      const int key_row = __shfl_sync(kFullMask, row, key);
      const int64_t ancestor_row = p_.ancestry == nullptr ? 0 : max(key_row, 0);
      copy_row(k_from + ancestor_row * p_.k.stride_row, key_row < 0 ? 0 : p_.head_size - column,
               k_bytes_, k + place<T>(key, lane_ % kLanes, k_bytes_));
      copy_row(v_from + ancestor_row * p_.v.stride_row, key_row < 0 ? 0 : p_.value_size - column,
               v_bytes_, v + place<T>(key, lane_ % kLanes, row_bytes<T>(kHeadDim)));
      k_from += kRows * p_.k.stride_position;
      v_from += kRows * p_.v.stride_position;
    }
  }

  // The lane's chunk of each line.
  static __device__ void copy_row(const T* from, int width, int bytes, uint32_t to) {
    constexpr int kLine = kLanes * kChunk<T>;
#pragma unroll
    for (int line = 0; line < row_bytes<T>(kHeadDim) / 128; ++line)
      if (line * 128 < bytes)
        ptx::cp_async16(to + line * 128, from + line * kLine, width > line * kLine);
  }

  // Element by element.
  __device__ void load(const DecodeCudaTensor& tensor, int width, int bytes, int row,
                       unsigned char* to) const {
    const T* head = static_cast<const T*>(tensor.data) + block_.kv_head * tensor.stride_head;
#pragma unroll 1
    for (int first = 0; first < kKeys<T>; first += kRows) {
      const int key = first + lane_ / kLanes;
      const int key_row = __shfl_sync(kFullMask, row, key);
      const bool exists = key_row >= 0;
      const T* from = head;
      if (exists) from += key_row * tensor.stride_row + (base_ + key) * tensor.stride_position;
#pragma unroll 1
      for (int chunk = lane_ % kLanes; chunk < chunks(width); chunk += kLanes) {
        const int begin = chunk * kChunk<T>;
        Pack<T, kChunk<T>> pack;
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e)
          pack.element[e] = exists && begin + e < width ? from[begin + e] : from_float<T>(0.0f);
        store_pack(reinterpret_cast<T*>(to + place<T>(key, chunk, bytes)), pack);
      }
    }
  }

  const DecodeAttentionCuda& p_;
  const Block& block_;
  const Range* ranges_;
  unsigned char* stages_;
  StepInfo<T>* infos_;
  int lane_;
  uint32_t all_beams_;
  bool is_aligned_;
  int k_bytes_;      // of a row in shared memory
  int v_bytes_;      // those of them that are used
  const T* k_head_;  // the lane's first chunk of the first key, of the first row if they differ
  const T* v_head_;
  int begin_;
  int end_;
  int base_;
  uint32_t remaining_ = 0;  // beams that have not had the key `lane % kKeys` of this base
  int stage_ = 0;
  int filled_ = 0;
};

// --- logits -------------------------------------------------------------------------------------

// A product's logit; -inf where the query does not look at the key.
__device__ inline float finish_logit(const DecodeAttentionCuda& p, const Query& query,
                                     float product, int key, uint32_t beams, bool& is_visible) {
  float x = product * p.scale;
  if (p.softcap != 0.0f) x = p.softcap * tanhf(x / p.softcap);
  x -= query.slope * fabsf(static_cast<float>(query.position - key));
  bool looks = (beams >> query.beam & 1) != 0 && key >= query.first && key < query.last;
  if (looks && p.mask != nullptr) looks = p.mask[query.mask + key * p.mask_strides[3]] != 0;
  is_visible |= looks;
  return looks ? x : -INFINITY;
}

// --- the end of a block -------------------------------------------------------------------------

// A warp's peak and total of a query: total is the sum of e^(logit - peak).
struct RowSum {
  float peak;
  float total;
};

// Merges what the warps leave in shared memory, `sums` [kWarps, kQueries] and `outputs`
// [kWarps, kQueries, kHeadDim], and stores the block's queries. Begins with a barrier.
template <typename T, int kQueries, int kHeadDim>
__device__ inline void store_block(const DecodeAttentionCuda& p, const Block& block,
                                   const Query* queries, RowSum* sums, const float* outputs) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t all = static_cast<int64_t>(p.families) * p.beams * p.heads * p.queries;
  __syncthreads();
  if (thread < kQueries) {
    float peak = -INFINITY;
    for (int warp = 0; warp < kWarps; ++warp)
      peak = fmaxf(peak, sums[warp * kQueries + thread].peak);
    // A row of -inf would give NaN: shift by 0 instead.
    const float shift = peak == -INFINITY ? 0.0f : peak;
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      RowSum& sum = sums[warp * kQueries + thread];
      sum.peak = exp_fast(sum.peak - shift);
      total += sum.total * sum.peak;
    }
    const bool is_empty = total == 0.0f;
    // From here on `peak` is what the warp's output is multiplied with.
    for (int warp = 0; warp < kWarps; ++warp) {
      RowSum& sum = sums[warp * kQueries + thread];
      sum.peak = is_empty ? 0.0f : sum.peak / total;
    }
    const int64_t index = queries[thread].index;
    if (index >= 0) {
      const float lse = is_empty ? -INFINITY : shift + logf(total);
      if (p.splits > 1)
        p.partial_lse[block.split * all + index] = lse;
      else
        p.lse[index] = lse;
    }
  }
  __syncthreads();
  const auto value_at = [&](int row, int column) {
    float value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      value +=
          outputs[(warp * kQueries + row) * kHeadDim + column] * sums[warp * kQueries + row].peak;
    return value;
  };
  if (p.splits > 1) {
    float* partial = p.partial + block.split * all * p.value_size;
    for (int i = thread; i < kQueries * p.value_size; i += kThreads) {
      const int row = i / p.value_size, column = i % p.value_size;
      const int64_t index = queries[row].index;
      if (index >= 0) partial[index * p.value_size + column] = value_at(row, column);
    }
    return;
  }
  constexpr int kStore = kChunk<T>;
  T* output = static_cast<T*>(p.output);
  if (p.value_size % kStore == 0) {
    const int chunks = p.value_size / kStore;
    for (int i = thread; i < kQueries * chunks; i += kThreads) {
      const int row = i / chunks, begin = i % chunks * kStore;
      const int64_t index = queries[row].index;
      if (index < 0) continue;
      Pack<T, kStore> pack;
#pragma unroll
      for (int e = 0; e < kStore; ++e) pack.element[e] = from_float<T>(value_at(row, begin + e));
      store_pack(output + index * p.value_size + begin, pack);
    }
    return;
  }
  for (int i = thread; i < kQueries * p.value_size; i += kThreads) {
    const int row = i / p.value_size, column = i % p.value_size;
    const int64_t index = queries[row].index;
    if (index >= 0) output[index * p.value_size + column] = from_float<T>(value_at(row, column));
  }
}

// --- half precision: matrix products ------------------------------------------------------------

// 16 queries and 16 keys a step: logits are two tiles of 16 x 8, of which a thread holds two
// neighbouring columns of two rows.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim == 256 ? 1 : 3)
    product_kernel(const __grid_constant__ DecodeAttentionCuda p) {
  constexpr int kQueries = 16;
  constexpr int kColumns = kHeadDim / 8;  // tiles of the output
  constexpr int kSteps = kStages<kHeadDim>;
  SHARED(Query, queries, [kQueries]);
  SHARED(Range, ranges, [kQueries]);
  SHARED(RowSum, sums, [kWarps * kQueries]);
  SHARED(StepInfo<T>, infos, [kWarps * kSteps]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Block block = locate_block<kQueries>(p);
  unsigned char* const shared_q = dynamic_shared();
  load_queries<T, kQueries>(p, block, queries, ranges, shared_q);

  const int key_bytes = row_bytes<T>(p.head_size);
  constexpr int kValueBytes = row_bytes<T>(kHeadDim);
  const int bytes = stage_bytes<T, kHeadDim>(p.head_size);
  unsigned char* const stages = shared_q + kQueries * key_bytes + warp * kSteps * bytes;
  StepInfo<T>* const warp_infos = infos + warp * kSteps;
  KeySteps<T, kHeadDim> steps(p, block, ranges, stages, warp_infos);

  const int rows[2] = {lane / 4, lane / 4 + 8};
  // Of the four matrices that a lane names a row of: its row and, of 16 bytes, its column.
  const int first_row = lane % 8 + lane / 8 % 2 * 8, first_column = lane / 16;
  const int second_row = lane % 8 + lane / 16 * 8, second_column = lane / 8 % 2;
  const Range common = common_range<kQueries>(queries);
  const bool is_plain = p.softcap == 0.0f && p.alibi_slopes == nullptr && p.mask == nullptr;
  const uint32_t every_beam = all_beams(block);
  float peak[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  float acc[kColumns][4] = {};
  int stage = 0;
  for (int step = 1 - kSteps; step < 0 || step < steps.filled(); ++step) {
    if (step >= 0) {
      ptx::cp_async_wait<kSteps - 2>();
      __syncwarp();
    }
    steps.fill();
    if (step < 0) continue;
    unsigned char* const k = stages + stage * bytes;
    unsigned char* const v = k + kKeys<T> * key_bytes;
    const StepInfo<T>& info = warp_infos[stage];
    stage = stage + 1 == kSteps ? 0 : stage + 1;

    float logits[2][4] = {};
    const uint32_t q_address =
        ptx::shared_address(shared_q + place<T>(first_row, first_column, key_bytes));
    const uint32_t k_address =
        ptx::shared_address(k + place<T>(second_row, second_column, key_bytes));
#pragma unroll
    for (int line = 0; line < row_bytes<T>(kHeadDim); line += 128) {
#pragma unroll
      for (int i = 0; i < 128; i += 32) {  // 16 columns
        if (line + i >= p.head_size * static_cast<int>(sizeof(T))) break;
        uint32_t a[4], b[4];
        // The bits of the column are where the row's were mixed in.
        ptx::ldmatrix_x4(a, (q_address ^ i) + line);
        ptx::ldmatrix_x4(b, (k_address ^ i) + line);
        ptx::mma_m16n8k16<T>(logits[0], a, b[0], b[1]);
        ptx::mma_m16n8k16<T>(logits[1], a, b[2], b[3]);
      }
    }

    // Which of the thread's four keys any query looks at; which are of some beams alone.
    uint32_t visible = 0xFFFF;
    bool is_shared = true;
    float largest[2] = {peak[0], peak[1]};
    const bool is_simple = is_plain && info.is_whole && info.base >= common.first &&
                           info.base + kKeys<T> <= common.last;
    if (is_simple) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          logits[tile][i] *= p.scale;
          largest[i / 2] = fmaxf(largest[i / 2], logits[tile][i]);
        }
    } else {
      visible = 0;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = tile * 8 + lane % 4 * 2 + e;
          const uint32_t beams = info.beams[column];
          is_shared = is_shared && (beams == 0 || beams == every_beam);
          bool is_visible = false;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& logit = logits[tile][half * 2 + e];
            logit =
                finish_logit(p, queries[rows[half]], logit, info.base + column, beams, is_visible);
            largest[half] = fmaxf(largest[half], logit);
          }
          // A row that was not loaded is zero.
          if (is_visible || beams == 0) visible |= 1u << column;
        }
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2)
        visible |= __shfl_xor_sync(kFullMask, visible, offset);
      is_shared = __all_sync(kFullMask, is_shared) != 0;
    }
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(kFullMask, largest[half], 1));
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(kFullMask, largest[half], 2));
      // A row of -inf would give NaN: shift by 0 instead.
      shift[half] = largest[half] == -INFINITY ? 0.0f : largest[half];
    }
    if (__any_sync(kFullMask, largest[0] > peak[0] || largest[1] > peak[1])) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = exp_fast(peak[half] - shift[half]);
        peak[half] = largest[half];
        total[half] *= factor;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          acc[i][half * 2] *= factor;
          acc[i][half * 2 + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[tile][i] = exp_fast(logits[tile][i] - shift[i / 2]);
        total[i / 2] += logits[tile][i];
      }

    // Values that no query looks at become zero: 0 * NaN would be NaN.
    if (visible != 0xFFFF) {
      for (int key = 0; key < kKeys<T>; ++key) {
        if (visible >> key & 1) continue;
        for (int chunk = lane; chunk < kValueBytes / 16; chunk += kWarp)
          store_pack(reinterpret_cast<uint32_t*>(v + place<T>(key, chunk, kValueBytes)),
                     Pack<uint32_t, 4>{});
      }
      __syncwarp();
    }
    // Likewise values that other beams look at, if they are no numbers.
    bool has_special = false;
    if (!is_shared) {
#pragma unroll 1
      for (int i = lane; i < kKeys<T> * ((p.value_size + 7) / 8); i += kWarp) {
        const int key = i % kKeys<T>, chunk = i / kKeys<T>;
        const auto pack =
            load_pack<8>(reinterpret_cast<const T*>(v + place<T>(key, chunk, kValueBytes)));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float value = to_float(pack.element[e]);
          has_special = has_special || !(fabsf(value) <= FLT_MAX);
        }
      }
      has_special = __any_sync(kFullMask, has_special) != 0;
    }
    if (has_special) {
      // One weight after the other, of the keys of the query's own beam.
#pragma unroll 1
      for (int key = 0; key < kKeys<T>; ++key) {
        const int source = lane / 4 * 4 + key % 8 / 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = key < 8 ? logits[0][half * 2] : logits[1][half * 2];
          const float high = key < 8 ? logits[0][half * 2 + 1] : logits[1][half * 2 + 1];
          const float weight = __shfl_sync(kFullMask, key % 2 == 0 ? low : high, source);
          if ((info.beams[key] >> queries[rows[half]].beam & 1) == 0) continue;
#pragma unroll
          for (int i = 0; i < kColumns; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (i * 8 >= p.value_size) break;
              const T* row = reinterpret_cast<const T*>(v + place<T>(key, i, kValueBytes));
              acc[i][half * 2 + e] += weight * to_float(row[lane % 4 * 2 + e]);
            }
        }
      }
      continue;
    }
    const uint32_t a[4] = {
        pack2<T>(logits[0][0], logits[0][1]), pack2<T>(logits[0][2], logits[0][3]),
        pack2<T>(logits[1][0], logits[1][1]), pack2<T>(logits[1][2], logits[1][3])};
    const uint32_t v_address =
        ptx::shared_address(v + place<T>(first_row, first_column, kValueBytes));
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      if (i * 8 < p.value_size) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, (v_address ^ (i % 8 * 16)) + i / 8 * 128);
        ptx::mma_m16n8k16<T>(acc[i], a, b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc[i + 1], a, b[2], b[3]);
      }
    }
  }

  ptx::cp_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(kFullMask, total[half], 1);
    total[half] += __shfl_xor_sync(kFullMask, total[half], 2);
    if (lane % 4 == 0) sums[warp * kQueries + rows[half]] = {peak[half], total[half]};
  }
  // The steps' memory is free once all warps are done with theirs.
  __syncthreads();
  float* const outputs = reinterpret_cast<float*>(shared_q + kQueries * key_bytes);
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_pack(outputs + (warp * kQueries + rows[half]) * kHeadDim + i * 8 + lane % 4 * 2,
                 Pack<float, 2>{acc[i][half * 2], acc[i][half * 2 + 1]});
  store_block<T, kQueries, kHeadDim>(p, block, queries, sums, outputs);
}

// --- fp32 ---------------------------------------------------------------------------------------

// 8 keys a step. Four lanes multiply a key, each a quarter of its chunks, with all queries; then
// each lane computes the weights of its key for a quarter of the queries; then it holds kHeadDim /
// 32 columns of the output.
template <int kQueries, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kQueries == 8 || kHeadDim == 256 ? 2 : 4)
    fp32_kernel(const __grid_constant__ DecodeAttentionCuda p) {
  constexpr int kSteps = kStages<kHeadDim>;
  constexpr int kColumns = kHeadDim / kWarp;
  constexpr int kPack = kColumns < 4 ? kColumns : 4;
  constexpr int kOwn = (kQueries + 3) / 4;
  constexpr int kStepKeys = kKeys<float>;
  SHARED(Query, queries, [kQueries]);
  SHARED(Range, ranges, [kQueries]);
  SHARED(RowSum, sums, [kWarps * kQueries]);
  SHARED(StepInfo<float>, infos, [kWarps * kSteps]);
  SHARED(float, weights, [kWarps * kStepKeys * kQueries]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Block block = locate_block<kQueries>(p);
  unsigned char* const shared_q = dynamic_shared();
  load_queries<float, kQueries>(p, block, queries, ranges, shared_q);

  const int key_bytes = row_bytes<float>(p.head_size);
  constexpr int kValueBytes = row_bytes<float>(kHeadDim);
  const int bytes = stage_bytes<float, kHeadDim>(p.head_size);
  unsigned char* const stages = shared_q + kQueries * key_bytes + warp * kSteps * bytes;
  StepInfo<float>* const warp_infos = infos + warp * kSteps;
  float* const warp_weights = weights + warp * kStepKeys * kQueries;  // [kStepKeys, kQueries]
  KeySteps<float, kHeadDim> steps(p, block, ranges, stages, warp_infos);

  const int part = lane % 4;
  const int own_key = lane / 4;
  const int chunks = (p.head_size + 15) / 16 * 4;
  const uint32_t every_beam = all_beams(block);
  float peak[kOwn], total[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    peak[i] = -INFINITY;
    total[i] = 0.0f;
  }
  float acc[kQueries][kColumns] = {};
  int stage = 0;
  for (int step = 1 - kSteps; step < 0 || step < steps.filled(); ++step) {
    if (step >= 0) {
      ptx::cp_async_wait<kSteps - 2>();
      __syncwarp();
    }
    steps.fill();
    if (step < 0) continue;
    unsigned char* const k = stages + stage * bytes;
    unsigned char* const v = k + kStepKeys * key_bytes;
    const StepInfo<float>& info = warp_infos[stage];
    stage = stage + 1 == kSteps ? 0 : stage + 1;

    float products[kQueries] = {};
    for (int chunk = part; chunk < chunks; chunk += 4) {
      const auto key =
          load_pack<4>(reinterpret_cast<const float*>(k + place<float>(own_key, chunk, key_bytes)));
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const auto query = load_pack<4>(
            reinterpret_cast<const float*>(shared_q + place<float>(i, chunk, key_bytes)));
#pragma unroll
        for (int e = 0; e < 4; ++e) products[i] += query.element[e] * key.element[e];
      }
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      products[i] += __shfl_xor_sync(kFullMask, products[i], 1);
      products[i] += __shfl_xor_sync(kFullMask, products[i], 2);
    }

    bool is_visible = false;
    float logits[kOwn], largest[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float product = 0.0f;
#pragma unroll
      for (int q = 4 * i; q < kQueries && q < 4 * i + 4; ++q)
        if (q % 4 == part) product = products[q];
      const int q = 4 * i + part;
      logits[i] = -INFINITY;
      if (q < kQueries)
        logits[i] = finish_logit(p, queries[q], product, info.base + own_key, info.beams[own_key],
                                 is_visible);
      largest[i] = fmaxf(peak[i], logits[i]);
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2)
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(kFullMask, largest[i], offset));
    }
    bool is_larger = false;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) is_larger = is_larger || largest[i] > peak[i];
    if (__any_sync(kFullMask, is_larger)) {
      float factors[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        // A row of -inf would give NaN: shift by 0 instead.
        factors[i] = exp_fast(peak[i] - (largest[i] == -INFINITY ? 0.0f : largest[i]));
        peak[i] = largest[i];
        total[i] *= factors[i];
      }
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const float factor = __shfl_sync(kFullMask, factors[q / 4], q % 4);
#pragma unroll
        for (int column = 0; column < kColumns; ++column) acc[q][column] *= factor;
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float weight = exp_fast(logits[i] - (largest[i] == -INFINITY ? 0.0f : largest[i]));
      total[i] += weight;
      if (4 * i + part < kQueries) warp_weights[own_key * kQueries + 4 * i + part] = weight;
    }
    const unsigned visible = __ballot_sync(kFullMask, is_visible);
    __syncwarp();

#pragma unroll
    for (int key = 0; key < kStepKeys; ++key) {
      // Values that no query looks at are not read: 0 * NaN would be NaN.
      if ((visible >> (4 * key) & 0xF) == 0) continue;
      float value[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; i += kPack) {
        const int column = i / kPack * kWarp * kPack + lane * kPack;
        const auto pack = load_pack<kPack>(
            reinterpret_cast<const float*>(v + place<float>(key, column / 4, kValueBytes)) +
            column % 4);
#pragma unroll
        for (int e = 0; e < kPack; ++e) value[i + e] = pack.element[e];
      }
      const uint32_t beams = info.beams[key];
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        // Nor are those of other beams.
        if (beams != every_beam && (beams >> queries[q].beam & 1) == 0) continue;
        const float weight = warp_weights[key * kQueries + q];
#pragma unroll
        for (int column = 0; column < kColumns; ++column) acc[q][column] += weight * value[column];
      }
    }
  }

  ptx::cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2)
      total[i] += __shfl_xor_sync(kFullMask, total[i], offset);
    if (lane < 4 && 4 * i + lane < kQueries)
      sums[warp * kQueries + 4 * i + lane] = {peak[i], total[i]};
  }
  // The steps' memory is free once all warps are done with theirs.
  __syncthreads();
  float* const outputs = reinterpret_cast<float*>(shared_q + kQueries * key_bytes);
#pragma unroll
  for (int q = 0; q < kQueries; ++q)
#pragma unroll
    for (int i = 0; i < kColumns; i += kPack) {
      Pack<float, kPack> pack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) pack.element[e] = acc[q][i + e];
      store_pack(
          outputs + (warp * kQueries + q) * kHeadDim + i / kPack * kWarp * kPack + lane * kPack,
          pack);
    }
  store_block<float, kQueries, kHeadDim>(p, block, queries, sums, outputs);
}

// --- merge of splits ----------------------------------------------------------------------------

// A warp a query.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ DecodeAttentionCuda p) {
  SHARED(float, weights, [kWarps * kDecodeCudaMaxSplits]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t all = static_cast<int64_t>(p.families) * p.beams * p.heads * p.queries;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (index >= all) return;
  float* const warp_weights = weights + warp * kDecodeCudaMaxSplits;
  float peak = -INFINITY;
  for (int split = lane; split < p.splits; split += kWarp)
    peak = fmaxf(peak, p.partial_lse[split * all + index]);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, offset));
  const float shift = peak == -INFINITY ? 0.0f : peak;
  float total = 0.0f;
  for (int split = lane; split < p.splits; split += kWarp) {
    const float weight = exp_fast(p.partial_lse[split * all + index] - shift);
    warp_weights[split] = weight;
    total += weight;
  }
  total = warp_sum(total);
  __syncwarp();
  const bool is_empty = total == 0.0f;
  const float factor = is_empty ? 0.0f : 1.0f / total;
  T* output = static_cast<T*>(p.output) + index * p.value_size;
  for (int column = lane; column < p.value_size; column += kWarp) {
    const float* partial = p.partial + index * p.value_size + column;
    float sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < p.splits; ++split)
      sum += warp_weights[split] * partial[split * all * p.value_size];
    output[column] = from_float<T>(sum * factor);
  }
  if (lane == 0) p.lse[index] = is_empty ? -INFINITY : shift + logf(total);
}

}  // namespace decode_attention
}  // namespace fused_attn
