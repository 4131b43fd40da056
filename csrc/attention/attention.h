// Parameters of the attention kernels. A null pointer is an absent tensor. T stands for the
// element type named by `dtype`; strides count elements.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fused_attn {

constexpr int64_t kMaxHeadSize = 256;

// The side of a block mask's tiles.
constexpr int64_t kMaskTile = 128;

// Rows of a chunk begin at a multiple of this, which divides kMaskTile.
constexpr int64_t kChunkAlignment = 64;

// Fewer sums than this are shared among as many chunks, or fewer.
constexpr int64_t kMostChunks = 16;

// A side of the window that bounds nothing: beyond every length, and far from overflow.
constexpr int64_t kUnbounded = int64_t{1} << 48;

enum class Activation { kSoftmax, kSigmoid, kRelu };

// Half-open, and empty where end == begin.
struct Span {
  int64_t begin;
  int64_t end;
};

// T [B, H, rows, width]; each row is contiguous. Of packed tensors stride_b is 0, and the rows of
// a sequence begin where `Sequence` says.
struct HeadRows {
  const void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_row;
};

// The same for a result.
struct OutputRows {
  void* data;
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

// Tiles of kMaskTile x kMaskTile pairs, [b, h, query_tiles, key_tiles]: 0 is empty, 1 is full, and
// the bits of n >= 2 are bits[n - 2], kMaskTile rows of kMaskTile bits.
struct BlockMask {
  const int32_t* tiles;
  const uint32_t* bits;
  int64_t stride_b;
  int64_t stride_h;
  int64_t query_tiles;
  int64_t key_tiles;
};

// The rows that a batch element owns: within T and S, and its lengths.
struct Sequence {
  int64_t query_begin;
  int64_t queries;
  int64_t key_begin;
  int64_t keys;
};

struct AttentionInputs {
  HeadRows q;                 // T [B, H, T, D]
  HeadRows k;                 // T [B, Hk, S, D]
  HeadRows v;                 // T [B, Hk, S, Dv]
  PairTensor mask;            // or null; not 0 takes part
  PairTensor bias;            // or null
  BlockMask block_mask;       // or null
  const float* alibi_slopes;  // [B, H], or null
  int64_t alibi_stride_b;
  int64_t alibi_stride_h;
  const Sequence* sequences;  // [B]
  int64_t lse_stride_b;       // [B, H, T], rows contiguous
  int64_t lse_stride_h;
  int64_t heads;
  int64_t heads_per_key_head;
  int64_t queries;
  int64_t keys;
  int64_t head_size;
  int64_t value_size;
  int64_t left;   // query t looks at keys from t + diagonal - left
  int64_t right;  // to t + diagonal + right
  bool align_lower_right;
  bool is_packed;  // rows behind a sequence are the next one's
  float scale;
  float softcap;  // 0: none
  Activation activation;
  uint32_t keep_threshold;  // of dropout; 0: none
  float keep_scale;         // 1 / (1 - dropout_p)
  uint64_t seed;
  DType dtype;
};

struct AttentionForward {
  AttentionInputs in;
  OutputRows output;  // T [B, H, T, Dv]
  float* lse;
};

// One fp32 sum a chunk, [chunks, B, Hk, S, width rounded up to a vector].
struct ChunkSums {
  float* data;  // where the first chunk adds up in the result, of the second chunk
  int64_t stride_chunk;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_row;
};

struct AttentionBackward {
  AttentionInputs in;
  HeadRows grad_output;   // T [B, H, T, Dv]
  HeadRows output;        // T [B, H, T, Dv]
  const float* lse;       // as in.lse_stride_* say
  const float* grad_lse;  // the same, or null
  OutputRows dq;          // T [B, H, T, D]
  ChunkSums dk;
  ChunkSums dv;
  bool first_in_result;  // the first chunk adds up in dk_out and dv_out, which are fp32
  OutputRows dk_out;     // T [B, Hk, S, D]
  OutputRows dv_out;     // T [B, Hk, S, Dv]
  float* dbias;          // [chunks, its own shape], zeroed, or null
  PairTensor dbias_strides;
  int64_t dbias_chunk_stride;  // 0 where chunks own different rows
};

// A task is a chunk of the rows of one head, or of several that add to the same sum, in the order
// in which one thread must add them up: heads first_head, ... of the plan.
struct AttentionTask {
  int64_t first_head;
  int64_t last_head;
  int64_t row_chunk;
  int64_t sum_chunk;
};

// Tasks in the order in which threads take them.
struct AttentionTasks {
  const AttentionTask* tasks;
  int64_t count;
  const int64_t* heads;  // b * H + h of each head of the plan; null where that is its number
  int64_t row_chunks;
  bool chunks_of_tensor;  // chunks divide T, not the sequence's own length
  std::atomic<int64_t> next{0};

  const AttentionTask* take() {
    const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    return i < count ? tasks + i : nullptr;
  }
};

// Functions that the host shares with the kernels are static, so that each unit has its own copy.

// The diagonal of batch element b: query t stands beside key t + diagonal.
static inline int64_t diagonal_of(const AttentionInputs& in, const Sequence& sequence) {
  return in.align_lower_right ? sequence.keys - sequence.queries : 0;
}

// Keys below `keys` that query t may look at, as far as the window says.
static inline Span window_of(const AttentionInputs& in, int64_t diagonal, int64_t keys, int64_t t) {
  const int64_t begin = std::clamp<int64_t>(t + diagonal - in.left, 0, keys);
  return {begin, std::clamp<int64_t>(t + diagonal + in.right + 1, begin, keys)};
}

// Rows of a chunk of a sequence.
static inline Span rows_of_chunk(const AttentionInputs& in, const AttentionTasks& tasks,
                                 const Sequence& sequence, int64_t chunk) {
  const int64_t whole = tasks.chunks_of_tensor ? in.queries : sequence.queries;
  const auto boundary = [&](int64_t c) {
    const int64_t t = c == tasks.row_chunks
                          ? whole
                          : whole * c / tasks.row_chunks / kChunkAlignment * kChunkAlignment;
    return std::min(t, sequence.queries);
  };
  return {boundary(chunk), boundary(chunk + 1)};
}

// Keys that some of a sequence's rows may look at, as far as lengths and the window say.
static inline Span keys_of_rows(const AttentionInputs& in, const Sequence& sequence, Span rows) {
  if (rows.begin == rows.end) return {0, 0};
  const int64_t diagonal = diagonal_of(in, sequence);
  const int64_t begin = window_of(in, diagonal, sequence.keys, rows.begin).begin;
  return {begin, std::max(begin, window_of(in, diagonal, sequence.keys, rows.end - 1).end)};
}

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Each runs on every thread at once, until no task is left.
    void attention_forward(const AttentionForward& p, AttentionTasks& tasks);
    void attention_backward(const AttentionBackward& p, AttentionTasks& tasks);
    // Adds up the chunks of dk and dv, of the pairs [begin, end) of batch element and key head.
    void attention_finish(const AttentionBackward& p, const AttentionTasks& tasks,
                          int64_t head_chunks, int64_t begin, int64_t end);)
