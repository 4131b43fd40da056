// Launches attention's kernels of one element type and head size.
// units: FUSED_ATTN_T = __half __nv_bfloat16
// units: FUSED_ATTN_HEAD_DIM = 32 64 96 128 256
#include <algorithm>

#include "attention/attention_backward_kernel.cuh"
#include "attention/attention_cuda.h"
#include "attention/attention_forward_kernel.cuh"
#include "attention/attention_mask_kernel.cuh"

namespace fused_attn {
namespace {

// What tiles of neighbouring blocks may read: half of the L2 cache of an H100.
constexpr int64_t kSharedCacheBytes = int64_t{25} << 20;

// Blocks of one dimension: tiles of `size` rows of `heads` heads. `length` and `width` are of what
// each head of the other side reads, `sharing` how many heads read the same.
dim3 grid_of(AttentionGrid& grid, int rows, int size, int64_t heads, int64_t length, int64_t width,
             int sharing, bool reversed) {
  grid.tiles = (rows + size - 1) / size;
  grid.heads = static_cast<int>(heads);
  const int64_t bytes = std::max<int64_t>(length * width * 2, 1);
  const int64_t group = std::max<int64_t>(kSharedCacheBytes / bytes, 1) * sharing;
  grid.group = static_cast<int>(std::clamp<int64_t>(group, 1, heads));
  grid.reversed = reversed;
  return dim3(static_cast<unsigned>(grid.tiles * heads));
}

// Later queries see more keys.
bool is_triangle(const AttentionCall& call) {
  return call.right < kNoBound && call.left == kNoBound;
}

template <typename T, int kHeadDim, bool kGeneral>
void forward(AttentionForwardCuda p, cudaStream_t stream) {
  using Tiles = ForwardTiles<kHeadDim, kGeneral>;
  const AttentionCall& call = p.call;
  const dim3 blocks =
      grid_of(p.grid, call.queries, Tiles::kQueries, static_cast<int64_t>(call.batch) * call.heads,
              call.keys, call.k.width + call.v.width, call.heads_per_key, is_triangle(call));
  launch("attention_forward", attention_forward_kernel<T, kHeadDim, kGeneral>, blocks,
         dim3(kAttentionThreads), Tiles::kSharedBytes, stream, p);
}

template <typename T, int kHeadDim, bool kGeneral, bool kWantKeys, bool kWantValues>
void key_gradient(AttentionBackwardCuda p, cudaStream_t stream) {
  using Tiles = KeyGradientTiles<kHeadDim, kGeneral>;
  const AttentionCall& call = p.call;
  const dim3 blocks = grid_of(p.grid, call.keys, Tiles::kKeys,
                              static_cast<int64_t>(call.batch) * (call.heads / call.heads_per_key),
                              static_cast<int64_t>(call.queries) * call.heads_per_key,
                              call.q.width + p.grad_output.width, 1, false);
  launch("attention_key_gradient",
         attention_key_gradient_kernel<T, kHeadDim, kGeneral, kWantKeys, kWantValues>, blocks,
         dim3(kAttentionThreads), Tiles::kSharedBytes, stream, p);
}

template <typename T, int kHeadDim, bool kGeneral>
void backward(AttentionBackwardCuda p, cudaStream_t stream) {
  using Tiles = QueryGradientTiles<kHeadDim, kGeneral>;
  const AttentionCall& call = p.call;
  const dim3 blocks =
      grid_of(p.grid, call.queries, Tiles::kQueries, static_cast<int64_t>(call.batch) * call.heads,
              call.keys, call.k.width + call.v.width, call.heads_per_key, is_triangle(call));
  launch("attention_query_gradient", attention_query_gradient_kernel<T, kHeadDim, kGeneral>, blocks,
         dim3(kAttentionThreads), Tiles::kSharedBytes, stream, p);
  if constexpr (KeyGradientTiles<kHeadDim, kGeneral>::kTogether) {
    key_gradient<T, kHeadDim, kGeneral, true, true>(p, stream);
  } else {
    key_gradient<T, kHeadDim, kGeneral, false, true>(p, stream);
    key_gradient<T, kHeadDim, kGeneral, true, false>(p, stream);
  }
}

}  // namespace

template <typename T, int kHeadDim>
void attention_forward_cuda(const AttentionForwardCuda& p, bool general, cudaStream_t stream) {
  if (general)
    forward<T, kHeadDim, true>(p, stream);
  else
    forward<T, kHeadDim, false>(p, stream);
}

template <typename T, int kHeadDim>
void attention_backward_cuda(const AttentionBackwardCuda& p, bool general, cudaStream_t stream) {
  if (general)
    backward<T, kHeadDim, true>(p, stream);
  else
    backward<T, kHeadDim, false>(p, stream);
}

template <typename T, int kHeadDim>
void attention_bias_gradient_cuda(const AttentionBiasGradient& p, cudaStream_t stream) {
  const AttentionCall& call = p.backward.call;
  const auto tiles = [](int64_t size, int full) {
    return size > 1 ? (static_cast<int64_t>(full) + kBiasTile - 1) / kBiasTile : int64_t{1};
  };
  const int64_t blocks =
      p.sizes[0] * p.sizes[1] * tiles(p.sizes[2], call.queries) * tiles(p.sizes[3], call.keys);
  launch("attention_bias_gradient", attention_bias_gradient_kernel<T, kHeadDim>,
         dim3(static_cast<unsigned>(blocks)), dim3(kAttentionThreads),
         BiasGradientTiles<kHeadDim>::kSharedBytes, stream, p);
}

template <typename T, int kHeadDim>
void attention_mask_classes_cuda(const AttentionCall& call, const AttentionMaskSizes& sizes,
                                 cudaStream_t stream) {
  const int64_t blocks =
      static_cast<int64_t>(sizes.batch) * sizes.heads * sizes.row_tiles * sizes.column_tiles;
  launch("attention_mask_classes", attention_mask_classes_kernel<T, kHeadDim>,
         dim3(static_cast<unsigned>(blocks)), dim3(kAttentionThreads), 0, stream, call, sizes);
}

template void attention_forward_cuda<FUSED_ATTN_T, FUSED_ATTN_HEAD_DIM>(const AttentionForwardCuda&,
                                                                        bool, cudaStream_t);
template void attention_backward_cuda<FUSED_ATTN_T, FUSED_ATTN_HEAD_DIM>(
    const AttentionBackwardCuda&, bool, cudaStream_t);
template void attention_bias_gradient_cuda<FUSED_ATTN_T, FUSED_ATTN_HEAD_DIM>(
    const AttentionBiasGradient&, cudaStream_t);
template void attention_mask_classes_cuda<FUSED_ATTN_T, FUSED_ATTN_HEAD_DIM>(
    const AttentionCall&, const AttentionMaskSizes&, cudaStream_t);

}  // namespace fused_attn
