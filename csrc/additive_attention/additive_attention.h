// Parameters of the additive_attention kernels. A null pointer is an absent tensor. T stands for
// the element type named by `dtype`; strides count elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fused_attn {

// Queries of a task of the forward.
constexpr int64_t kQueryBlock = 32;

// Columns of a task of the backward: a multiple of every instruction set's vector, and two cache
// lines of fp32, which processors fetch together.
constexpr int64_t kColumnGroup = 32;

// T [B, H, rows, width]; each row is contiguous.
struct SequenceRows {
  const void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_row;
};

// T [B, H, T, S, F].
struct PairFeatures {
  const void* data;  // or null
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_t;
  int64_t stride_s;
  int64_t stride_f;
};

// Bytes [B, H, T, S], 0 hides a pair; a stride is 0 where a dimension is broadcast.
struct PairMask {
  const uint8_t* data;  // or null
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_t;
  int64_t stride_s;
};

struct AdditiveInputs {
  SequenceRows q;               // T [B, H, T, E]
  SequenceRows k;               // T [B, H, S, E]
  SequenceRows v;               // T [B, H, S, D], or null: scores only
  const float* score_weight;    // [H, E]
  PairFeatures features;        // or null
  const float* feature_weight;  // [H, F, E]
  PairMask mask;                // or null
  const int64_t* key_lengths;   // [B], within S, or null
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t size;           // E
  int64_t value_size;     // D
  int64_t features_size;  // F
  DType dtype;
};

struct AdditiveForward {
  AdditiveInputs in;
  void* context;   // T [B, H, T, D], or null
  float* weights;  // [B, H, T, S]; scores where there are no values
  int64_t query_blocks;
};

// A chunk is some batch elements, whose gradients of parameters one task adds up.
struct AdditiveBackward {
  AdditiveInputs in;
  SequenceRows grad_context;   // T [B, H, T, D], or null
  const float* grad_weights;   // [B, H, T, S], or null
  const float* weights;        // [B, H, T, S], or null: `grad_weights` is of the scores
  void* grad_query;            // T [B, H, T, E], or null, as all gradients
  void* grad_key;              // T [B, H, S, E]
  void* grad_value;            // T [B, H, S, D]
  void* grad_features;         // T [B, H, T, S, F]
  float* grad_score_weight;    // [chunks, H, E]
  float* grad_feature_weight;  // [chunks, H, F, E]
  int64_t chunk_batch;
  // Made by the first of the backward's kernels for the others. Queries that see a key, keys that
  // a query sees, and the gradient of the scores of these alone: rows of as many as there are keys.
  float* grad_scores;  // [B, H, T * S]
  int32_t* queries;    // [B, H, T]
  int32_t* keys;       // [B, H, S]
  int64_t* counts;     // [B, H, 2]: queries, keys
};

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Blocks [begin, end) of queries, [B, H, query_blocks].
    void additive_attention_forward(const AdditiveForward& p, int64_t begin, int64_t end);
    // The gradients of scores and values, of heads [begin, end) of [B, H].
    void additive_attention_grad_scores(const AdditiveBackward& p, int64_t begin, int64_t end);
    // From them the other gradients. Tasks [begin, end) of [chunks, H, column groups].
    void additive_attention_backward(const AdditiveBackward& p, int64_t begin, int64_t end);
    // The same where there are features. Tasks [begin, end) of [chunks, H].
    void additive_attention_features_backward(const AdditiveBackward& p, int64_t begin,
                                              int64_t end);
    // total[i] = sum over chunks of partial[chunk, i], for columns [begin, end).
    void additive_attention_reduce(const float* partial, int64_t chunks, int64_t columns,
                                   float* total, int64_t begin, int64_t end);)
