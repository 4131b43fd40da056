// Classifies the tiles of a boolean mask, so that attention leaves out those that show nothing and
// looks up pairs in mixed ones alone.
#pragma once

#include "attention/attention_pairs_kernel.cuh"

namespace fused_attn {

// One block a tile. T and kHeadDim only keep apart the copies of the kernel's units.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_mask_classes_kernel(const __grid_constant__ AttentionCall call,
                                  const __grid_constant__ AttentionMaskSizes sizes) {
  int block = static_cast<int>(blockIdx.x);
  const int column_tile = block % sizes.column_tiles;
  block /= sizes.column_tiles;
  const int row_tile = block % sizes.row_tiles;
  block /= sizes.row_tiles;
  const int h = block % sizes.heads;
  const int b = block / sizes.heads;
  const uint8_t* const mask =
      static_cast<const uint8_t*>(call.mask.data) + b * call.mask.stride_b + h * call.mask.stride_h;
  const int64_t stride_s = call.mask.stride_s;
  // Two threads a row, each of half of its columns.
  constexpr int kColumns = kMaskClassTile / 2;
  const int thread = thread_number();
  const int row = row_tile * kMaskClassTile + thread / 2;
  const int first = column_tile * kMaskClassTile + thread % 2 * kColumns;
  bool shows = false, hides = false;
  if (row < sizes.rows) {
    const uint8_t* const line = mask + row * call.mask.stride_t + first * stride_s;
    const int count = min(kColumns, sizes.columns - first);
    if (stride_s == 1 && count == kColumns && reinterpret_cast<uintptr_t>(line) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kColumns; i += 16) {
        const Pack<uint32_t, 4> words = load_pack<4>(reinterpret_cast<const uint32_t*>(line + i));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t word = words.element[w];
          shows |= word != 0;
          hides |= ((word - 0x01010101u) & ~word & 0x80808080u) != 0;  // a byte is 0
        }
      }
    } else {
      for (int i = 0; i < count; ++i) {
        const bool shown = line[i * stride_s] != 0;
        shows |= shown;
        hides |= !shown;
      }
    }
  }
  const int any_shows = __syncthreads_or(shows);
  const int any_hides = __syncthreads_or(hides);
  if (thread == 0) {
    const AttentionMaskClasses& c = call.mask_classes;
    c.data[b * c.stride_b + h * c.stride_h + static_cast<int64_t>(row_tile) * c.stride_t +
           column_tile * c.stride_s] = static_cast<uint8_t>(!any_shows  ? 0
                                                            : any_hides ? 2
                                                                        : 1);
  }
}

}  // namespace fused_attn
