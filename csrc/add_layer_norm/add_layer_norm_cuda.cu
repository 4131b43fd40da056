// Launches of add_layer_norm's CUDA kernels for one element type.
// units: FUSED_ATTN_T = float __half __nv_bfloat16
#include "add_layer_norm/add_layer_norm_kernel.cuh"

namespace fused_attn {
namespace {

using namespace add_layer_norm;

template <class T, int kThreads, int kElements, int kVector>
void forward_tile(const AddLayerNormForwardCuda& p, cudaStream_t stream) {
  constexpr int kBlock = kThreads < 128 ? 128 : kThreads;
  constexpr int kRows = kBlock / kThreads;
  const dim3 grid(static_cast<unsigned>((p.rows + kRows - 1) / kRows));
  launch("add_layer_norm", forward_kernel<T, kThreads, kBlock, kElements / kVector, kVector>, grid,
         dim3(kBlock), 0, stream, p);
}

template <class T, int kVector>
void forward(const AddLayerNormForwardCuda& p, cudaStream_t stream) {
  if (p.width <= 256)
    forward_tile<T, 32, 8, kVector>(p, stream);
  else if (p.width <= 512)
    forward_tile<T, 32, 16, kVector>(p, stream);
  else if (p.width <= 1024)
    forward_tile<T, 32, 32, kVector>(p, stream);
  else if (p.width <= 2048)
    forward_tile<T, 128, 16, kVector>(p, stream);
  else if (p.width <= 4096)
    forward_tile<T, 128, 32, kVector>(p, stream);
  else if (p.width <= 8192)
    forward_tile<T, 256, 32, kVector>(p, stream);
  else if (p.width <= 16384)
    forward_tile<T, 512, 32, kVector>(p, stream);
  else
    launch("add_layer_norm", long_forward_kernel<T, 1024, kVector>,
           dim3(static_cast<unsigned>(p.rows)), dim3(1024), 0, stream, p);
}

template <class T, int kThreads, int kElements, int kVector, bool kHasMeans>
void backward_tile(const AddLayerNormBackwardCuda& p, int slices, cudaStream_t stream) {
  launch("add_layer_norm", backward_kernel<T, kThreads, kElements / kVector, kVector, kHasMeans>,
         dim3(static_cast<unsigned>(p.programs), static_cast<unsigned>(slices)),
         dim3(kBackwardThreads), 0, stream, p);
}

template <class T, int kVector>
void backward(const AddLayerNormBackwardCuda& p, cudaStream_t stream) {
  constexpr int kElements = kVector == 1 ? 8 : 16;
  const AddLayerNormTiling tiling = add_layer_norm_backward_tiling(p.width, kVector > 1);
  if (tiling.slices > 1) {
    launch("add_layer_norm", means_kernel<T, 512, kVector>, dim3(static_cast<unsigned>(p.rows)),
           dim3(512), 0, stream, p);
    return backward_tile<T, 512, 8, kVector, true>(p, tiling.slices, stream);
  }
  if (p.width <= 256) return backward_tile<T, 32, 8, kVector, false>(p, 1, stream);
  if constexpr (kElements > 8)
    if (tiling.threads == 32) return backward_tile<T, 32, kElements, kVector, false>(p, 1, stream);
  if (tiling.threads == 128) return backward_tile<T, 128, kElements, kVector, false>(p, 1, stream);
  if (tiling.threads == 256) return backward_tile<T, 256, kElements, kVector, false>(p, 1, stream);
  return backward_tile<T, 512, kElements, kVector, false>(p, 1, stream);
}

}  // namespace

template <class T>
void add_layer_norm_forward_cuda(const AddLayerNormForwardCuda& p, cudaStream_t stream) {
  if (p.is_vectorised)
    forward<T, 16 / sizeof(T)>(p, stream);
  else
    forward<T, 1>(p, stream);
}

template <class T>
void add_layer_norm_backward_cuda(const AddLayerNormBackwardCuda& p, cudaStream_t stream) {
  if (p.is_vectorised)
    backward<T, 16 / sizeof(T)>(p, stream);
  else
    backward<T, 1>(p, stream);
}

template void add_layer_norm_forward_cuda<FUSED_ATTN_T>(const AddLayerNormForwardCuda&,
                                                        cudaStream_t);
template void add_layer_norm_backward_cuda<FUSED_ATTN_T>(const AddLayerNormBackwardCuda&,
                                                         cudaStream_t);

template <class T>
void add_layer_norm_reduce_cuda(const float* partial, int kinds, int programs, int width,
                                float* const* totals, cudaStream_t stream) {
  Totals arguments{};
  for (int kind = 0; kind < kinds; ++kind) arguments.of_kind[kind] = totals[kind];
  launch("add_layer_norm", reduce_kernel<kReduceRows>,
         dim3(static_cast<unsigned>((width + kWarp - 1) / kWarp), static_cast<unsigned>(kinds)),
         dim3(kWarp * kReduceRows), 0, stream, partial, programs, width, arguments);
}
template void add_layer_norm_reduce_cuda<FUSED_ATTN_T>(const float*, int, int, int, float* const*,
                                                       cudaStream_t);

}  // namespace fused_attn
