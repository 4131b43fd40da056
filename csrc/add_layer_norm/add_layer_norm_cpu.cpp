// Unpacks tensors for the CPU kernels of add_layer_norm and spreads rows over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "add_layer_norm/add_layer_norm.h"
#include "common/dispatch.h"

namespace fused_attn {
namespace {

using at::Tensor;

// Elements per task below which threads cost more than they save.
constexpr int64_t kGrain = 16384;

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward_cpu(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, double eps,
    double dropout_p, bool need_sum) {
  const int64_t width = x.size(-1);
  const int64_t rows = x.numel() / std::max<int64_t>(width, 1);
  const Tensor x_rows = x.contiguous();
  const Tensor residual_rows = residual ? residual->contiguous() : Tensor();
  const Tensor weight_f = weight ? weight->to(at::kFloat).contiguous() : Tensor();
  const Tensor bias_f = bias ? bias->to(at::kFloat).contiguous() : Tensor();

  Tensor output = at::empty(x.sizes(), x.options());
  Tensor sum = need_sum ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor mean = at::empty({rows}, x.options().dtype(at::kFloat));
  Tensor rstd = at::empty({rows}, x.options().dtype(at::kFloat));

  AddLayerNormForward p{};
  p.x = x_rows.const_data_ptr();
  p.residual = residual ? residual_rows.const_data_ptr() : nullptr;
  p.weight = weight ? weight_f.const_data_ptr<float>() : nullptr;
  p.bias = bias ? bias_f.const_data_ptr<float>() : nullptr;
  p.output = output.mutable_data_ptr();
  p.sum = need_sum ? sum.mutable_data_ptr() : nullptr;
  p.mean = mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.width = width;
  p.eps = static_cast<float>(eps);
  p.dropout_p = static_cast<float>(dropout_p);
  p.seed = seed ? static_cast<uint64_t>(seed->item<int64_t>()) : 0;
  p.dtype = kernel_dtype(x.scalar_type());

  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(add_layer_norm_forward, p, begin, end);
  });
  return {output, sum, mean, rstd};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("add_layer_norm_forward", &fused_attn::add_layer_norm_forward_cpu);
}
