// C = A B of 16-bit elements by everything that common/ptx_sm90.cuh has: one warpgroup has tiles
// copied into a ring of buffers, two multiply them. Each deliberate mistake is one that the rig
// must find.
#pragma once

#include "common/ptx_sm90.cuh"

namespace fused_attn {

enum class Mistake {
  kNone,
  kNoWaitForTiles,        // multiplies what is not there yet
  kNoWaitForBuffer,       // fills a buffer that is still read
  kEarlyRelease,          // gives a buffer back while a product reads it
  kNoWaitForProducts,     // stores accumulators that are not complete
  kTooFewBytes,           // announces less than is copied
  kTooManyBytes,          // ... or more
  kWrongParity,           // waits for the other phase
  kMissingArrival,        // a warp does not say that it has read
  kNoFenceOfBarriers,     // copies complete at a barrier that they may not see
  kNoFenceOfRegisters,    // products overtake what threads do to registers
  kDivergentProduct,      // a warp of the warpgroup takes no part
  kDifferentDescriptors,  // threads of the warpgroup name different tiles
  kOverwrittenBarrier,    // writes beyond the tiles, over a barrier
  kCopyAfterTheEnd,       // fills a buffer that nobody waits for
};

constexpr int kProductRows = 128;  // of a block: 64 a warpgroup
constexpr int kDepth = 64;         // of K in a buffer: rows of 128 bytes
constexpr int kBuffers = 3;
constexpr int kProductThreads = 3 * 128;

template <int kN>
constexpr int kBufferBytes = (kProductRows + kN) * kDepth * 2;

template <int kN>
constexpr int kProductSharedBytes = kBuffers * kBufferBytes<kN> + 2 * kBuffers * 8;

// The columns of K from 16 `step` in a tile of this form.
template <ptx::Major kMajor>
__device__ __forceinline__ uint64_t step_descriptor(uint32_t tile, int step) {
  constexpr uint32_t kEightRows = 8 * 128;
  if constexpr (kMajor == ptx::Major::kK)
    return ptx::matrix_descriptor(tile + step * 32, 0, kEightRows, ptx::Swizzle::k128);
  else
    return ptx::matrix_descriptor(tile + step * 16 * 128, kDepth * 128, kEightRows,
                                  ptx::Swizzle::k128);
}

// A lane's part of 16 columns of A, whose tile has its rows along K.
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], uint32_t tile, int step) {
  const int thread = threadIdx.x % 128;
  for (int i = 0; i < 4; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
    const int column = step * 16 + thread % 4 * 2 + i / 2 * 8;
    const int offset = row * 128 + ((column * 2) ^ (row % 8 * 16));
    const unsigned char* shared = dynamic_shared();
    a[i] =
        *reinterpret_cast<const uint32_t*>(shared + (tile - ptx::shared_address(shared)) + offset);
  }
}

