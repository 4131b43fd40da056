// Parameters of attention's CUDA kernels, and the functions that launch them. A null pointer is an
// absent tensor. Strides count elements; rows of heads are contiguous and begin at multiples of 16
// bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_attn {

// The side of a block mask's tiles.
constexpr int kBlockMaskTile = 128;

// The side of the tiles into which a boolean mask is classified. The tiles of kernels that look at
// one lie inside of these.
constexpr int kMaskClassTile = 64;

// Row statistics are padded to this: whole tiles of every kernel.
constexpr int kStatisticsTile = 128;

// A side of the window that bounds nothing. Lengths are below half of it, so that sums fit.
constexpr int kNoBound = 1 << 30;

enum class AttentionActivation : int { kSoftmax, kSigmoid, kRelu };

// [B, H, rows, width]; of packed tensors stride_b is 0, and rows begin where offsets say.
struct AttentionRows {
  const void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_row;
  int width;  // a multiple of 8, what was padded is 0
};

// The same for a result.
struct AttentionResult {
  void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_row;
  int width;
  bool vectors;  // rows begin at multiples of 16 bytes, and are whole vectors
};

// Broadcastable to [B, H, T, S]: a stride is 0 where a dimension is broadcast.
struct AttentionPairs {
  const void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_t;
  int64_t stride_s;
};

// int32 or int64 numbers in device memory.
struct AttentionIntegers {
  const void* data;
  bool is_wide;
};

// What the tiles of a boolean mask are: 0 hidden, 1 shown, 2 mixed.
struct AttentionMaskClasses {
  uint8_t* data;  // [b, h, tiles of T, tiles of S], each 1 where the mask is broadcast
  int64_t stride_b;
  int64_t stride_h;
  int stride_t;
  int stride_s;
};

// Sizes of a boolean mask without those that only broadcast it.
struct AttentionMaskSizes {
  int batch;
  int heads;
  int rows;
  int columns;
  int row_tiles;
  int column_tiles;
};

// Tiles of kBlockMaskTile x kBlockMaskTile: 0 hidden, 1 shown, n the bits of slot n - 2.
struct AttentionBlocks {
  const int32_t* tiles;  // [b, h, query tiles, key tiles]
  const uint32_t* bits;
  int64_t stride_b;
  int64_t stride_h;
  int key_tiles;
};

struct AttentionCall {
  AttentionRows q;
  AttentionRows k;
  AttentionRows v;
  int batch;
  int heads;
  int heads_per_key;
  int queries;  // T, or the most of a packed sequence
  int keys;
  int query_rows;  // of the tensors: T and S, or all rows of a packed batch
  int key_rows;
  AttentionIntegers query_lengths;
  AttentionIntegers key_lengths;
  AttentionIntegers query_offsets;
  AttentionIntegers key_offsets;
  bool is_packed;
  bool align_lower_right;
  int left;
  int right;
  float scale;
  // The rest is looked at by general kernels alone.
  AttentionPairs mask;
  AttentionMaskClasses mask_classes;
  AttentionPairs bias;
  bool bias_is_fp32;
  AttentionBlocks blocks;
  const float* slopes;  // [H] or [B, H]
  int64_t slopes_stride_b;
  float softcap;  // 0: none
  AttentionActivation activation;
  // Logits are in units of log 2 if not `exact`; exponential(x) = exp2(x * exponent_unit).
  bool exact;
  float logit_unit;
  float exponent_unit;
  const int64_t* seed;
  uint32_t keep_threshold;
  float keep_scale;
};

// The blocks of a kernel: tiles of all heads, in groups of heads that share the L2 cache.
struct AttentionGrid {
  int tiles;
  int heads;
  int group;
  bool reversed;  // the last tiles have most to do
};

struct AttentionForwardCuda {
  AttentionCall call;
  AttentionResult output;
  float* lse;  // [B, H, T], or [1, H, N] packed
  AttentionGrid grid;
};

struct AttentionBackwardCuda {
  AttentionCall call;
  AttentionRows output;
  AttentionRows grad_output;
  const float* lse;       // as the forward's
  const float* grad_lse;  // or null
  int64_t grad_lse_stride_b;
  int64_t grad_lse_stride_h;
  int64_t grad_lse_stride_t;
  AttentionResult dq;
  AttentionResult dk;
  AttentionResult dv;
  // [B, H, T rounded up to kStatisticsTile]: the lse in the logits' unit, +inf where weights are
  // 0, and delta. The first kernel writes them, the others read them.
  float* row_lse;
  float* row_delta;
  AttentionGrid grid;
};

// The bias's gradient, in its own shape, contiguous.
struct AttentionBiasGradient {
  AttentionBackwardCuda backward;
  void* data;
  int64_t sizes[4];
};

// T: __half or __nv_bfloat16. kHeadDim: the larger head size, rounded up to 32, 64, 96, 128, 256.
template <typename T, int kHeadDim>
void attention_forward_cuda(const AttentionForwardCuda& p, bool general, cudaStream_t stream);

// dq, then dk and dv.
template <typename T, int kHeadDim>
void attention_backward_cuda(const AttentionBackwardCuda& p, bool general, cudaStream_t stream);

template <typename T, int kHeadDim>
void attention_bias_gradient_cuda(const AttentionBiasGradient& p, cudaStream_t stream);

// Fills call.mask_classes.
template <typename T, int kHeadDim>
void attention_mask_classes_cuda(const AttentionCall& call, const AttentionMaskSizes& sizes,
                                 cudaStream_t stream);

}  // namespace fused_attn
