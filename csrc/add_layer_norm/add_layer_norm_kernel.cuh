// CUDA kernels of add_layer_norm; fused_attn/ops/add_layer_norm/README.md has the derivation.
//
// kThreads threads have a row, and each of them kChunks vectors of kVector elements of it: 16 bytes
// where rows begin at multiples of 16 bytes, else one element. A row is read once and stays in
// registers. Flags are arguments: they are the same for all threads, and the kernels wait for
// memory, not for branches.
#pragma once

#include "add_layer_norm/add_layer_norm_cuda.h"
#include "common/device.cuh"

namespace fused_attn {
namespace add_layer_norm {

// ---- Rows --------------------------------------------------------------------------------------

// Element at which a row begins. In 32 bits: a division in 64 is a call.
__device__ __forceinline__ int64_t row_offset(const StridedRows& rows, uint32_t row) {
  if (static_cast<int64_t>(row) < rows.inner) return row * rows.inner_stride;
  const uint32_t inner = static_cast<uint32_t>(rows.inner);
  const uint32_t outer = row / inner;
  return outer * rows.outer_stride + (row - outer * inner) * rows.inner_stride;
}

template <class T, int kVector>
__device__ __forceinline__ void load_vector(float (&values)[kVector], const T* address) {
  constexpr int kPack = kVector * sizeof(T) > 16 ? 16 / sizeof(T) : kVector;
#pragma unroll
  for (int part = 0; part < kVector / kPack; ++part) {
    const Pack<T, kPack> pack = load_pack<kPack>(address + part * kPack);
#pragma unroll
    for (int i = 0; i < kPack; ++i) values[part * kPack + i] = to_float(pack.element[i]);
  }
}

template <class T, int kVector>
__device__ __forceinline__ void store_vector(T* address, const float (&values)[kVector]) {
  constexpr int kPack = kVector * sizeof(T) > 16 ? 16 / sizeof(T) : kVector;
#pragma unroll
  for (int part = 0; part < kVector / kPack; ++part) {
    Pack<T, kPack> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.element[i] = from_float<T>(values[part * kPack + i]);
    store_pack(address + part * kPack, pack);
  }
}

// The columns of a thread: chunk c begins at column first + c * kThreads * kVector.
template <class T, int kThreads, int kChunks, int kVector>
struct Columns {
  static constexpr int kStride = kThreads * kVector;
  static constexpr int kSpan = kChunks * kStride;
  using Tile = float[kChunks][kVector];

  int first;
  int width;

  __device__ __forceinline__ int column(int chunk) const { return first + chunk * kStride; }
  // With vectors, the width is a multiple of theirs.
  __device__ __forceinline__ bool has(int chunk) const { return column(chunk) < width; }

