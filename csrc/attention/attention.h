// Parameters of the attention kernels. A null pointer is an absent tensor. T stands for the
// element type named by `dtype`; strides count elements.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fused_attn {

constexpr int64_t kMaxHeadSize = 256;

// T [B, H, rows, width]; each row is contiguous.
struct HeadRows {
  const void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_row;
};

// Broadcastable to [B, H, T, S]: a stride is 0 where a dimension is broadcast.
struct PairTensor {
  const void* data;
  DType dtype;  // of a bias; a mask has bytes
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_t;
  int64_t stride_s;
};

struct AttentionInputs {
  HeadRows q;                    // T [B, H, T, D]
  HeadRows k;                    // T [B, H, S, D]
  HeadRows v;                    // T [B, H, S, Dv]
  PairTensor mask;               // or null; not 0 takes part
  PairTensor bias;               // or null
  const int64_t* query_lengths;  // [B] within [0, T], or null
  const int64_t* key_lengths;    // [B] within [0, S], or null
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t head_size;
  int64_t value_size;
  float scale;
  bool is_causal;
  DType dtype;
};

struct AttentionForward {
  AttentionInputs in;
  void* output;  // T [B, H, T, Dv]
  float* lse;    // [B, H, T]
};

struct AttentionBackward {
  AttentionInputs in;
  HeadRows grad_output;  // T [B, H, T, Dv]
  const void* output;    // T [B, H, T, Dv]
  const float* lse;      // [B, H, T]
  void* dq;              // T [B, H, T, D]
  // A chunk of rows adds its share to its own slice of a sum.
  float* dk;  // [chunks, B, H, S, dk_stride >= D rounded up to a vector]
  float* dv;  // [chunks, B, H, S, dv_stride]
  int64_t dk_stride;
  int64_t dv_stride;
  int64_t chunk_heads;  // B * H
  float* dbias;         // [chunks, its own shape], zeroed, or null
  PairTensor dbias_strides;
  int64_t dbias_chunk_stride;  // 0 where chunks own different rows
};

// A task is some rows of one (batch, head), or of several that share a slice of the bias, in the
// order in which one thread must add them up: heads[first_head, last_head), row begin to row end.
struct AttentionTask {
  int64_t first_head;
  int64_t last_head;
  int64_t row_begin;
  int64_t row_end;
  int64_t chunk;
};

// Tasks in the order in which threads take them.
struct AttentionTasks {
  const AttentionTask* tasks;
  int64_t count;
  const int64_t* heads;  // b * H + h
  std::atomic<int64_t> next{0};

  const AttentionTask* take() {
    const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    return i < count ? tasks + i : nullptr;
  }
};

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Each runs on every thread at once, until no task is left.
    void attention_forward(const AttentionForward& p, AttentionTasks& tasks);
    void attention_backward(const AttentionBackward& p, AttentionTasks& tasks);)
