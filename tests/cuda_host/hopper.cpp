// Products by common/ptx_sm90.cuh beside the same products in fp64.
//
//     hopper NAME
//
// exits with 0 when the result is right, 1 when it is not, 2 when the rig reports an error. For a
// GPU: nvcc -x cu -std=c++20 -arch=sm_90a -I csrc -I tests/cuda_host tests/cuda_host/hopper.cpp.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/tensor_map.h"
#include "hopper_kernel.cuh"

using namespace fused_attn;
using ptx::Major;

namespace {

// No multiples of a tile; K is walked through the buffers twice.
constexpr int kM = 200;
constexpr int kN = 136;
constexpr int kK = 376;

// Of the exact size, so that AddressSanitizer sees one element beyond.
template <class T>
T* array(size_t count) {
  void* memory = nullptr;
#ifdef FUSED_ATTN_CUDA_HOST
  memory = malloc(count * sizeof(T));
#else
  check_cuda(cudaMallocManaged(&memory, count * sizeof(T)), "hopper");
#endif
  memset(memory, 0xFF, count * sizeof(T));
  return static_cast<T*>(memory);
}

// Small integers: every sum of their products is a number of fp32.
template <class T>
T* integers(size_t count, uint32_t seed) {
  T* values = array<T>(count);
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = T(static_cast<float>(static_cast<int>(seed >> 24) % 9 - 4));
  }
  return values;
}

// Errors of C = A B in a form of the kernel.
template <class T, int kColumns, Major kA, Major kB, bool kAInRegisters, Mistake kMistake>
int errors() {
  constexpr bool kIsBf16 = std::is_same_v<T, __nv_bfloat16>;
  const T* a = integers<T>(kM * kK, 1);
  const T* b = integers<T>(kN * kK, 2);
  float* c = array<float>(kM * kN);
  const auto map = [](const T* data, Major major, int outer) {
    const uint64_t rows = major == Major::kK ? outer : kK;
    const uint64_t columns = major == Major::kK ? kK : outer;
    const Matrix matrix{data, kIsBf16, rows, columns, columns * sizeof(T)};
    return tensor_map("product", matrix, 64, 64, ptx::Swizzle::k128);
  };
  const dim3 grid((kN + kColumns - 1) / kColumns, (kM + kProductRows - 1) / kProductRows);
  launch("product", product_kernel<T, kColumns, kA, kB, kAInRegisters, kMistake>, grid,
         dim3(kProductThreads), kProductSharedBytes<kColumns>, nullptr, map(a, kA, kM),
         map(b, kB, kN), c, kM, kN, kK);
#ifndef FUSED_ATTN_CUDA_HOST
  check_cuda(cudaDeviceSynchronize(), "product");
#endif
  int count = 0;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      double sum = 0.0;
      for (int k = 0; k < kK; ++k)
        sum += double(static_cast<float>(a[kA == Major::kK ? m * kK + k : k * kM + m])) *
               double(static_cast<float>(b[kB == Major::kK ? n * kK + k : k * kN + n]));
      count += !(c[m * kN + n] == sum);
    }
  return count;
}

// A matrix at an address that the tensor memory accelerator does not read.
int odd_map() {
  const Matrix matrix{array<__half>(65) + 1, false, 1, 64, 128};
  tensor_map("product", matrix, 1, 64, ptx::Swizzle::k128);
  return 0;
}

template <Mistake kMistake>
int errors_of() {
  return errors<__nv_bfloat16, 64, Major::kK, Major::kK, false, kMistake>();
}

struct Entry {
  const char* name;
  int (*errors)();
};

constexpr Entry kEntries[] = {
    {"both_along_k", errors<__nv_bfloat16, 128, Major::kK, Major::kK, false, Mistake::kNone>},
    {"b_across_k", errors<__half, 128, Major::kK, Major::kOuter, false, Mistake::kNone>},
    {"both_across_k",
     errors<__nv_bfloat16, 64, Major::kOuter, Major::kOuter, false, Mistake::kNone>},
    {"a_in_registers", errors<__half, 64, Major::kK, Major::kOuter, true, Mistake::kNone>},
    {"wide", errors<__half, 256, Major::kOuter, Major::kK, false, Mistake::kNone>},
    {"wide_in_registers",
     errors<__nv_bfloat16, 256, Major::kK, Major::kOuter, true, Mistake::kNone>},
    {"odd_map", odd_map},
#ifdef FUSED_ATTN_CUDA_HOST  // a GPU would hang in some
    {"no_wait_for_tiles", errors_of<Mistake::kNoWaitForTiles>},
    {"no_wait_for_buffer", errors_of<Mistake::kNoWaitForBuffer>},
    {"early_release", errors_of<Mistake::kEarlyRelease>},
    {"no_wait_for_products", errors_of<Mistake::kNoWaitForProducts>},
    {"too_few_bytes", errors_of<Mistake::kTooFewBytes>},
    {"too_many_bytes", errors_of<Mistake::kTooManyBytes>},
    {"wrong_parity", errors_of<Mistake::kWrongParity>},
    {"missing_arrival", errors_of<Mistake::kMissingArrival>},
    {"no_fence_of_barriers", errors_of<Mistake::kNoFenceOfBarriers>},
    {"no_fence_of_registers", errors_of<Mistake::kNoFenceOfRegisters>},
    {"divergent_product", errors_of<Mistake::kDivergentProduct>},
    {"different_descriptors", errors_of<Mistake::kDifferentDescriptors>},
    {"overwritten_barrier", errors_of<Mistake::kOverwrittenBarrier>},
    {"copy_after_the_end", errors_of<Mistake::kCopyAfterTheEnd>},
#endif
};

}  // namespace

int main(int count, char** words) {
  if (count != 2) return 3;
  for (const Entry& entry : kEntries) {
    if (strcmp(words[1], entry.name) != 0) continue;
    try {
      const int wrong = entry.errors();
      if (wrong != 0) fprintf(stderr, "wrong: %d of %d elements\n", wrong, kM * kN);
      return wrong != 0;
    } catch (const std::exception& error) {
      fprintf(stderr, "%s\n", error.what());
      return 2;
    }
  }
  fprintf(stderr, "there is no %s\n", words[1]);
  return 3;
}