  template <class E>
  __device__ __forceinline__ void load_as(Tile& tile, const E* row) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (has(c)) {
        load_vector<E, kVector>(tile[c], row + column(c));
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) tile[c][i] = 0.0f;
      }
    }
  }

  // Elements of a row in fp32, 0 beyond the width.
  __device__ __forceinline__ void load(Tile& tile, const void* data, bool is_fp32,
                                       int64_t offset) const {
    if (is_fp32)
      load_as(tile, static_cast<const float*>(data) + offset);
    else
      load_as(tile, static_cast<const T*>(data) + offset);
  }

  __device__ __forceinline__ void load(Tile& tile, const StridedRows& rows, bool is_fp32,
                                       uint32_t row) const {
    load(tile, rows.data, is_fp32, row_offset(rows, row));
  }

  __device__ __forceinline__ void load(Tile& tile, const RowParameter& parameter) const {
    load(tile, parameter.data, parameter.is_fp32, 0);
  }

  __device__ __forceinline__ void store(void* data, bool is_fp32, int64_t offset,
                                        const Tile& tile) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (!has(c)) continue;
      if (is_fp32)
        store_vector(static_cast<float*>(data) + offset + column(c), tile[c]);
      else
        store_vector(static_cast<T*>(data) + offset + column(c), tile[c]);
    }
  }

  // A bit an element of the tile: whether dropout keeps it.
  __device__ __forceinline__ uint32_t keep_bits(const AddLayerNormInputs& in, uint32_t row) const {
    static_assert(kChunks * kVector <= 32);
    if (in.seed == nullptr) return 0xFFFFFFFFu;
    const uint64_t seed = static_cast<uint64_t>(*in.seed);
    uint32_t bits = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint64_t element = static_cast<uint64_t>(row) * width + column(c);
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const uint4 words = philox(seed, (element + i) / 4);
        if constexpr (kVector == 1) {  // a counter has three elements of other threads
          const uint32_t lane = element % 4;
          const uint32_t word =
              lane < 2 ? (lane == 0 ? words.x : words.y) : (lane == 2 ? words.z : words.w);
          bits |= static_cast<uint32_t>(word >= in.keep_threshold) << c;
        } else {
          const int bit = c * kVector + i;
          bits |= static_cast<uint32_t>(words.x >= in.keep_threshold) << bit;
          bits |= static_cast<uint32_t>(words.y >= in.keep_threshold) << (bit + 1);
          bits |= static_cast<uint32_t>(words.z >= in.keep_threshold) << (bit + 2);
          bits |= static_cast<uint32_t>(words.w >= in.keep_threshold) << (bit + 3);
        }
      }
    }
    return bits;
  }

  // residual + dropout(x + x_bias).
  __device__ __forceinline__ void load_sum(Tile& total, const AddLayerNormInputs& in, uint32_t row,
                                           uint32_t keep) const {
    load(total, in.x, in.x_is_fp32, row);
    Tile other;
    if (in.x_bias.data != nullptr) {
      load(other, in.x_bias);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVector; ++i) total[c][i] += other[c][i];
    }
    if (in.seed != nullptr) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          total[c][i] =
              keep >> (c * kVector + i) & 1 ? __fmul_rn(total[c][i], in.keep_scale) : 0.0f;
    }
    if (in.residual.data != nullptr) {
      load(other, in.residual, in.residual_is_fp32, row);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVector; ++i) total[c][i] += other[c][i];
    }
  }
};

// Sums over the kThreads threads that have the same row. `shared` has kCount floats a warp of the
// block; between two sums that use the same ones there must be a barrier.
template <int kThreads, int kBlock, int kCount>
__device__ __forceinline__ void row_sum(float (&values)[kCount], float* shared) {
  constexpr int kWarps = kThreads / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  if constexpr (kWarps > 1) {
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[i * (kBlock / kWarp) + warp] = values[i];
    }
    __syncthreads();
    const int first = warp / kWarps * kWarps;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) values[i] += shared[i * (kBlock / kWarp) + first + w];
    }
  }
}

// ---- Forward -----------------------------------------------------------------------------------

// The sum as it is normalised: what is returned in T is rounded first.
template <class T, class Cols>
__device__ __forceinline__ void round_sum(typename Cols::Tile& total,
                                          const AddLayerNormForwardCuda& p) {
  if (p.sum == nullptr || p.sum_is_fp32) return;
  for (auto& chunk : total)
#pragma unroll
    for (float& value : chunk) value = to_float(from_float<T>(value));
}

template <class Cols>
__device__ __forceinline__ void store_output(typename Cols::Tile& total, const Cols& columns,
                                             const AddLayerNormForwardCuda& p, int64_t offset,
                                             float mean, float rstd) {
  typename Cols::Tile parameter;
  for (auto& chunk : total)
#pragma unroll
    for (float& value : chunk) value = (value - mean) * rstd;
  if (p.weight.data != nullptr) {
    columns.load(parameter, p.weight);
#pragma unroll
    for (int c = 0; c < static_cast<int>(sizeof(total) / sizeof(total[0])); ++c)
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(total[0]) / sizeof(float)); ++i)
        total[c][i] *= parameter[c][i];
  }
  if (p.bias.data != nullptr) {
    columns.load(parameter, p.bias);
#pragma unroll
    for (int c = 0; c < static_cast<int>(sizeof(total) / sizeof(total[0])); ++c)
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(total[0]) / sizeof(float)); ++i)
        total[c][i] += parameter[c][i];
  }
  columns.store(p.output, false, offset, total);
}

