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

// Candidates to merge a thread, likewise.
constexpr int64_t kRankGrain = 4096;

using Optional = std::optional<Tensor>;

template <typename T>
const T* data_of(const Optional& given, Tensor& keep_alive) {
  if (!given) return nullptr;
  keep_alive = given->contiguous();
  return keep_alive.const_data_ptr<T>();
}

// Shortlists without what is no token of the vocabulary.
struct Lists {
  Lists(const Tensor& given, int64_t vocabulary)
      : stride(given.size(1)), tokens(given.numel()), sizes(given.size(0)) {
    const Tensor all = given.contiguous();
    const int64_t* from = all.const_data_ptr<int64_t>();
    at::parallel_for(0, given.size(0), task_grain(stride), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t size = 0;
        for (int64_t i = b * stride; i < (b + 1) * stride; ++i) {
          tokens.data()[b * stride + size] = from[i];
          size += from[i] >= 0 && from[i] < vocabulary;
        }
        sizes.data()[b] = size;
      }
    });
  }

  int64_t stride;
  Scratch<int64_t> tokens;
  Scratch<int64_t> sizes;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results beam_search_step_cpu(const Tensor& logits, const Tensor& scores, int64_t eos_token,
                             const Optional& temperature, const Optional& edit_tokens,
                             const Optional& edit_factors, const Optional& edit_offsets,
                             const Optional& forced_tokens, const Optional& shortlist) {
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
  Tensor invalid = at::empty({B}, logits.options().dtype(at::kBool));
  if (B == 0) return {tokens, parents, next_scores, finished_scores, finished_parents, invalid};

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
  p.invalid = invalid.mutable_data_ptr<bool>();
  p.batch = B;
  p.beams = K;
  p.vocabulary = V;
  p.longest = V;
  p.eos_token = eos_token;
  p.dtype = kernel_dtype(logits.scalar_type());
  Tensor keep_alive[5];
  p.temperature = data_of<float>(temperature, keep_alive[0]);
  p.edit_tokens = data_of<int64_t>(edit_tokens, keep_alive[1]);
  p.edit_factors = data_of<float>(edit_factors, keep_alive[2]);
  p.edit_offsets = data_of<float>(edit_offsets, keep_alive[3]);
  p.edits = edit_tokens ? edit_tokens->size(2) : 0;
  p.forced_tokens = data_of<int64_t>(forced_tokens, keep_alive[4]);
  std::optional<Lists> lists;
  if (shortlist) {
    lists.emplace(*shortlist, V);
    p.list = lists->tokens.data();
    p.list_stride = lists->stride;
    p.list_sizes = lists->sizes.data();
    p.longest = lists->stride;
  }
  p.chunks = std::max<int64_t>(1, ceil_div(p.longest, kBeamSearchChunk));

  const int64_t worthwhile = std::max<int64_t>(1, B * K * p.longest / kGrain);
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
      0, B, std::max<int64_t>(1, kRankGrain / (K * (K + p.edits))),
      [&](int64_t begin, int64_t end) { FUSED_ATTN_CALL_KERNEL(beam_search_rank, p, begin, end); });
  return {tokens, parents, next_scores, finished_scores, finished_parents, invalid};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("beam_search_step", &fused_attn::beam_search_step_cpu);
}
