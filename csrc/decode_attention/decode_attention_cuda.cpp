// Unpacks tensors for the CUDA kernels of decode_attention and cuts the keys into splits.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "common/cuda_binding.h"
#include "common/dispatch.h"
#include "decode_attention/decode_attention_cuda.h"

namespace fused_attn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The fewest keys that make a split worth its merge.
constexpr int64_t kMinSplit = 256;
// Blocks that a multiprocessor should have in all: several waves, so that the last, which leaves
// some idle, is a small part.
constexpr int64_t kBlocksPerMultiprocessor = 8;
// A split begins at a multiple of a warp's step in any dtype.
constexpr int64_t kSplitMultiple = 64;

DecodeCudaTensor unpack(const Tensor& tensor, Tensor& keep_alive) {
  const bool contiguous_rows = tensor.size(3) <= 1 || tensor.stride(3) == 1;
  keep_alive = contiguous_rows ? tensor : tensor.contiguous();
  const int64_t size = keep_alive.element_size();
  bool is_aligned = reinterpret_cast<intptr_t>(keep_alive.const_data_ptr()) % 16 == 0 &&
                    keep_alive.size(3) * size % 16 == 0;
  for (int64_t d = 0; d < 3; ++d)
    is_aligned = is_aligned && (keep_alive.size(d) == 1 || keep_alive.stride(d) * size % 16 == 0);
  return {keep_alive.const_data_ptr(), keep_alive.stride(0), keep_alive.stride(1),
          keep_alive.stride(2), is_aligned};
}

template <typename T>
void launch_dtype(const DecodeAttentionCuda& p, cudaStream_t stream) {
  const int widest = std::max(p.head_size, p.value_size);
  if (widest <= 64)
    decode_attention_cuda<T, 64>(p, stream);
  else if (widest <= 128)
    decode_attention_cuda<T, 128>(p, stream);
  else
    decode_attention_cuda<T, 256>(p, stream);
}

std::tuple<Tensor, Tensor> decode_attention(const Tensor& query, const Tensor& key,
                                            const Tensor& value, const OptionalTensor& key_lengths,
                                            const OptionalTensor& ancestry,
                                            const OptionalTensor& mask,
                                            const OptionalTensor& alibi_slopes, bool is_causal,
                                            int64_t window, double scale, double softcap) {
  const CudaCall call(query);
  const int64_t R = query.size(0), H = query.size(1), T = query.size(2), Dv = value.size(3);
  const int64_t Hk = key.size(1), S = key.size(2);
  const auto fp32 = query.options().dtype(at::kFloat);
  Tensor output = at::empty({R, H, T, Dv}, query.options());
  Tensor lse = at::empty({R, H, T}, fp32);
  if (lse.numel() == 0) return {output, lse};

  const int64_t families = ancestry ? ancestry->size(0) : key.size(0);
  TORCH_CHECK(query.size(3) <= kDecodeCudaMaxHeadSize && Dv <= kDecodeCudaMaxHeadSize,
              "decode_attention: the cuda kernels take head sizes up to ", kDecodeCudaMaxHeadSize);
  TORCH_CHECK(families > 0 && R % families == 0 && Hk > 0 && H % Hk == 0,
              "decode_attention: rows or heads do not divide");
  const int64_t queries = R / families * (H / Hk) * T;
  TORCH_CHECK(S <= (1 << 30) && queries <= (1 << 30) && R <= (1 << 30),
              "decode_attention: more keys or queries than 2^30");
  Tensor q, k, v;
  DecodeAttentionCuda p{};
  p.q = unpack(query, q);
  p.k = unpack(key, k);
  p.v = unpack(value, v);
  p.families = static_cast<int>(families);
  p.beams = static_cast<int>(R / families);
  p.heads = static_cast<int>(H);
  p.kv_heads = static_cast<int>(Hk);
  p.queries = static_cast<int>(T);
  p.keys = static_cast<int>(S);
  p.head_size = static_cast<int>(query.size(3));
  p.value_size = static_cast<int>(Dv);
  p.window = window;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.is_causal = is_causal;
  if (key_lengths) {
    p.lengths = key_lengths->const_data_ptr();
    p.lengths_are_wide = key_lengths->scalar_type() == at::kLong;
    p.stride_length = key_lengths->stride(0);
    p.rows_per_length = static_cast<int>(R / key_lengths->size(0));
  }
  if (ancestry) {
    p.ancestry = ancestry->const_data_ptr();
    p.ancestry_is_wide = ancestry->scalar_type() == at::kLong;
    for (int64_t d = 0; d < 3; ++d) p.ancestry_strides[d] = ancestry->stride(d);
  }
  if (mask) {
    p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    for (int64_t d = 0; d < mask->dim(); ++d)
      if (mask->size(d) != 1) p.mask_strides[4 - mask->dim() + d] = mask->stride(d);
  }
  if (alibi_slopes) {
    p.alibi_slopes = alibi_slopes->const_data_ptr<float>();
    p.stride_slope = alibi_slopes->stride(0);
  }
  p.output = output.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();

  const int64_t block =
      query.scalar_type() == at::kFloat ? kDecodeCudaFp32Queries : kDecodeCudaProductQueries;
  const int64_t blocks = families * Hk * ceil_div(queries, block);
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * call.multiprocessors, blocks);
  const int64_t most = std::clamp<int64_t>(S / kMinSplit, 1, kDecodeCudaMaxSplits);
  const int64_t keys_per_split =
      ceil_div(std::max<int64_t>(S, 1), std::min(wanted, most) * kSplitMultiple) * kSplitMultiple;
  p.keys_per_split = static_cast<int>(keys_per_split);
  p.splits = static_cast<int>(std::max<int64_t>(1, ceil_div(S, keys_per_split)));
  TORCH_CHECK(blocks * p.splits <= 0x7FFFFFFF, "decode_attention: too many rows and heads");
  Tensor partial;
  if (p.splits > 1) {
    const int64_t all = p.splits * R * H * T;
    partial = at::empty({all * (Dv + 1)}, fp32);
    p.partial = partial.mutable_data_ptr<float>();
    p.partial_lse = p.partial + all * Dv;
  }

  with_element_type(query.scalar_type(),
                    [&](auto element) { launch_dtype<decltype(element)>(p, call.stream); });
  return {output, lse};
}

}  // namespace
}  // namespace fused_attn

FUSED_ATTN_CUDA_LIBRARY(m) { m.impl("decode_attention", &fused_attn::decode_attention); }