// kBlock / kThreads rows a block, each of which fits in the registers of its threads.
template <class T, int kThreads, int kBlock, int kChunks, int kVector>
__global__ void __launch_bounds__(kBlock) forward_kernel(const AddLayerNormForwardCuda p) {
  using Cols = Columns<T, kThreads, kChunks, kVector>;
  static_assert(kThreads == kWarp || kThreads == kBlock);  // whole rows may be absent
  SHARED(float, shared, [2][kBlock / kWarp]);
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= p.rows) return;
  const Cols columns{static_cast<int>(threadIdx.x % kThreads) * kVector, p.width};
  const int64_t offset = row * p.width;

  typename Cols::Tile total;
  columns.load_sum(total, p.inputs, row, columns.keep_bits(p.inputs, row));
  round_sum<T, Cols>(total, p);
  if (p.sum != nullptr) columns.store(p.sum, p.sum_is_fp32, offset, total);

  float mean[1] = {0.0f};
  if (p.mean != nullptr) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kVector; ++i) mean[0] += total[c][i];
    row_sum<kThreads, kBlock>(mean, shared[0]);
    mean[0] /= p.width;
  }
  // Deviations, not squares: no square of a large mean is ever taken.
  float squares[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (!columns.has(c)) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float deviation = total[c][i] - mean[0];
      squares[0] += deviation * deviation;
    }
  }
  row_sum<kThreads, kBlock>(squares, shared[1]);
  const float rstd = rsqrtf(squares[0] / p.width + p.eps);
  if (threadIdx.x % kThreads == 0) {
    if (p.mean != nullptr) p.mean[row] = mean[0];
    p.rstd[row] = rstd;
  }
  store_output(total, columns, p, offset, mean[0], rstd);
}

// A row that is too long for registers: read three times, twice of them from the caches.
template <class T, int kBlock, int kVector>
__global__ void __launch_bounds__(kBlock) long_forward_kernel(const AddLayerNormForwardCuda p) {
  using Cols = Columns<T, kBlock, 1, kVector>;
  SHARED(float, shared, [2][kBlock / kWarp]);
  const int64_t row = blockIdx.x;
  const int64_t offset = row * p.width;
  const int first = static_cast<int>(threadIdx.x) * kVector;
  typename Cols::Tile total;
  const auto load = [&](const Cols& columns) {
    columns.load_sum(total, p.inputs, row, columns.keep_bits(p.inputs, row));
    round_sum<T, Cols>(total, p);
  };
  float mean[1] = {0.0f};
  for (int start = 0; start < p.width; start += Cols::kSpan) {
    const Cols columns{start + first, p.width};
    load(columns);
    if (p.sum != nullptr) columns.store(p.sum, p.sum_is_fp32, offset, total);
#pragma unroll
    for (int i = 0; i < kVector; ++i) mean[0] += total[0][i];
  }
  row_sum<kBlock, kBlock>(mean, shared[0]);
  mean[0] = p.mean == nullptr ? 0.0f : mean[0] / p.width;
  float squares[1] = {0.0f};
  for (int start = 0; start < p.width; start += Cols::kSpan) {
    const Cols columns{start + first, p.width};
    if (!columns.has(0)) continue;
    load(columns);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float deviation = total[0][i] - mean[0];
      squares[0] += deviation * deviation;
    }
  }
  row_sum<kBlock, kBlock>(squares, shared[1]);
  const float rstd = rsqrtf(squares[0] / p.width + p.eps);
  if (threadIdx.x == 0) {
    if (p.mean != nullptr) p.mean[row] = mean[0];
    p.rstd[row] = rstd;
  }
  for (int start = 0; start < p.width; start += Cols::kSpan) {
    const Cols columns{start + first, p.width};
    load(columns);
    store_output(total, columns, p, offset, mean[0], rstd);
  }
}

// ---- Backward ----------------------------------------------------------------------------------

