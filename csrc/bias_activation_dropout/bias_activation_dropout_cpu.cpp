// Unpacks tensors for the CPU kernels of bias_activation_dropout and spreads rows over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>

#include "bias_activation_dropout/bias_activation_dropout.h"
#include "common/dispatch.h"
#include "common/large_outputs.h"

namespace fused_attn {
namespace {

using at::Tensor;

Unit unit_of(std::string_view activation) {
  if (activation == "identity") return Unit::kIdentity;
  if (activation == "relu") return Unit::kRelu;
  if (activation == "gelu") return Unit::kGelu;
  if (activation == "gelu_tanh") return Unit::kGeluTanh;
  if (activation == "silu") return Unit::kSilu;
  if (activation == "sigmoid") return Unit::kSigmoid;
  TORCH_CHECK(false, "bias_activation_dropout: unknown activation ", activation);
}

// Sizes of a tensor with other columns.
std::vector<int64_t> with_columns(const Tensor& tensor, int64_t columns) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.back() = columns;
  return sizes;
}

Tensor bias_activation_dropout_forward_cpu(const Tensor& x, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual,
                                           const std::optional<Tensor>& seed,
                                           std::string_view activation, bool gated,
                                           double dropout_p) {
  const int64_t width = x.size(-1) / (gated ? 2 : 1);
  const int64_t rows = x.numel() / std::max<int64_t>(x.size(-1), 1);
  Tensor output = in_huge_pages(at::empty(with_columns(x, width), x.options()));

  Tensor x_owner, residual_owner, bias_owner;
  BiasActivationDropoutForward p{};
  p.x = strided_rows(x, x_owner);
  p.residual = strided_rows(residual, residual_owner);
  p.bias = parameter(bias, bias_owner);
  p.output = output.mutable_data_ptr();
  p.width = width;
  p.unit = unit_of(activation);
  p.is_gated = gated;
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.keep_threshold = keep_threshold(dropout_p);
  p.seed = dropout_seed("bias_activation_dropout", seed, dropout_p);
  p.dtype = kernel_dtype(x.scalar_type());

  at::parallel_for(0, rows, task_grain(width), [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(bias_activation_dropout_forward, p, begin, end);
  });
  return output;
}

std::tuple<Tensor, Tensor> bias_activation_dropout_backward_cpu(
    const Tensor& grad_output, const std::optional<Tensor>& x, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& seed, std::string_view activation, bool gated, double dropout_p,
    bool need_grad_x, bool need_grad_bias) {
  const int64_t width = grad_output.size(-1);
  const int64_t columns = gated ? 2 * width : width;
  const int64_t rows = grad_output.numel() / std::max<int64_t>(width, 1);
  const auto [chunk_rows, chunks] = row_chunks(rows);
  const auto options = grad_output.options();
  const auto fp32 = options.dtype(at::kFloat);
  Tensor grad_x = need_grad_x
                      ? in_huge_pages(at::empty(with_columns(grad_output, columns), options))
                      : at::empty({0}, options);
  Tensor grad_bias = at::empty({need_grad_bias ? columns : 0}, fp32);
  Tensor partial = at::empty({chunks, need_grad_bias ? columns : 0}, fp32);

  Tensor grad_output_owner, x_owner, bias_owner;
  BiasActivationDropoutBackward p{};
  p.grad_output = strided_rows(grad_output, grad_output_owner);
  p.unit = unit_of(activation);
  p.is_gated = gated;
  if (p.is_gated || p.unit != Unit::kIdentity) {
    TORCH_CHECK(x.has_value(), "bias_activation_dropout: the backward of ", activation, " needs x");
    p.x = strided_rows(*x, x_owner);
    p.bias = parameter(bias, bias_owner);
  }
  p.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  p.partial_bias = need_grad_bias ? partial.mutable_data_ptr<float>() : nullptr;
  p.rows = rows;
  p.width = width;
  p.chunk_rows = chunk_rows;
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.keep_threshold = keep_threshold(dropout_p);
  p.seed = dropout_seed("bias_activation_dropout", seed, dropout_p);
  p.dtype = kernel_dtype(grad_output.scalar_type());

  at::parallel_for(0, chunks, task_grain(columns * chunk_rows), [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(bias_activation_dropout_backward, p, begin, end);
  });
  if (need_grad_bias) {
    float* total = grad_bias.mutable_data_ptr<float>();
    at::parallel_for(0, columns, column_grain(chunks), [&](int64_t begin, int64_t end) {
      FUSED_ATTN_CALL_KERNEL(bias_activation_dropout_reduce, p.partial_bias, chunks, columns, total,
                             begin, end);
    });
  }
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("bias_activation_dropout_forward", &fused_attn::bias_activation_dropout_forward_cpu);
  m.impl("bias_activation_dropout_backward", &fused_attn::bias_activation_dropout_backward_cpu);
}
