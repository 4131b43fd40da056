// Parameters of the add_layer_norm kernels. A null pointer is an absent tensor. T stands for the
// element type named by `dtype`; where `..._is_fp32` is set, a tensor has fp32 elements instead.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided_rows.h"

namespace fused_attn {

struct AddLayerNormForward {
  StridedRows x;
  StridedRows residual;  // or null
  bool residual_is_fp32;
  const float* x_bias;  // [width] or null
  const float* weight;  // [width] or null: ones
  const float* bias;    // [width] or null: zeros
  void* output;         // T [rows, width]
  bool stream_output;   // `stream_lanes` may and should write it
  void* sum;            // T or fp32 [rows, width], or null
  bool sum_is_fp32;
  float* mean;  // [rows], or null for RMSNorm
  float* rstd;  // [rows]
  int64_t width;
  float eps;
  float keep_scale;  // 1 / (1 - dropout_p)
  uint32_t
      keep_threshold;  // an element is kept when its random word is at least this; 0: no dropout
  uint64_t seed;
  DType dtype;
};

struct AddLayerNormBackward {
  StridedRows grad_output;
  StridedRows grad_sum;  // or null
  bool grad_sum_is_fp32;
  StridedRows x;  // the sum itself when `x_is_sum`
  bool x_is_fp32;
  bool x_is_sum;
  const float* x_bias;   // [width] or null
  StridedRows residual;  // or null
  bool residual_is_fp32;
  const float* mean;    // [rows], or null for RMSNorm
  const float* rstd;    // [rows]
  const float* weight;  // [width] or null: ones
  void* grad_x;         // T [rows, width]
  bool stream_grad_x;   // as `stream_output`
  void* grad_residual;  // T or fp32 [rows, width], or null: grad_x is it, or nobody needs it
  bool grad_residual_is_fp32;
  float* partial_x_bias;  // [chunks, width] or null, as the next two
  float* partial_weight;
  float* partial_bias;
  int64_t rows;
  int64_t width;
  int64_t chunk_rows;
  float keep_scale;
  uint32_t keep_threshold;
  uint64_t seed;
  DType dtype;
};

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Rows [begin, end).
    void add_layer_norm_forward(const AddLayerNormForward& p, int64_t begin, int64_t end);
    // Chunks [begin, end) of `chunk_rows` rows.
    void add_layer_norm_backward(const AddLayerNormBackward& p, int64_t begin, int64_t end);
    // total[i] = sum over chunks of partial[chunk, i], for columns [begin, end).
    void add_layer_norm_reduce(const float* partial, int64_t chunks, int64_t width, float* total,
                               int64_t begin, int64_t end);)
