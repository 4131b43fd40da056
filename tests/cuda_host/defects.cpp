// Small kernels, each right and with one deliberate mistake: test_rig.py requires that the rig
// lets the right ones pass and finds every mistake.
//
//     defects NAME right|wrong
//
// exits with 0 when the result is right, 1 when it is not, 2 when the rig reports an error.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/device.cuh"
#include "common/ptx.cuh"

using namespace fused_attn;

namespace {

constexpr int kThreads = 64;

// ---- Synchronisation ---------------------------------------------------------------------------

// Each thread takes what another warp wrote.
template <bool kWrong>
__global__ void missing_barrier(float* out) {
  SHARED(float, values, [kThreads]);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!kWrong) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// The buffer's second use overtakes readers of the first.
template <bool kWrong>
__global__ void reused_buffer(float* out) {
  SHARED(float, buffer, [kThreads]);
  buffer[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float first = buffer[kThreads - 1 - threadIdx.x];
  if (!kWrong) __syncthreads();
  buffer[threadIdx.x] = 2.0f * static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = first + buffer[kThreads - 1 - threadIdx.x] -
                     2.0f * static_cast<float>(kThreads - 1 - threadIdx.x);
}

// Lanes of a warp are no more ordered than warps are.
template <bool kWrong>
__global__ void missing_syncwarp(float* out) {
  SHARED(float, values, [kThreads]);
  values[threadIdx.x] = static_cast<float>(threadIdx.x ^ 1);
  if (!kWrong) __syncwarp();
  out[threadIdx.x] = static_cast<float>(kThreads - 1) - values[threadIdx.x ^ 1];
}

// Some threads wait at a barrier that others never reach.
template <bool kWrong>
__global__ void divergent_barrier(float* out) {
  if (!kWrong || threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = static_cast<float>(kThreads - 1 - threadIdx.x);
}

template <bool kWrong>
__global__ void exited_lanes(float* out) {
  out[threadIdx.x] = static_cast<float>(kThreads - 1 - threadIdx.x);
  if (kWrong && threadIdx.x % 2 == 0) return;
  out[threadIdx.x] += __shfl_xor_sync(kFullMask, 0.0f, 1);
}

// Lanes of one warp meet in different operations.
template <bool kWrong>
__global__ void mixed_collectives(float* out) {
  float other;
  if (kWrong && threadIdx.x % 32 < 16)
    other = __shfl_down_sync(kFullMask, 0.0f, 1);
  else
    other = __shfl_xor_sync(kFullMask, 0.0f, 1);
  out[threadIdx.x] = static_cast<float>(kThreads - 1 - threadIdx.x) + other;
}

// A shuffle takes from a lane outside its mask.
template <bool kWrong>
__global__ void absent_source(float* out) {
  float other = 0.0f;
  if (threadIdx.x % 32 < 16) other = __shfl_sync(0xFFFFu, 0.0f, kWrong ? 20 : 5);
  out[threadIdx.x] = static_cast<float>(kThreads - 1 - threadIdx.x) + other;
}

// Waits for ever for a flag that nobody sets.
template <bool kWrong>
__global__ void barrier_counts(float* out) {
  cuda_host::barrier(1, kWrong && threadIdx.x < 32 ? 32 : kThreads, true, "bar.sync");
  out[threadIdx.x] = static_cast<float>(kThreads - 1 - threadIdx.x);
}

// Two blocks write one element.
template <bool kWrong>
__global__ void race_of_blocks(float* out) {
  const int block = blockIdx.x;
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads / 2; ++i) {
      const int element = block * kThreads / 2 + i;
      out[kWrong ? element % (kThreads / 2) : element] = static_cast<float>(kThreads - 1 - element);
    }
}

// The same global element by a plain and by an atomic addition.
template <bool kWrong>
__global__ void lost_update(float* out) {
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads; ++i) out[i] = static_cast<float>(kThreads - 1 - i);
  __syncthreads();
  if (kWrong)
    out[0] += 1.0f;
  else
    atomicAdd(out, 1.0f);
  __syncthreads();
  if (threadIdx.x == 0) out[0] -= static_cast<float>(kThreads);
}

// ---- Asynchronous copies -----------------------------------------------------------------------

template <bool kWrong>
__global__ void missing_wait(float* out, const float* source) {
  auto* buffer = reinterpret_cast<float*>(dynamic_shared());
  const int first = threadIdx.x * 4;
  if (first < kThreads) ptx::cp_async16(ptx::shared_address(buffer + first), source + first, true);
  ptx::cp_async_commit();
  if (!kWrong) ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
}

// The buffer is filled again while others still read it.
template <bool kWrong>
__global__ void copy_into_buffer_in_use(float* out, const float* source) {
  auto* buffer = reinterpret_cast<float*>(dynamic_shared());
  const int first = threadIdx.x * 4;
  float last = 0.0f;
  for (int turn = 0; turn < 2; ++turn) {
    if (first < kThreads)
      ptx::cp_async16(ptx::shared_address(buffer + first),
                      source + (turn == 0 ? 0 : kThreads) + first, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (turn == 0) last = buffer[kThreads - 1 - threadIdx.x];
    if (!kWrong) __syncthreads();
  }
  out[threadIdx.x] = last;
}

template <bool kWrong>
__global__ void misaligned_copy(float* out, const float* source) {
  auto* buffer = reinterpret_cast<float*>(dynamic_shared());
  const int first = threadIdx.x * 4;
  if (first < kThreads)
    ptx::cp_async16(ptx::shared_address(buffer + first), source + first + (kWrong ? 1 : 0), true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
}

// ---- Memory ------------------------------------------------------------------------------------

// `over` is 1 in the wrong kernel: not known to the compiler.
__global__ void global_bounds(float* out, int over) {
  out[threadIdx.x + over] = static_cast<float>(kThreads - 1 - threadIdx.x);
}

__global__ void dynamic_shared_bounds(float* out, int over) {
  auto* values = reinterpret_cast<float*>(dynamic_shared());
  values[threadIdx.x + over] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x + over];
}

__global__ void static_shared_bounds(float* out, int over) {
  SHARED(float, values, [kThreads]);
  float* pointer = values;
  pointer[threadIdx.x + over] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = pointer[kThreads - 1 - threadIdx.x + over];
}

__global__ void local_bounds(float* out, int over) {
  float values[kThreads];
  for (int i = 0; i < kThreads; ++i) values[i] = static_cast<float>(kThreads - 1 - i);
  out[threadIdx.x] = values[threadIdx.x + over];
}

__global__ void misaligned_vector(float* out, int over) {
  if (threadIdx.x % 4 != 0) return;
  Pack<float, 4> pack;
  for (int i = 0; i < 4; ++i)
    pack.element[i] = static_cast<float>(kThreads - 1 - static_cast<int>(threadIdx.x) - i);
  store_pack(out + threadIdx.x + (threadIdx.x < kThreads - 4 ? over : 0), pack);
}

template <bool kWrong>
__global__ void uninitialised_shared(float* out) {
  SHARED(float, values, [kThreads]);
  if (!kWrong) values[threadIdx.x] = 0.0f;
  __syncthreads();
  out[threadIdx.x] =
      static_cast<float>(kThreads - 1 - threadIdx.x) + values[kThreads - 1 - threadIdx.x];
}

// ---- The program -------------------------------------------------------------------------------

// Of the exact size, so that AddressSanitizer sees one element beyond.
float* array(int count) {
  auto* memory = static_cast<float*>(malloc(count * sizeof(float)));
  memset(memory, 0xFF, count * sizeof(float));
  return memory;
}

int run(const std::string& name, bool wrong) {
  float* out = array(kThreads);
  float* source = array(2 * kThreads + 4);
  for (int i = 0; i < 2 * kThreads + 4; ++i) source[i] = static_cast<float>(i);
  bool found = false;
  const auto go = [&](const char* kernel, auto right_kernel, auto wrong_kernel, unsigned blocks,
                      auto... more) {
    if (name != kernel) return;
    found = true;
    launch(kernel, wrong ? wrong_kernel : right_kernel, dim3(blocks), dim3(kThreads),
           kThreads * sizeof(float), nullptr, out, more...);
  };
#define GO(kernel) go(#kernel, kernel<false>, kernel<true>, 1)
#define GO_WITH_SOURCE(kernel) \
  go(#kernel, kernel<false>, kernel<true>, 1, static_cast<const float*>(source))
#define GO_WITH_OVER(kernel) go(#kernel, kernel, kernel, 1, wrong ? 1 : 0)
  GO(missing_barrier);
  GO(reused_buffer);
  GO(missing_syncwarp);
  GO(divergent_barrier);
  GO(exited_lanes);
  GO(mixed_collectives);
  GO(absent_source);
  GO(barrier_counts);
  go("race_of_blocks", race_of_blocks<false>, race_of_blocks<true>, 2);
  GO(lost_update);
  GO_WITH_SOURCE(missing_wait);
  GO_WITH_SOURCE(copy_into_buffer_in_use);
  GO_WITH_SOURCE(misaligned_copy);
  GO_WITH_OVER(global_bounds);
  GO_WITH_OVER(dynamic_shared_bounds);
  GO_WITH_OVER(static_shared_bounds);
  GO_WITH_OVER(local_bounds);
  GO_WITH_OVER(misaligned_vector);
  GO(uninitialised_shared);
  if (!found) {
    fprintf(stderr, "there is no kernel %s\n", name.c_str());
    return 3;
  }
  int errors = 0;
  for (int i = 0; i < kThreads; ++i) errors += out[i] != static_cast<float>(kThreads - 1 - i);
  if (errors != 0) fprintf(stderr, "wrong: %d of %d elements\n", errors, kThreads);
  free(out);
  free(source);
  return errors != 0;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 3;
  try {
    return run(words[1], strcmp(words[2], "wrong") == 0);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
