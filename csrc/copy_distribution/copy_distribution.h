// Parameters of the copy_distribution kernels. T stands for the element type named by `dtype`.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided_rows.h"

namespace fused_attn {

struct CopyDistribution {
  StridedRows logits;      // T [rows, vocabulary]
  StridedRows copy;        // float [rows, positions]: weights where there is a gate, else scores
  StridedRows tokens;      // int64_t [rows, positions]
  const float* gate;       // [rows] or null
  const int64_t* lengths;  // [rows / rows_per_length] or null
  int64_t rows_per_length;
  const int64_t* targets;  // [rows], or null: all words are wanted
  int64_t ignore_index;
  int64_t vocabulary;
  int64_t positions;
  int64_t extended_size;
  DType dtype;
};

struct CopyDistributionForward {
  CopyDistribution call;
  float* output;  // [rows, extended_size], with targets [rows]
  float* lse;     // [rows]
  bool streams;   // the output goes past the caches
};

struct CopyDistributionBackward {
  CopyDistribution call;
  StridedRows grad_output;  // float [rows, extended_size]; null with targets
  const float* grad_nll;    // [rows]; null without
  const float* lse;         // [rows]
  void* grad_logits;        // T [rows, vocabulary]
  float* grad_copy;         // [rows, positions]
  float* grad_gate;         // [rows] or null
  bool streams;             // grad_logits go past the caches
};

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Rows [begin, end).
    void copy_distribution_forward(const CopyDistributionForward& p, int64_t begin, int64_t end);
    void copy_distribution_backward(const CopyDistributionBackward& p, int64_t begin, int64_t end);)