// g = grad_output * weight, rounded: g - mean(g) cancels, to 0 at width 1, only if it is.
template <class Cols>
__device__ __forceinline__ void times_weight(typename Cols::Tile& g, const Cols& columns,
                                             const RowParameter& weight) {
  if (weight.data == nullptr) return;
  typename Cols::Tile parameter;
  columns.load(parameter, weight);
#pragma unroll
  for (int c = 0; c < static_cast<int>(sizeof(g) / sizeof(g[0])); ++c)
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(g[0]) / sizeof(float)); ++i)
      g[c][i] = __fmul_rn(g[c][i], parameter[c][i]);
}

// The means of g and g * y over a row that is cut in slices.
template <class T, int kBlock, int kVector>
__global__ void __launch_bounds__(kBlock) means_kernel(const AddLayerNormBackwardCuda p) {
  using Cols = Columns<T, kBlock, 1, kVector>;
  SHARED(float, shared, [2 * kBlock / kWarp]);
  const uint32_t row = blockIdx.x;
  const float mean = p.mean == nullptr ? 0.0f : p.mean[row];
  const float rstd = p.rstd[row];
  float sums[2] = {0.0f, 0.0f};
  for (int start = 0; start < p.width; start += Cols::kSpan) {
    const Cols columns{start + static_cast<int>(threadIdx.x) * kVector, p.width};
    if (!columns.has(0)) continue;
    typename Cols::Tile y, g;
    AddLayerNormInputs inputs = p.inputs;
    if (p.x_is_sum) inputs.seed = nullptr;
    columns.load_sum(y, inputs, row, columns.keep_bits(inputs, row));
    columns.load(g, p.grad_output, false, row);
    times_weight(g, columns, p.weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sums[0] += g[0][i];
      sums[1] += g[0][i] * ((y[0][i] - mean) * rstd);
    }
  }
  row_sum<kBlock, kBlock>(sums, shared);
  if (threadIdx.x == 0) {
    p.mean_g[row] = sums[0] / p.width;
    p.mean_gy[row] = sums[1] / p.width;
  }
}

// Block (b, s) has columns of slice s of rows b * R, ..., b * R + R - 1, then those of program
// b + gridDim.x, and so on; R = kBackwardThreads / kThreads. Sums over rows stay in registers.
template <class T, int kThreads, int kChunks, int kVector, bool kHasMeans>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_kernel(const AddLayerNormBackwardCuda p) {
  using Cols = Columns<T, kThreads, kChunks, kVector>;
  constexpr int kBlock = kBackwardThreads;
  constexpr int kRows = kBlock / kThreads;
  SHARED(float, shared, [2][2 * kBlock / kWarp]);
  // A sum that would cost registers in the loop, and then each in turn to join those of all rows.
  SHARED(float, joined, [kRows * Cols::kSpan]);
  const int lane = static_cast<int>(threadIdx.x) % kThreads;
  const int group = static_cast<int>(threadIdx.x) / kThreads;
  const Cols columns{static_cast<int>(blockIdx.y) * Cols::kSpan + lane * kVector, p.width};
  float* mine = joined + group * Cols::kSpan + lane * kVector;
  AddLayerNormInputs inputs = p.inputs;
  if (p.x_is_sum) inputs.seed = nullptr;

  typename Cols::Tile sum_weight = {}, sum_bias = {};
  const auto join = [&](const typename Cols::Tile& sum) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) store_vector(mine + c * Cols::kStride, sum[c]);
  };
  if (p.partial_x_bias != nullptr) join(sum_bias);
  int buffer = 0;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kRows; tile < p.rows;
       tile += static_cast<int64_t>(gridDim.x) * kRows) {
    const int64_t row = tile + group;
    const bool has_row = row < p.rows;
    typename Cols::Tile g, y;
    uint32_t keep = 0;
    float rstd = 0.0f;
    float means[2] = {0.0f, 0.0f};
    if (has_row) {
      keep = columns.keep_bits(p.inputs, row);
      columns.load(g, p.grad_output, false, row);
      columns.load_sum(y, inputs, row, keep);
      rstd = p.rstd[row];
      const float mean = p.mean == nullptr ? 0.0f : p.mean[row];
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          y[c][i] = columns.has(c) ? (y[c][i] - mean) * rstd : 0.0f;
          sum_weight[c][i] += g[c][i] * y[c][i];
          sum_bias[c][i] += g[c][i];
        }
      times_weight(g, columns, p.weight);
      if constexpr (!kHasMeans) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            means[0] += g[c][i];
            means[1] += g[c][i] * y[c][i];
          }
      }
    }
    if constexpr (kHasMeans) {
      if (has_row) {
        means[0] = p.mean_g[row];
        means[1] = p.mean_gy[row];
      }
    } else {
      row_sum<kThreads, kBlock>(means, shared[buffer]);
      buffer ^= 1;  // nobody still reads the sums before last
      means[0] /= p.width;
      means[1] /= p.width;
    }
    if (!has_row) continue;
    if (p.mean == nullptr) means[0] = 0.0f;

