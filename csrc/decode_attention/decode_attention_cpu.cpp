// Unpacks tensors for the CPU kernels of decode_attention and spreads tasks over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dispatch.h"
#include "common/scratch.h"
#include "decode_attention/decode_attention.h"

namespace fused_attn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Multiply-adds a thread below which it costs more than it saves.
constexpr int64_t kGrain = 1 << 16;

// The vectors of the widest instruction set.
constexpr int64_t kMaxLanes = 16;

DecodeTensor unpack(const Tensor& tensor, Tensor& keep_alive) {
  const bool contiguous_rows = tensor.size(3) <= 1 || tensor.stride(3) == 1;
  keep_alive = contiguous_rows ? tensor : tensor.contiguous();
  return {keep_alive.const_data_ptr(), keep_alive.stride(0), keep_alive.stride(1),
          keep_alive.stride(2)};
}

std::tuple<Tensor, Tensor> decode_attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_lengths,
    const OptionalTensor& ancestry, const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
    bool is_causal, int64_t window, double scale, double softcap) {
  const int64_t R = query.size(0), H = query.size(1), T = query.size(2), Dv = value.size(3);
  const auto fp32 = query.options().dtype(at::kFloat);
  Tensor output = at::empty({R, H, T, Dv}, query.options());
  Tensor lse = at::empty({R, H, T}, fp32);
  if (lse.numel() == 0) return {output, lse};

  Tensor q, k, v, lengths, slopes;
  DecodeAttention p{};
  p.heads = H;
  p.queries = T;
  p.kv_heads = key.size(1);
  p.keys = key.size(2);
  p.head_size = query.size(3);
  p.value_size = Dv;
  p.families = ancestry ? ancestry->size(0) : key.size(0);
  TORCH_CHECK(p.head_size <= kDecodeMaxHeadSize && Dv <= kDecodeMaxHeadSize,
              "decode_attention: the cpu kernels take head sizes up to ", kDecodeMaxHeadSize);
  TORCH_CHECK(p.families > 0 && R % p.families == 0 && p.kv_heads > 0 && H % p.kv_heads == 0,
              "decode_attention: rows or heads do not divide");
  p.beams = R / p.families;
  p.q = unpack(query, q);
  p.k = unpack(key, k);
  p.v = unpack(value, v);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.is_causal = is_causal;
  p.window = window;
  p.dtype = kernel_dtype(query.scalar_type());
  if (key_lengths) {
    lengths = key_lengths->to(at::kLong).contiguous();
    p.lengths = lengths.const_data_ptr<int64_t>();
    p.rows_per_length = R / lengths.size(0);
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
    slopes = alibi_slopes->contiguous();
    p.alibi_slopes = slopes.const_data_ptr<float>();
  }
  p.output = output.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();

  p.chunks = std::max<int64_t>(1, ceil_div(p.keys, kDecodeChunk));
  p.blocks = ceil_div((ancestry ? 1 : p.beams) * (H / p.kv_heads) * T, kDecodeBlock);
  p.partial_stride = ceil_div(Dv, kMaxLanes) * kMaxLanes;
  const int64_t shares = p.chunks > 1 ? p.chunks * R * H * T : 0;
  Scratch<float> partial(shares * p.partial_stride);
  Scratch<float> sums(2 * shares);
  p.partial = partial.data();
  p.peaks = sums.data();
  p.totals = sums.data() + shares;

  const int64_t work = R * H * T * p.keys * (p.head_size + Dv);
  const int64_t most = std::min<int64_t>(at::get_num_threads(), decode_attention_task_count(p));
  const int64_t threads = std::clamp<int64_t>(work / kGrain, 1, most);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) FUSED_ATTN_CALL_KERNEL(decode_attention_tasks, p, next);
  });
  if (p.chunks > 1)
    at::parallel_for(0, R * H * T, ceil_div(kGrain, p.chunks * std::max<int64_t>(Dv, 1)),
                     [&](int64_t begin, int64_t end) {
                       FUSED_ATTN_CALL_KERNEL(decode_attention_merge, p, begin, end);
                     });
  return {output, lse};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("decode_attention", &fused_attn::decode_attention_cpu);
}
