// Unpacks tensors for the CUDA kernels of beam_search and cuts the vocabulary into slices.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "beam_search/beam_search_cuda.h"
#include "common/cuda_binding.h"
#include "common/dispatch.h"

namespace fused_attn {
namespace {

using at::Tensor;

// Blocks that a multiprocessor should have before they take more than one chunk each: enough to
// have loads under way while others choose.
constexpr int64_t kBlocksPerMultiprocessor = 8;

// Arrays in one allocation, each at a multiple of 16 bytes. Counts the bytes first, and hands out
// pointers when it has a base.
class Workspace {
 public:
  template <typename T>
  void take(T*& array, int64_t count) {
    if (base_ != nullptr) array = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
  }
  int64_t bytes() const { return bytes_; }
  void allocate(uint8_t* base) {
    base_ = base;
    bytes_ = 0;
  }

 private:
  uint8_t* base_ = nullptr;
  int64_t bytes_ = 0;
};

void take_all(Workspace& workspace, BeamSearchCuda& p) {
  const int64_t rows = p.batch * p.beams;
  workspace.take(p.slice_keys, rows * p.slices * p.beams);
  workspace.take(p.sums, rows * p.chunks * kBeamSearchCudaSums);
  workspace.take(p.eos_logits, rows);
  workspace.take(p.row_tokens, rows * p.beams);
  workspace.take(p.row_totals, rows * p.beams);
  workspace.take(p.counts, rows);
  workspace.take(p.eos_totals, rows);
  workspace.take(p.eos_places, rows);
  workspace.take(p.row_invalid, rows);
}

bool is_aligned(const Tensor& rows) {
  const auto multiple = [](int64_t bytes) { return bytes % 16 == 0; };
  const int64_t size = rows.element_size();
  return multiple(reinterpret_cast<intptr_t>(rows.const_data_ptr())) &&
         (rows.size(0) == 1 || multiple(rows.stride(0) * size)) &&
         (rows.size(1) == 1 || multiple(rows.stride(1) * size));
}

using Optional = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results beam_search_step(const Tensor& logits, const Tensor& scores, int64_t eos_token,
                         const Optional& temperature, const Optional& edit_tokens,
                         const Optional& edit_factors, const Optional& edit_offsets,
                         const Optional& forced_tokens, const Optional& shortlist) {
  TORCH_CHECK(!temperature && !edit_tokens && !edit_factors && !edit_offsets && !forced_tokens &&
                  !shortlist,
              "beam_search_step: the cuda kernels take no temperature, edits, forced tokens or "
              "shortlists");
  const int64_t B = logits.size(0);
  const int64_t K = logits.size(1);
  const int64_t V = logits.size(2);
  TORCH_CHECK(K > 0 && eos_token >= 0 && eos_token < V && V <= kBeamSearchCudaMaxVocabulary,
              "beam_search_step: no beam, or a vocabulary without the end of sequence");
  TORCH_CHECK(K <= kBeamSearchCudaMaxBeams, "beam_search_step: the cuda kernels take up to ",
              kBeamSearchCudaMaxBeams, " beams, got ", K);
  const CudaCall call(logits);
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
  BeamSearchCuda p{};
  p.logits = rows.const_data_ptr();
  p.stride_batch = rows.stride(0);
  p.stride_beam = rows.stride(1);
  p.is_aligned = is_aligned(rows);
  p.scores = running.const_data_ptr<float>();
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.parents = parents.mutable_data_ptr<int64_t>();
  p.next_scores = next_scores.mutable_data_ptr<float>();
  p.finished_scores = finished_scores.mutable_data_ptr<float>();
  p.finished_parents = finished_parents.mutable_data_ptr<int64_t>();
  p.invalid = invalid.mutable_data_ptr<bool>();
  p.batch = B;
  p.beams = static_cast<int>(K);
  p.vocabulary = static_cast<int>(V);
  p.eos_token = static_cast<int>(eos_token);

  const int64_t chunks = ceil_div(V, kBeamSearchCudaChunk);
  const int64_t wanted = kBlocksPerMultiprocessor * call.multiprocessors;
  const int64_t slices = ceil_div(chunks, std::clamp<int64_t>(B * K * chunks / wanted, 1, chunks));
  p.chunks = static_cast<int>(chunks);
  p.chunks_per_slice = static_cast<int>(ceil_div(chunks, slices));
  p.slices = static_cast<int>(ceil_div(chunks, p.chunks_per_slice));
  TORCH_CHECK(B * K * p.slices <= 0x7FFFFFFF, "beam_search_step: too many rows, got ", B * K);

  Workspace workspace;
  take_all(workspace, p);
  const Tensor memory = at::empty({workspace.bytes()}, logits.options().dtype(at::kByte));
  workspace.allocate(memory.mutable_data_ptr<uint8_t>());
  take_all(workspace, p);

  with_element_type(rows.scalar_type(),
                    [&](auto element) { beam_search_cuda<decltype(element)>(p, call.stream); });
  return {tokens, parents, next_scores, finished_scores, finished_parents, invalid};
}

}  // namespace
}  // namespace fused_attn

FUSED_ATTN_CUDA_LIBRARY(m) { m.impl("beam_search_step", &fused_attn::beam_search_step); }