#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        g[c][i] = ((g[c][i] - means[0]) - y[c][i] * means[1]) * rstd;
    if (p.grad_sum.data != nullptr) {
      typename Cols::Tile more;
      columns.load(more, p.grad_sum, p.grad_sum_is_fp32, row);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVector; ++i) g[c][i] += more[c][i];
    }
    const int64_t offset = row * p.width;
    if (p.grad_residual != nullptr)
      columns.store(p.grad_residual, p.grad_residual_is_fp32, offset, g);
    if (p.inputs.seed != nullptr) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          g[c][i] = keep >> (c * kVector + i) & 1 ? g[c][i] * p.inputs.keep_scale : 0.0f;
    }
    columns.store(p.grad_x, false, offset, g);
    if (p.partial_x_bias != nullptr) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float sum[kVector];
        load_vector(sum, mine + c * Cols::kStride);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += g[c][i];
        store_vector(mine + c * Cols::kStride, sum);
      }
    }
  }

  // One row of partial sums a block, whatever the number of rows that it works on at once.
  const auto store_joined = [&](float* partial) {
    __syncthreads();
    if (group == 0) {
      typename Cols::Tile sum = {};
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          for (int other = 0; other < kRows; ++other)
            sum[c][i] += mine[other * Cols::kSpan + c * Cols::kStride + i];
      columns.store(partial, true, static_cast<int64_t>(blockIdx.x) * p.width, sum);
    }
    __syncthreads();
  };
  if (p.partial_x_bias != nullptr) store_joined(p.partial_x_bias);
  if (p.partial_weight != nullptr) {
    join(sum_weight);
    store_joined(p.partial_weight);
  }
  if (p.partial_bias != nullptr) {
    join(sum_bias);
    store_joined(p.partial_bias);
  }
}

// ---- Sums over programs ------------------------------------------------------------------------

constexpr int kMaxKinds = 3;
constexpr int kReduceRows = 8;

struct Totals {
  float* of_kind[kMaxKinds];
};

// 32 columns of one kind a block; the rows of partial sums are dealt out to 8 warps.
template <int kRows>
__global__ void __launch_bounds__(kWarp* kRows)
    reduce_kernel(const float* partial, int programs, int width, const Totals totals) {
  SHARED(float, sums, [kRows][kWarp]);
  const int kind = blockIdx.y;
  const int column = static_cast<int>(blockIdx.x) * kWarp + static_cast<int>(threadIdx.x) % kWarp;
  const int group = static_cast<int>(threadIdx.x) / kWarp;
  float sum = 0.0f;
  if (column < width) {
    partial += static_cast<int64_t>(kind) * programs * width + column;
    for (int program = group; program < programs; program += kRows)
      sum += partial[static_cast<int64_t>(program) * width];
  }
  sums[group][threadIdx.x % kWarp] = sum;
  __syncthreads();
  if (group != 0 || column >= width) return;
#pragma unroll
  for (int other = 1; other < kRows; ++other) sum += sums[other][threadIdx.x];
  // Chosen by comparison: an index into arguments would copy them to local memory.
  float* total = kind == 0 ? totals.of_kind[0] : kind == 1 ? totals.of_kind[1] : totals.of_kind[2];
  total[column] = sum;
}

}  // namespace add_layer_norm
}  // namespace fused_attn
