// Launches of the decode_attention kernels.
// units: FUSED_ATTN_T = float __half __nv_bfloat16
// units: FUSED_ATTN_HEAD_DIM = 64 128 256
#include "decode_attention/decode_attention_kernel.cuh"

namespace fused_attn {
namespace {

using namespace decode_attention;

template <typename T, int kQueries, int kHeadDim, typename Kernel>
void launch_blocks(const DecodeAttentionCuda& p, cudaStream_t stream, Kernel kernel) {
  const int queries = p.beams * (p.heads / p.kv_heads) * p.queries;
  const auto blocks = static_cast<unsigned>((queries + kQueries - 1) / kQueries);
  const auto grid = static_cast<unsigned>(p.families) * p.kv_heads * p.splits * blocks;
  launch("decode_attention", kernel, dim3(grid), dim3(kThreads),
         shared_bytes<T, kQueries, kHeadDim>(p.head_size), stream, p);
}

}  // namespace

template <typename T, int kHeadDim>
void decode_attention_cuda(const DecodeAttentionCuda& p, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    const int queries = p.beams * (p.heads / p.kv_heads) * p.queries;
    if (queries == 1)
      launch_blocks<T, 1, kHeadDim>(p, stream, fp32_kernel<1, kHeadDim>);
    else if (queries <= 4)
      launch_blocks<T, 4, kHeadDim>(p, stream, fp32_kernel<4, kHeadDim>);
    else
      launch_blocks<T, 8, kHeadDim>(p, stream, fp32_kernel<8, kHeadDim>);
  } else {
    launch_blocks<T, 16, kHeadDim>(p, stream, product_kernel<T, kHeadDim>);
  }
  if (p.splits == 1) return;
  const int64_t all = static_cast<int64_t>(p.families) * p.beams * p.heads * p.queries;
  launch("decode_attention merge", merge_kernel<T>,
         dim3(static_cast<unsigned>((all + kWarps - 1) / kWarps)), dim3(kThreads), 0, stream, p);
}

template void decode_attention_cuda<FUSED_ATTN_T, FUSED_ATTN_HEAD_DIM>(const DecodeAttentionCuda& p,
                                                                       cudaStream_t stream);

}  // namespace fused_attn
