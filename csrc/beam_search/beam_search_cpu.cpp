// Unpacks tensors for the CPU kernels of beam_search and spreads the logits over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "beam_search/beam_search.h"
#include "common/dispatch.h"
#include "common/scratch.h"

namespace fused_attn {
namespace {

using at::Tensor;

// Logits a thread below which it costs more than it saves.
constexpr int64_t kGrain = 16384;

// Candidates to merge a thread, likewise.
constexpr int64_t kRankGrain = 4096;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_search_step_cpu(const Tensor& logits,
                                                                        const Tensor& scores,
                                                                        int64_t eos_token) {
  const int64_t B = logits.size(0);
  const int64_t K = logits.size(1);
  const int64_t V = logits.size(2);
  TORCH_CHECK(K > 0 && eos_token >= 0 && eos_token < V && V <= 0xFFFFFFFF,
              "beam_search_step: no beam, or a vocabulary without the end of sequence");
  const auto integers = logits.options().dtype(at::kLong);
  const auto floats = logits.options().dtype(at::kFloat);
  Tensor tokens = at::empty({B, K}, integers);
  Tensor parents = at::empty({B, K}, integers);
  Tensor next_scores = at::empty({B, K}, floats);
  Tensor finished_scores = at::empty({B, K}, floats);
  Tensor finished_parents = at::empty({B, K}, integers);
  if (B == 0) return {tokens, parents, next_scores, finished_scores, finished_parents};

  const Tensor rows = V == 1 || logits.stride(2) == 1 ? logits : logits.contiguous();
  const Tensor running = scores.contiguous();
  BeamSearch p{};
  p.logits = rows.const_data_ptr();
  p.stride_batch = rows.stride(0);
  p.stride_beam = rows.stride(1);
  p.scores = running.const_data_ptr<float>();
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.parents = parents.mutable_data_ptr<int64_t>();
  p.next_scores = next_scores.mutable_data_ptr<float>();
  p.finished_scores = finished_scores.mutable_data_ptr<float>();
  p.finished_parents = finished_parents.mutable_data_ptr<int64_t>();
  p.batch = B;
  p.beams = K;
  p.vocabulary = V;
  p.eos_token = eos_token;
  p.dtype = kernel_dtype(logits.scalar_type());
  p.chunks = (V + kBeamSearchChunk - 1) / kBeamSearchChunk;

  const int64_t worthwhile = std::max<int64_t>(1, B * K * V / kGrain);
  const int64_t most = std::min<int64_t>(at::get_num_threads(), B * K * p.chunks);
  p.parts = std::min(most, worthwhile);

  Scratch<BeamSearchChunkSum> chunk_sums(B * K * p.chunks);
  p.slot = K + 1;
  Scratch<uint64_t> keys((B * K + p.parts) * p.slot);
  Scratch<int64_t> counts(B * K + p.parts);
  p.chunk_sums = chunk_sums.data();
  p.row_keys = keys.data();
  p.part_keys = keys.data() + B * K * p.slot;
  p.row_counts = counts.data();
  p.part_counts = counts.data() + B * K;

  at::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      FUSED_ATTN_CALL_KERNEL(beam_search_scan, p, part);
  });
  at::parallel_for(
      0, B, std::max<int64_t>(1, kRankGrain / (K * K)),
      [&](int64_t begin, int64_t end) { FUSED_ATTN_CALL_KERNEL(beam_search_rank, p, begin, end); });
  return {tokens, parents, next_scores, finished_scores, finished_parents};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("beam_search_step", &fused_attn::beam_search_step_cpu);
}
