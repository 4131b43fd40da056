// Parameters of the CUDA kernels of add_layer_norm and what launches them. A null pointer is an
// absent tensor. T is the element type; where `..._is_fp32` is set, a tensor has fp32 elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/strided_rows.h"

namespace fused_attn {

struct RowParameter {
  const void* data;  // [width] of T or fp32, or null
  bool is_fp32;
};

// What the normalised sum is made of: residual + dropout(x + x_bias).
struct AddLayerNormInputs {
  StridedRows x;
  bool x_is_fp32;
  RowParameter x_bias;
  StridedRows residual;  // or null
  bool residual_is_fp32;
  const int64_t* seed;  // on the device, or null: no dropout
  float keep_scale;     // 1 / (1 - dropout_p)
  uint32_t keep_threshold;
};

struct AddLayerNormForwardCuda {
  AddLayerNormInputs inputs;
  RowParameter weight;
  RowParameter bias;
  void* output;  // T [rows, width]
  void* sum;     // T or fp32 [rows, width], or null
  bool sum_is_fp32;
  float* mean;  // [rows], or null for RMSNorm
  float* rstd;  // [rows]
  int64_t rows;
  int width;
  float eps;
  bool is_vectorised;  // every row of every tensor begins at a multiple of 16 bytes
};

struct AddLayerNormBackwardCuda {
  AddLayerNormInputs inputs;  // x alone, the sum itself, when `x_is_sum`
  bool x_is_sum;
  StridedRows grad_output;
  StridedRows grad_sum;  // or null
  bool grad_sum_is_fp32;
  RowParameter weight;
  const float* mean;    // [rows], or null for RMSNorm
  const float* rstd;    // [rows]
  float* mean_g;        // [rows], scratch of rows in several slices
  float* mean_gy;       // likewise
  void* grad_x;         // T [rows, width]
  void* grad_residual;  // T or fp32 [rows, width], or null
  bool grad_residual_is_fp32;
  // [programs, width] each, or null: summed by `add_layer_norm_reduce_cuda`.
  float* partial_x_bias;
  float* partial_weight;
  float* partial_bias;
  int64_t rows;
  int width;
  int programs;  // blocks that share the rows
  bool is_vectorised;
};

// How the backward covers rows of a width: a row takes `threads` of a block's kBackwardThreads,
// each of which has `elements` of its columns; a longer row is cut in slices.
struct AddLayerNormTiling {
  int threads;
  int elements;
  int rows;  // of a block at a time
  int slices;
};

constexpr int kBackwardThreads = 512;

constexpr AddLayerNormTiling add_layer_norm_backward_tiling(int width, bool is_vectorised) {
  // Elements that are loaded one by one take more registers; a slice costs nothing more.
  int elements = is_vectorised ? 16 : 8;
  if (width <= 256 || width > kBackwardThreads * elements) elements = 8;
  int threads = 32;
  while (threads < kBackwardThreads && threads * elements < width) threads *= threads == 32 ? 4 : 2;
  const int span = threads * elements;
  return {threads, elements, kBackwardThreads / threads, (width + span - 1) / span};
}

template <class T>
void add_layer_norm_forward_cuda(const AddLayerNormForwardCuda& p, cudaStream_t stream);

template <class T>
void add_layer_norm_backward_cuda(const AddLayerNormBackwardCuda& p, cudaStream_t stream);

// total[kind, i] = sum over programs of partial[kind, program, i], in a fixed order.
template <class T>
void add_layer_norm_reduce_cuda(const float* partial, int kinds, int programs, int width,
                                float* const* totals, cudaStream_t stream);

}  // namespace fused_attn
