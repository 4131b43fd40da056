// Parameters of the decode_attention kernels. A null pointer is an absent tensor. T stands for the
// element type named by `dtype`; strides count elements.
//
// Rows of queries that read the same cache rows are a family: the beams of a source, or, where
// there is an ancestry, of a sentence. Keys are cut into chunks of kDecodeChunk whatever the number
// of threads, rows or queries; each is summed on its own, so that a query's result depends on the
// query and its keys alone.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fused_attn {

constexpr int64_t kDecodeMaxHeadSize = 256;
constexpr int64_t kDecodeChunk = 256;
// Queries that one task holds at a time.
constexpr int64_t kDecodeBlock = 32;

// T [rows, heads, positions, width]; each vector of `width` is contiguous.
struct DecodeTensor {
  const void* data;
  int64_t stride_row;
  int64_t stride_head;
  int64_t stride_position;
};

struct DecodeAttention {
  DecodeTensor q;          // T [families * beams, heads, queries, head_size]
  DecodeTensor k;          // T [cache rows, kv_heads, keys, head_size]
  DecodeTensor v;          // T [cache rows, kv_heads, keys, value_size]
  const int64_t* lengths;  // [families * beams / rows_per_length], or null
  int64_t rows_per_length;
  const void* ancestry;   // int32 or int64 [families, beams, keys], or null
  bool ancestry_is_wide;  // int64
  int64_t ancestry_strides[3];
  const uint8_t* mask;        // broadcastable to [rows, heads, queries, keys], or null
  int64_t mask_strides[4];    // 0 where a dimension is broadcast
  const float* alibi_slopes;  // [heads], or null
  int64_t families;
  int64_t beams;  // rows of queries in a family
  int64_t heads;
  int64_t kv_heads;
  int64_t queries;
  int64_t keys;
  int64_t head_size;
  int64_t value_size;
  int64_t window;  // -1: no bound
  float scale;
  float softcap;  // 0: none
  bool is_causal;
  DType dtype;

  void* output;  // T [rows, heads, queries, value_size]
  float* lse;    // [rows, heads, queries]

  int64_t chunks;
  int64_t blocks;  // of the queries of a family and key head
  // What each chunk leaves of each query where there are several.
  float* partial;          // [chunks, rows * heads * queries, partial_stride]
  float* peaks;            // [chunks, rows * heads * queries]
  float* totals;           // [chunks, rows * heads * queries]; 0 where no key takes part
  int64_t partial_stride;  // value_size rounded up to a vector
};

// One chunk of keys for one block of the queries of one (family, key head).
inline int64_t decode_attention_task_count(const DecodeAttention& p) {
  return p.families * p.kv_heads * p.blocks * p.chunks;
}

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Runs on every thread at once, until `next` has counted all tasks.
    void decode_attention_tasks(const DecodeAttention& p, std::atomic<int64_t>& next);
    // Output and lse of queries [begin, end) from their chunks, once every task is done.
    void decode_attention_merge(const DecodeAttention& p, int64_t begin, int64_t end);)
