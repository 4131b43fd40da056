// Unpacks tensors for the CPU kernels of add_layer_norm and spreads rows over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "add_layer_norm/add_layer_norm.h"
#include "common/dispatch.h"

namespace fused_attn {
namespace {

using at::Tensor;

// Elements per task below which threads cost more than they save.
constexpr int64_t kGrain = 16384;

// The gradients of weight and bias are summed in chunks of rows: in an order that depends on the
// shape alone, so that they are the same bits for any number of threads.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkRows = 16;

Tensor parameter(const std::optional<Tensor>& given, float otherwise, const Tensor& x) {
  if (given) return given->to(at::kFloat).contiguous();
  const auto options = x.options().dtype(at::kFloat);
  return otherwise == 0.0f ? at::zeros({x.size(-1)}, options) : at::ones({x.size(-1)}, options);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward_cpu(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, double eps,
    double dropout_p, bool need_sum) {
  const int64_t width = x.size(-1);
  const int64_t rows = x.numel() / std::max<int64_t>(width, 1);
  const Tensor weight_f = parameter(weight, 1.0f, x);
  const Tensor bias_f = parameter(bias, 0.0f, x);
  const auto statistics = x.options().dtype(at::kFloat);

  Tensor output = at::empty(x.sizes(), x.options());
  Tensor sum = need_sum ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor mean = at::empty({rows}, statistics);
  Tensor rstd = at::empty({rows}, statistics);

  Tensor x_owner, residual_owner;
  AddLayerNormForward p{};
  p.x = strided_rows(x, x_owner);
  p.residual = strided_rows(residual, residual_owner);
  p.weight = weight_f.const_data_ptr<float>();
  p.bias = bias_f.const_data_ptr<float>();
  p.output = output.mutable_data_ptr();
  p.sum = need_sum ? sum.mutable_data_ptr() : nullptr;
  p.mean = mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.width = width;
  p.eps = static_cast<float>(eps);
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.keep_threshold = keep_threshold(dropout_p);
  p.seed = dropout_seed("add_layer_norm", seed, dropout_p);
  p.dtype = kernel_dtype(x.scalar_type());

  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(add_layer_norm_forward, p, begin, end);
  });
  return {output, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_cpu(
    const Tensor& grad_output, const std::optional<Tensor>& grad_sum, const Tensor& x,
    const std::optional<Tensor>& residual, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& seed, double dropout_p,
    bool x_is_sum, bool need_grad_residual, bool need_grad_parameters) {
  const int64_t width = x.size(-1);
  const int64_t rows = x.numel() / std::max<int64_t>(width, 1);
  const Tensor weight_f = parameter(weight, 1.0f, x);
  const Tensor mean_rows = mean.contiguous();
  const Tensor rstd_rows = rstd.contiguous();
  const auto fp32 = x.options().dtype(at::kFloat);

  const int64_t chunk_rows = std::max(kMinChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const bool separate = need_grad_residual && dropout_p > 0.0;
  Tensor grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_residual = separate ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor grad_weight = at::empty({need_grad_parameters ? width : 0}, fp32);
  Tensor grad_bias = at::empty({need_grad_parameters ? width : 0}, fp32);
  Tensor partial = at::empty({2, chunks, need_grad_parameters ? width : 0}, fp32);

  Tensor grad_output_owner, grad_sum_owner, x_owner, residual_owner;
  AddLayerNormBackward p{};
  p.grad_output = strided_rows(grad_output, grad_output_owner);
  p.grad_sum = strided_rows(grad_sum, grad_sum_owner);
  p.x = strided_rows(x, x_owner);
  p.residual = strided_rows(residual, residual_owner);
  p.x_is_sum = x_is_sum;
  p.mean = mean_rows.const_data_ptr<float>();
  p.rstd = rstd_rows.const_data_ptr<float>();
  p.weight = weight_f.const_data_ptr<float>();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_residual = separate ? grad_residual.mutable_data_ptr() : nullptr;
  if (need_grad_parameters) {
    p.partial_weight = partial.mutable_data_ptr<float>();
    p.partial_bias = p.partial_weight + chunks * width;
  }
  p.rows = rows;
  p.width = width;
  p.chunk_rows = chunk_rows;
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.keep_threshold = keep_threshold(dropout_p);
  p.seed = dropout_seed("add_layer_norm", seed, dropout_p);
  p.dtype = kernel_dtype(x.scalar_type());

  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(width * chunk_rows, 1));
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(add_layer_norm_backward, p, begin, end);
  });
  if (need_grad_parameters) {
    float* weight_out = grad_weight.mutable_data_ptr<float>();
    float* bias_out = grad_bias.mutable_data_ptr<float>();
    const int64_t columns = std::max<int64_t>(64, kGrain / std::max<int64_t>(chunks, 1));
    at::parallel_for(0, width, columns, [&](int64_t begin, int64_t end) {
      FUSED_ATTN_CALL_KERNEL(add_layer_norm_reduce, p.partial_weight, chunks, width, weight_out,
                             begin, end);
      FUSED_ATTN_CALL_KERNEL(add_layer_norm_reduce, p.partial_bias, chunks, width, bias_out, begin,
                             end);
    });
  }
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("add_layer_norm_forward", &fused_attn::add_layer_norm_forward_cpu);
  m.impl("add_layer_norm_backward", &fused_attn::add_layer_norm_backward_cpu);
}
