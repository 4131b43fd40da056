// Parameters of the CUDA kernels of beam_search. `beam_search_cuda` launches three:
//
//   scan    reads the logits once and leaves sums of exponentials and each slice's K best tokens;
//   merge   puts the slices of a row together: its log-sum-exp and its K best totals;
//   rank    ranks the K rows of a sentence.
//
// The token that ends a sequence is in none of the lists: its logit is known by its index.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fused_attn {

constexpr int kBeamSearchCudaMaxBeams = 256;
// So that the tokens of the last chunk are in 31 bits.
constexpr int64_t kBeamSearchCudaMaxVocabulary = int64_t{1} << 30;

// Tokens that are summed on their own, whatever the number of processors or sentences, so that a
// row's log-sum-exp depends on the row alone.
constexpr int kBeamSearchCudaChunk = 8192;
// Sums that a chunk leaves: one a warp.
constexpr int kBeamSearchCudaSums = 8;

// sum of e^(logit - reference); NaN where a logit is NaN or +inf.
struct BeamSearchSum {
  float reference;
  float sum;
};

struct BeamSearchCuda {
  const void* logits;         // T [batch, beams, vocabulary], a token next to the other
  int64_t stride_batch;       // in elements
  int64_t stride_beam;        // in elements
  bool is_aligned;            // every row begins at a multiple of 16 bytes
  const float* scores;        // [batch, beams]
  int64_t* tokens;            // [batch, beams]
  int64_t* parents;           // [batch, beams]
  float* next_scores;         // [batch, beams]
  float* finished_scores;     // [batch, beams]
  int64_t* finished_parents;  // [batch, beams]
  bool* invalid;              // [batch]
  int64_t batch;
  int beams;
  int vocabulary;
  int eos_token;

  int chunks;            // of a row
  int chunks_per_slice;  // a slice is the work of one block
  int slices;            // of a row

  // What the kernels leave for the next one. Of rows that are not possible only `counts`,
  // `eos_totals` and `row_invalid` are written.
  BeamSearchSum* sums;   // [batch, beams, chunks, kBeamSearchCudaSums]
  uint64_t* slice_keys;  // [batch, beams, slices, beams], the largest first, then 0
  float* eos_logits;     // [batch, beams]
  uint32_t* row_tokens;  // [batch, beams, beams], the best first
  float* row_totals;     // [batch, beams, beams]
  int* counts;           // [batch, beams]: possible ones of row_tokens
  float* eos_totals;     // [batch, beams], -inf where it is not possible
  int* eos_places;       // [batch, beams]: how many of row_tokens are before it
  bool* row_invalid;     // [batch, beams]: possible, with a NaN or +inf
};

// T is float, __half or __nv_bfloat16.
template <typename T>
void beam_search_cuda(const BeamSearchCuda& p, cudaStream_t stream);

}  // namespace fused_attn
