// The meaning of csrc/common/ptx.cuh's functions in C++.
//
// Reference: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include "collectives.h"
#include "intrinsics.h"

namespace fused_attn::ptx {

using cuda_host::current;
using cuda_host::fail;
using cuda_host::Unobserved;

inline uint32_t shared_address(const void* pointer) { return cuda_host::shared_address(pointer); }

// ---- cp.async ----------------------------------------------------------------------------------

inline void land(std::vector<cuda_host::AsyncCopy>& copies) {
  for (const cuda_host::AsyncCopy& copy : copies) {
    unsigned char bytes[16] = {};
    memcpy(bytes, copy.source, copy.filled);
    memcpy(copy.destination, bytes, copy.bytes);
  }
  Unobserved rig;
  copies.clear();
}

inline void cp_async16(uint32_t destination, const void* source, bool valid) {
  void* to = cuda_host::shared_pointer(destination);
  if (destination % 16 != 0) fail("cp.async: misaligned shared address %u", destination);
  if (valid && reinterpret_cast<uintptr_t>(source) % 16 != 0)
    fail("cp.async: misaligned global address");
  cuda_host::announce_write(to, 16);
  Unobserved rig;
  current->uncommitted_copies.push_back({to, source, 16, valid ? 16u : 0u});
}

inline void cp_async_commit() {
  {
    Unobserved rig;
    current->copy_groups.push_back(std::move(current->uncommitted_copies));
    current->uncommitted_copies.clear();
  }
  if (!cuda_host::schedule.late) land(current->copy_groups.back());
}

template <int kPending>
void cp_async_wait() {
  auto& groups = current->copy_groups;
  while (groups.size() > kPending) {
    land(groups.front());
    Unobserved rig;
    groups.erase(groups.begin());
  }
}

// ---- ldmatrix ----------------------------------------------------------------------------------

struct MatrixOperand {
  uint32_t row[4];   // the 16 bytes that this lane's address names
  uint32_t* result;  // [4]
};

// Four 8 x 8 matrices of 16-bit elements; lanes 8 m to 8 m + 7 name the rows of matrix m.
inline void load_matrices(uint32_t (&result)[4], uint32_t address, bool transposed,
                          const char* what) {
  if (address % 16 != 0) fail("%s: misaligned address %u", what, address);
  MatrixOperand operand{{}, result};
  memcpy(operand.row, __builtin_assume_aligned(cuda_host::shared_pointer(address), 16), 16);
  cuda_host::meet(~0u, what, operand, false, [transposed](MatrixOperand** lanes) {
    const auto element = [lanes](int matrix, int row, int column) {
      const uint32_t pair = lanes[matrix * 8 + row]->row[column / 2];
      return pair >> (16 * (column % 2)) & 0xFFFFu;
    };
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int major = lane / 4;
        const int minor = lane % 4 * 2;
        lanes[lane]->result[matrix] =
            transposed ? element(matrix, minor, major) | element(matrix, minor + 1, major) << 16
                       : element(matrix, major, minor) | element(matrix, major, minor + 1) << 16;
      }
  });
}

inline void ldmatrix_x4(uint32_t (&result)[4], uint32_t address) {
  load_matrices(result, address, false, "ldmatrix");
}
inline void ldmatrix_x4_trans(uint32_t (&result)[4], uint32_t address) {
  load_matrices(result, address, true, "ldmatrix.trans");
}

// ---- mma.sync ----------------------------------------------------------------------------------

template <class T>
float widen(uint32_t bits);

template <>
inline float widen<__nv_bfloat16>(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

template <>
inline float widen<__half>(uint32_t bits) {
  static const std::vector<float>& table = *[] {
    auto* values = new std::vector<float>(65536);
    for (unsigned i = 0; i < 65536; ++i)
      (*values)[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(i)));
    return values;
  }();
  return table[bits & 0xFFFFu];
}

struct ProductOperand {
  const uint32_t* a;
  uint32_t b[2];
  float* c;
};

// c[16, 8] += a[16, 16] @ b[16, 8]. Lane l holds rows l / 4 and l / 4 + 8 of a and c, columns
// 2 (l % 4), + 1 (and + 8, + 9 of a); of b column l / 4.
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ProductOperand operand{a, {b0, b1}, c};
  cuda_host::meet(~0u, "mma.m16n8k16", operand, false, [](ProductOperand** lanes) {
    float a[16][16];
    float b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4;
      const int pair = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          a[group + i % 2 * 8][pair + half + i / 2 * 8] =
              widen<T>(lanes[lane]->a[i] >> (16 * half) & 0xFFFFu);
        for (int i = 0; i < 2; ++i)
          b[pair + half + i * 8][group] = widen<T>(lanes[lane]->b[i] >> (16 * half) & 0xFFFFu);
      }
    }
    float product[16][8] = {};
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) product[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        lanes[lane]->c[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace fused_attn::ptx
