// Tiles of rows in shared memory, and products of them by tensor cores.
//
// A warp computes kRowTiles x 16 rows. An accumulator float[kRowTiles][n / 8][4] holds, in the
// layout of mma.m16n8k16, elements (row, column), (row, column + 1), (row + 8, column) and
// (row + 8, column + 1) of each 16 x 8 part, with row = lane / 4 and column = 2 * (lane % 4).
// That of one product is, rounded to 16 bits, the first operand of the next one.
#pragma once

#include "common/cuda.cuh"
#include "common/device.cuh"
#include "common/ptx.cuh"

namespace fused_attn {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;

// Of the block. That it is small and not negative saves the instructions of signed divisions.
__device__ __forceinline__ int thread_number() {
  return static_cast<int>(threadIdx.x % kAttentionThreads);
}

// Rows of kHeadDim 16-bit elements. The 16-byte chunks of a row are permuted by an exclusive or
// with bits of the row's number, so that the 8 rows that one ldmatrix phase reads, and the chunks
// that a warp writes, lie in different banks.
template <int kHeadDim>
struct Tile {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowBytes = kHeadDim * 2;
  // Chunks within which the permutation stays: 128 bytes, or 64 where rows are not whole multiples
  // of 128, which puts two neighbouring rows into different halves anyway.
  static constexpr int kGroup = kHeadDim % 64 == 0 ? 8 : 4;

  __device__ static __forceinline__ int permutation(int row) {
    return kGroup == 8 ? row & 7 : (row >> 1) & 3;
  }
  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ permutation(row)) << 4);
  }
  // `address` (of a row, and chunk 0 or 1) moved by an even number of chunks and a multiple of 8
  // rows. The compiler sees that only the exclusive or is not an immediate.
  __device__ static __forceinline__ uint32_t moved(uint32_t address, int chunks, int rows) {
    return (address ^ ((chunks & (kGroup - 1)) << 4)) + chunks / kGroup * (kGroup * 16) +
           rows * kRowBytes;
  }
  // Addresses of a lane for ldmatrix_x4: 16 rows of a first operand, ...
  __device__ static __forceinline__ uint32_t first_operand(uint32_t tile, int row, int lane) {
    return tile + offset(row + lane % 16, lane / 16);
  }
  // ... of 16 columns of a second operand whose columns are rows here, ...
  __device__ static __forceinline__ uint32_t by_rows(uint32_t tile, int lane) {
    return tile + offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // ... and of one whose columns are columns here, for ldmatrix_x4_trans.
  __device__ static __forceinline__ uint32_t by_columns(uint32_t tile, int lane) {
    return tile + offset(lane % 16, lane / 16);
  }
};

// Begins to copy rows [first, first + kRows), 0 from row `limit` and chunk `width / 8` on and where
// `shown(row)` is false.
template <typename T, int kHeadDim, int kRows, int kThreads, typename Shown>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* rows, int64_t stride, int width,
                                          int first, int limit, Shown shown) {
  using TileT = Tile<kHeadDim>;
  // Threads side by side have chunks side by side, all of a row's if their number divides the
  // block's threads.
  constexpr int kLanes = kThreads % TileT::kChunks == 0 ? TileT::kChunks : TileT::kGroup;
  constexpr int kRowStep = kThreads / kLanes;
  static_assert(TileT::kChunks % kLanes == 0 && kRows % kRowStep == 0);
  const int row = thread_number() / kLanes;
  const int lane = thread_number() % kLanes;
  const T* source = rows + (first + row) * stride + lane * 8;
  const int64_t step = kRowStep * stride;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowStep) {
    const int r = first + row + i;
    const bool is_shown = r < limit && shown(r);
#pragma unroll
    for (int chunk = 0; chunk < TileT::kChunks; chunk += kLanes)
      ptx::cp_async16(tile + TileT::offset(row + i, lane + chunk), source + chunk * 8,
                      is_shown && (lane + chunk) * 8 < width);
    source += step;
  }
}

struct AllShown {
  __device__ __forceinline__ bool operator()(int) const { return true; }
};

// c += a b^T over kHeadDim, for kColumns rows of b.
template <typename T, int kHeadDim, int kRowTiles, int kColumns>
__device__ __forceinline__ void multiply_transposed(float (&c)[kRowTiles][kColumns / 8][4],
                                                    uint32_t a_address, uint32_t b_address) {
  using TileT = Tile<kHeadDim>;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      ptx::ldmatrix_x4(a[i], TileT::moved(a_address, 2 * k, 16 * i));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, TileT::moved(b_address, 2 * k, 16 * j));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(c[i][2 * j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(c[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// c += a b, where a is an accumulator of kRows columns, rounded to T, and b has kRows rows.
template <typename T, int kHeadDim, int kRowTiles, int kRows>
__device__ __forceinline__ void multiply(float (&c)[kRowTiles][kHeadDim / 8][4],
                                         const float (&a)[kRowTiles][kRows / 8][4],
                                         uint32_t b_address) {
  using TileT = Tile<kHeadDim>;
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    uint32_t rounded[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        rounded[i][e] =
            pack2<T>(a[i][2 * k + e / 2][e % 2 * 2], a[i][2 * k + e / 2][e % 2 * 2 + 1]);
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, TileT::moved(b_address, 2 * j, 16 * k));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(c[i][2 * j], rounded[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(c[i][2 * j + 1], rounded[i], b[2], b[3]);
      }
    }
  }
}

template <int kRowTiles, int kColumns>
__device__ __forceinline__ void clear(float (&c)[kRowTiles][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0.0f;
}

// Over the four lanes that have the columns of a row.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kFullMask, v, 1);
  return v + __shfl_xor_sync(kFullMask, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullMask, v, 1));
  return fmaxf(v, __shfl_xor_sync(kFullMask, v, 2));
}

// Stores a warp's rows, [first, first + 16 * kRowTiles) of the head and `row` of the tile, below
// `limit`. They go through the rows of shared memory at `tile`, which no other warp uses, so that
// whole rows are written at once.
template <typename T, int kHeadDim, int kRowTiles>
__device__ __forceinline__ void store_rows(const float (&c)[kRowTiles][kHeadDim / 8][4],
                                           unsigned char* tile, int row, T* result, int64_t stride,
                                           int width, bool vectors, int first, int limit) {
  using TileT = Tile<kHeadDim>;
  const int lane = thread_number() % kWarp;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(tile + TileT::offset(row + 16 * i + lane / 4 + 8 * half, j) +
                                     lane % 4 * 4) =
            pack2<T>(c[i][j][2 * half], c[i][j][2 * half + 1]);
  __syncwarp();
  constexpr int kVectors = 16 * kRowTiles * TileT::kChunks;
  if (vectors) {
#pragma unroll 4
    for (int n = lane; n < kVectors; n += kWarp) {
      const int r = n / TileT::kChunks;
      const int chunk = n % TileT::kChunks;
      if (first + r < limit && chunk * 8 < width)
        *reinterpret_cast<uint4*>(result + (first + r) * stride + chunk * 8) =
            *reinterpret_cast<const uint4*>(tile + TileT::offset(row + r, chunk));
    }
    return;
  }
#pragma unroll 1
  for (int r = 0; r < 16 * kRowTiles && first + r < limit; ++r)
#pragma unroll 1
    for (int column = lane; column < width; column += kWarp)
      result[(first + r) * stride + column] =
          reinterpret_cast<const T*>(tile + TileT::offset(row + r, column / 8))[column % 8];
}

}  // namespace fused_attn