// A is [M, K], or [K, M] for kA == kOuter; B is [N, K], or [K, N].
template <class T, int kN, ptx::Major kA, ptx::Major kB, bool kAInRegisters, Mistake kMistake>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap a_map,
                   const __grid_constant__ CUtensorMap b_map, float* c, int M, int N, int K) {
#ifdef FUSED_ATTN_SM90A
  using ptx::Major;
  constexpr uint32_t kTileBytes = 64 * 128;  // of A for one warpgroup; of 64 columns of B
  const uint32_t buffers = ptx::shared_address(dynamic_shared());
  const uint32_t filled = buffers + kBuffers * kBufferBytes<kN>;
  const uint32_t emptied = filled + kBuffers * 8;
  const int m0 = blockIdx.y * kProductRows;
  const int n0 = blockIdx.x * kN;
  const int turns = (K + kDepth - 1) / kDepth;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kBuffers; ++i) {
      ptx::mbarrier_init(filled + 8 * i, 1);
      ptx::mbarrier_init(emptied + 8 * i, 2 * 128);
    }
    if (kMistake != Mistake::kNoFenceOfBarriers) ptx::mbarrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    ptx::lower_registers<40>();
    if (threadIdx.x != 0) return;
    const int copied = kMistake == Mistake::kCopyAfterTheEnd ? turns + 1 : turns;
    for (int turn = 0; turn < copied; ++turn) {
      const int i = turn % kBuffers;
      const int k0 = turn * kDepth;
      const uint32_t tile = buffers + i * kBufferBytes<kN>;
      // Nobody has used the buffer at first: the phase before the first has ended.
      if (kMistake != Mistake::kNoWaitForBuffer)
        ptx::mbarrier_wait(emptied + 8 * i, (turn / kBuffers + 1) % 2);
      const int error = kMistake == Mistake::kTooFewBytes    ? -128
                        : kMistake == Mistake::kTooManyBytes ? 128
                                                             : 0;
      ptx::mbarrier_arrive_expect(filled + 8 * i, kBufferBytes<kN> + error);
      for (int half = 0; half < 2; ++half) {
        const int m = m0 + half * 64;
        ptx::tma_load_2d(tile + half * kTileBytes, &a_map, filled + 8 * i, kA == Major::kK ? k0 : m,
                         kA == Major::kK ? m : k0);
      }
      for (int part = 0; part < kN / 64; ++part) {
        const int n = n0 + part * 64;
        ptx::tma_load_2d(tile + (2 + part) * kTileBytes, &b_map, filled + 8 * i,
                         kB == Major::kK ? k0 : n, kB == Major::kK ? n : k0);
      }
    }
    return;
  }

  ptx::raise_registers<232>();
  const int group = threadIdx.x / 128 - 1;
  const int warp = threadIdx.x % 128 / 32;
  const int lane = threadIdx.x % 32;
  float d[kN / 2];
  for (int turn = 0; turn < turns; ++turn) {
    const int i = turn % kBuffers;
    const uint32_t tile = buffers + i * kBufferBytes<kN>;
    const uint32_t a_tile = tile + group * kTileBytes;
    const uint32_t b_tile = tile + 2 * kTileBytes;
    const int other = kMistake == Mistake::kWrongParity ? 1 : 0;
    if (kMistake != Mistake::kNoWaitForTiles)
      ptx::mbarrier_wait(filled + 8 * i, (turn / kBuffers + other) % 2);
    if (kMistake == Mistake::kDivergentProduct && warp == 3) continue;
    uint32_t a[kDepth / 16][4];
    if constexpr (kAInRegisters)
      for (int step = 0; step < kDepth / 16; ++step) load_fragment(a[step], a_tile, step);
    if (kMistake != Mistake::kNoFenceOfRegisters) ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      const bool differs = kMistake == Mistake::kDifferentDescriptors && lane == 31;
      const uint64_t b = step_descriptor<kB>(b_tile, differs ? 0 : step);
      const bool adds = turn > 0 || step > 0;
      if constexpr (kAInRegisters)
        ptx::wgmma<T, kN, kB>(d, a[step], b, adds);
      else
        ptx::wgmma<T, kN, kA, kB>(d, step_descriptor<kA>(a_tile, step), b, adds);
    }
    ptx::wgmma_commit();
    if (kMistake == Mistake::kOverwrittenBarrier && turn == 1 && lane == 0)
      memset(dynamic_shared() + kBuffers * kBufferBytes<kN>, 0, 8);
    // The next products are issued before these have ended, unless registers would be lost.
    constexpr int kPending = kAInRegisters ? 0 : 1;
    ptx::wgmma_wait<kPending>();
    const int finished = kMistake == Mistake::kEarlyRelease ? turn : turn - kPending;
    if (kMistake == Mistake::kMissingArrival && warp == 0) continue;
    if (finished >= 0) ptx::mbarrier_arrive(emptied + 8 * (finished % kBuffers));
  }
  if (kMistake != Mistake::kNoWaitForProducts) ptx::wgmma_wait<0>();
  ptx::wgmma_hold(d);

#pragma unroll
  for (int j = 0; j < kN / 2; ++j) {
    const int m = m0 + group * 64 + warp * 16 + lane / 4 + j / 2 % 2 * 8;
    const int n = n0 + j / 4 * 8 + lane % 4 * 2 + j % 2;
    if (m < M && n < N) c[static_cast<int64_t>(m) * N + n] = d[j];
  }
#endif
}

}  // namespace fused_attn
