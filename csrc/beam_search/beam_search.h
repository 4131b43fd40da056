// Parameters of the beam_search kernels. Two passes: `beam_search_scan` reads the logits once and
// leaves each row's log-sum-exp and best candidates; `beam_search_rank` merges the K rows of a
// sentence. T stands for the element type named by `dtype`.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fused_attn {

// Rows are cut into chunks of this many tokens whatever the number of threads or sentences, and
// each chunk is summed on its own, so that a row's log-sum-exp depends on the row alone.
constexpr int64_t kBeamSearchChunk = 8192;

// sum over the chunk of e^(logit / temperature - reference); the reference is -inf and the sum 0
// where all logits are -inf. The sum is NaN where a logit is NaN or +inf.
struct BeamSearchChunkSum {
  double sum;
  double reference;
};

struct BeamSearch {
  const void* logits;    // T [batch, beams, vocabulary], a token next to the other
  int64_t stride_batch;  // in elements
  int64_t stride_beam;   // in elements
  const float* scores;   // [batch, beams]

  // Null where there are none. Of edits with factor 1 and offset 0, or of what is no token, nothing
  // comes; no token is edited twice in a row.
  const float* temperature;      // [batch]
  const int64_t* edit_tokens;    // [batch, beams, edits]
  const float* edit_factors;     // [batch, beams, edits]
  const float* edit_offsets;     // [batch, beams, edits]
  int64_t edits;                 // 0 where there are none
  const int64_t* forced_tokens;  // [batch], negative where there is none
  // The tokens of a sentence's shortlist, all of the vocabulary and ascending.
  const int64_t* list;  // [batch, list_stride]
  int64_t list_stride;
  const int64_t* list_sizes;  // [batch]

  int64_t* tokens;            // [batch, beams]
  int64_t* parents;           // [batch, beams]
  float* next_scores;         // [batch, beams]
  float* finished_scores;     // [batch, beams]
  int64_t* finished_parents;  // [batch, beams]
  bool* invalid;              // [batch]
  int64_t batch;
  int64_t beams;
  int64_t vocabulary;
  int64_t longest;  // the vocabulary's size, or the most tokens that a shortlist can have
  int64_t eos_token;
  DType dtype;

  // All chunks of all rows, in order, are cut into `parts` even runs, one a thread. A row's
  // candidates come from the part in which it begins and from every part that begins inside it;
  // the latter leaves them in its own slot. A slot holds up to K keys, the largest first, of the
  // best tokens that go on.
  int64_t slot;    // K + 1, the last for the kernel's own use
  int64_t chunks;  // of a row
  int64_t parts;
  BeamSearchChunkSum* chunk_sums;  // [batch, beams, chunks]
  uint64_t* row_keys;              // [batch, beams, slot]
  int64_t* row_counts;             // [batch, beams]
  uint64_t* part_keys;             // [parts, slot]
  int64_t* part_counts;            // [parts]
};

// The first chunk of a part.
inline int64_t beam_search_part_begin(const BeamSearch& p, int64_t part) {
  return p.batch * p.beams * p.chunks * part / p.parts;
}

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // One part of the chunks.
    void beam_search_scan(const BeamSearch& p, int64_t part);
    // Sentences [begin, end), once every part is scanned.
    void beam_search_rank(const BeamSearch& p, int64_t begin, int64_t end);)
