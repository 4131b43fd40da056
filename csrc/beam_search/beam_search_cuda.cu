// Launches of the beam_search kernels.
// units: FUSED_ATTN_T = float __half __nv_bfloat16
#include "beam_search/beam_search_kernel.cuh"

namespace fused_attn {

template <typename T>
void beam_search_cuda(const BeamSearchCuda& p, cudaStream_t stream) {
  using namespace beam_search;
  const dim3 block(kThreads);
  const auto rows = static_cast<unsigned>(p.batch * p.beams);
  const size_t scan_bytes = 2 * sizeof(uint64_t) * scan_capacity(p.beams);
  launch("beam_search scan", p.is_aligned ? scan_kernel<T, true> : scan_kernel<T, false>,
         dim3(rows * static_cast<unsigned>(p.slices)), block, scan_bytes, stream, p);
  const size_t tile_bytes = 2 * sizeof(uint64_t) * tile_capacity(p.beams);
  launch("beam_search merge", merge_kernel<>, dim3(rows), block, tile_bytes, stream, p);
  launch("beam_search rank", rank_kernel<>, dim3(static_cast<unsigned>(p.batch)), block, tile_bytes,
         stream, p);
}

template void beam_search_cuda<FUSED_ATTN_T>(const BeamSearchCuda& p, cudaStream_t stream);

}  // namespace fused_attn
