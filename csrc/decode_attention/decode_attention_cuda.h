// Parameters of the CUDA kernels of decode_attention. A null pointer is an absent tensor; strides
// count elements.
//
// Rows of queries that read the same cache rows are a family: the beams of a source, or, where
// there is an ancestry, of a sentence. A block holds queries of one family and key head, in the
// order of beam, head of the group and position, and walks over one split of the keys.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fused_attn {

constexpr int64_t kDecodeCudaMaxHeadSize = 256;
constexpr int kDecodeCudaMaxSplits = 128;

// T [rows, heads, positions, width]; each vector of `width` is contiguous.
struct DecodeCudaTensor {
  const void* data;
  int64_t stride_row;
  int64_t stride_head;
  int64_t stride_position;
  bool is_aligned;  // every vector begins and ends at a multiple of 16 bytes
};

struct DecodeAttentionCuda {
  DecodeCudaTensor q;   // T [families * beams, heads, queries, head_size]
  DecodeCudaTensor k;   // T [cache rows, kv_heads, keys, head_size]
  DecodeCudaTensor v;   // T [cache rows, kv_heads, keys, value_size]
  const void* lengths;  // int32 or int64 [families * beams / rows_per_length], or null
  bool lengths_are_wide;
  int64_t stride_length;
  int rows_per_length;
  const void* ancestry;  // int32 or int64 [families, beams, keys], or null
  bool ancestry_is_wide;
  int64_t ancestry_strides[3];
  const uint8_t* mask;        // broadcastable to [rows, heads, queries, keys], or null
  int64_t mask_strides[4];    // 0 where a dimension is broadcast
  const float* alibi_slopes;  // [heads], or null
  int64_t stride_slope;
  int families;
  int beams;  // rows of queries in a family
  int heads;
  int kv_heads;
  int queries;
  int keys;
  int head_size;
  int value_size;
  int64_t window;  // -1: no bound
  float scale;
  float softcap;  // 0: none
  bool is_causal;

  void* output;  // T [rows, heads, queries, value_size]
  float* lse;    // [rows, heads, queries]

  int splits;
  int keys_per_split;
  // What each split leaves of each query where there are several.
  float* partial;      // [splits, rows * heads * queries, value_size]
  float* partial_lse;  // [splits, rows * heads * queries]
};

// Queries of a block at most.
constexpr int kDecodeCudaProductQueries = 16;  // of half precision, as a matrix product takes
constexpr int kDecodeCudaFp32Queries = 8;

// kHeadDim is the larger of head_size and value_size rounded up to 64, 128 or 256.
template <typename T, int kHeadDim>
void decode_attention_cuda(const DecodeAttentionCuda& p, cudaStream_t stream);

}  // namespace fused_attn
