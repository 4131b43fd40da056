// Unpacks tensors for the CPU kernels of add_layer_norm and spreads rows over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "add_layer_norm/add_layer_norm.h"
#include "common/dispatch.h"
#include "common/large_outputs.h"

namespace fused_attn {
namespace {

using at::Tensor;

int64_t row_count(const Tensor& x) { return x.numel() / std::max<int64_t>(x.size(-1), 1); }

// Whether a tensor that may have the dtype of its neighbours or fp32 has the latter.
bool is_fp32(const char* name, const Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK(tensor.scalar_type() == dtype || tensor.scalar_type() == at::kFloat,
              "add_layer_norm: ", name, " must have dtype ", dtype, " or Float, got ",
              tensor.scalar_type());
  return tensor.scalar_type() == at::kFloat;
}

bool is_fp32(const char* name, const std::optional<Tensor>& tensor, at::ScalarType dtype) {
  return tensor && is_fp32(name, *tensor, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward_cpu(
    const Tensor& x, const std::optional<Tensor>& x_bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& seed, double eps, double dropout_p, bool is_rms,
    std::optional<at::ScalarType> sum_dtype) {
  const int64_t width = x.size(-1);
  const int64_t rows = row_count(x);
  const at::ScalarType dtype = x.scalar_type();
  const auto fp32 = x.options().dtype(at::kFloat);

  Tensor output = in_huge_pages(at::empty(x.sizes(), x.options()));
  Tensor sum = sum_dtype ? in_huge_pages(at::empty(x.sizes(), x.options().dtype(*sum_dtype)))
                         : at::empty({0}, x.options());
  Tensor mean = at::empty({is_rms ? 0 : rows}, fp32);
  Tensor rstd = at::empty({rows}, fp32);

  Tensor x_owner, x_bias_owner, residual_owner, weight_owner, bias_owner;
  AddLayerNormForward p{};
  p.x = strided_rows(x, x_owner);
  p.residual = strided_rows(residual, residual_owner);
  p.residual_is_fp32 = is_fp32("residual", residual, dtype);
  p.x_bias = parameter(x_bias, x_bias_owner);
  p.weight = parameter(weight, weight_owner);
  p.bias = parameter(bias, bias_owner);
  p.output = output.mutable_data_ptr();
  p.stream_output = should_stream(output);
  p.sum = sum_dtype ? sum.mutable_data_ptr() : nullptr;
  p.sum_is_fp32 = is_fp32("sum", sum, dtype);
  p.mean = is_rms ? nullptr : mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.width = width;
  p.eps = static_cast<float>(eps);
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.keep_threshold = keep_threshold(dropout_p);
  p.seed = dropout_seed("add_layer_norm", seed, dropout_p);
  p.dtype = kernel_dtype(dtype);

  const int64_t grain = task_grain(width);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(add_layer_norm_forward, p, begin, end);
  });
  return {output, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_cpu(
    const Tensor& grad_output, const std::optional<Tensor>& grad_sum, const Tensor& x,
    const std::optional<Tensor>& x_bias, const std::optional<Tensor>& residual, const Tensor& mean,
    const Tensor& rstd, const std::optional<Tensor>& weight, const std::optional<Tensor>& seed,
    double dropout_p, bool is_rms, bool x_is_sum, std::optional<at::ScalarType> grad_residual_dtype,
    bool need_x_bias, bool need_weight, bool need_bias) {
  const int64_t width = x.size(-1);
  const int64_t rows = row_count(x);
  const at::ScalarType dtype = grad_output.scalar_type();
  const Tensor mean_rows = mean.contiguous();
  const Tensor rstd_rows = rstd.contiguous();
  const auto fp32 = x.options().dtype(at::kFloat);

  const auto [chunk_rows, chunks] = row_chunks(rows);
  Tensor grad_x = in_huge_pages(at::empty(x.sizes(), grad_output.options()));
  Tensor grad_residual =
      grad_residual_dtype
          ? in_huge_pages(at::empty(x.sizes(), x.options().dtype(*grad_residual_dtype)))
          : at::empty({0}, grad_output.options());

  Tensor grad_output_owner, grad_sum_owner, x_owner, x_bias_owner, residual_owner, weight_owner;
  AddLayerNormBackward p{};
  p.grad_output = strided_rows(grad_output, grad_output_owner);
  p.grad_sum = strided_rows(grad_sum, grad_sum_owner);
  p.grad_sum_is_fp32 = is_fp32("grad_sum", grad_sum, dtype);
  p.x = strided_rows(x, x_owner);
  p.x_is_fp32 = is_fp32("x", x, dtype);
  p.x_is_sum = x_is_sum;
  p.x_bias = parameter(x_bias, x_bias_owner);
  p.residual = strided_rows(residual, residual_owner);
  p.residual_is_fp32 = is_fp32("residual", residual, dtype);
  p.mean = is_rms ? nullptr : mean_rows.const_data_ptr<float>();
  p.rstd = rstd_rows.const_data_ptr<float>();
  p.weight = parameter(weight, weight_owner);
  p.grad_x = grad_x.mutable_data_ptr();
  p.stream_grad_x = should_stream(grad_x);
  p.grad_residual = grad_residual_dtype ? grad_residual.mutable_data_ptr() : nullptr;
  p.grad_residual_is_fp32 = is_fp32("grad_residual", grad_residual, dtype);

  // Gradients of x_bias, weight and bias, each with its part of `partial`.
  const bool needed[3] = {need_x_bias, need_weight, need_bias};
  float** const partials[3] = {&p.partial_x_bias, &p.partial_weight, &p.partial_bias};
  Tensor gradients[3];
  float* totals[3] = {};
  Tensor partial = at::empty({need_x_bias + need_weight + need_bias, chunks, width}, fp32);
  float* part = partial.mutable_data_ptr<float>();
  for (int k = 0; k < 3; ++k) {
    gradients[k] = at::empty({needed[k] ? width : 0}, fp32);
    if (!needed[k]) continue;
    totals[k] = gradients[k].mutable_data_ptr<float>();
    *partials[k] = part;
    part += chunks * width;
  }
  p.rows = rows;
  p.width = width;
  p.chunk_rows = chunk_rows;
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.keep_threshold = keep_threshold(dropout_p);
  p.seed = dropout_seed("add_layer_norm", seed, dropout_p);
  p.dtype = kernel_dtype(dtype);

  const int64_t grain = task_grain(width * chunk_rows);
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(add_layer_norm_backward, p, begin, end);
  });
  at::parallel_for(0, width, column_grain(chunks), [&](int64_t begin, int64_t end) {
    for (int k = 0; k < 3; ++k)
      if (needed[k])
        FUSED_ATTN_CALL_KERNEL(add_layer_norm_reduce, *partials[k], chunks, width, totals[k], begin,
                               end);
  });
  return {grad_x, grad_residual, gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("add_layer_norm_forward", &fused_attn::add_layer_norm_forward_cpu);
  m.impl("add_layer_norm_backward", &fused_attn::add_layer_norm_backward_cpu);
}
