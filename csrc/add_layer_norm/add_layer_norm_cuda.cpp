// Unpacks tensors for the CUDA kernels of add_layer_norm.
#include <ATen/ops/empty.h>

#include "add_layer_norm/add_layer_norm_cuda.h"
#include "common/cuda_binding.h"
#include "common/dispatch.h"

namespace fused_attn {
namespace {

using at::Tensor;

// Tensors as kernels take them; owns the copies of those that they cannot take as they are.
class Arguments {
 public:
  explicit Arguments(at::ScalarType dtype) : dtype_(dtype) {}

  StridedRows rows(const std::optional<Tensor>& tensor) {
    if (!tensor) return {};
    owners_.emplace_back();
    const StridedRows rows = strided_rows(*tensor, owners_.back());
    const int64_t bytes = tensor->element_size();
    check_alignment(rows.data, rows.inner_stride * bytes);
    check_alignment(rows.data, rows.outer_stride * bytes);
    return rows;
  }

  RowParameter parameter(const std::optional<Tensor>& given) {
    if (!given) return {};
    const bool fits = given->scalar_type() == dtype_ || given->scalar_type() == at::kFloat;
    owners_.push_back((fits ? *given : given->to(at::kFloat)).contiguous());
    check_alignment(owners_.back().const_data_ptr(), 0);
    return {owners_.back().const_data_ptr(), owners_.back().scalar_type() == at::kFloat};
  }

  void* output(const Tensor& tensor) {
    if (tensor.numel() == 0) return nullptr;
    check_alignment(tensor.mutable_data_ptr(), tensor.size(-1) * tensor.element_size());
    return tensor.mutable_data_ptr();
  }

  // Whether accesses of 16 bytes are allowed at the beginning of each row of all of them.
  bool is_aligned() const { return is_aligned_; }

 private:
  void check_alignment(const void* data, int64_t stride_bytes) {
    is_aligned_ &=
        (reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(stride_bytes)) % 16 == 0;
  }

  at::ScalarType dtype_;
  std::vector<Tensor> owners_;
  bool is_aligned_ = true;
};

bool is_fp32(const std::optional<Tensor>& tensor) {
  return tensor && tensor->scalar_type() == at::kFloat;
}

int64_t row_count(const Tensor& x) {
  const int64_t rows = x.numel() / std::max<int64_t>(x.size(-1), 1);
  TORCH_CHECK(rows < (int64_t{1} << 31), "add_layer_norm: ", rows,
              " rows: the CUDA kernels take fewer than 2^31");
  return rows;
}

AddLayerNormInputs inputs_of(Arguments& arguments, const Tensor& x,
                             const std::optional<Tensor>& x_bias,
                             const std::optional<Tensor>& residual,
                             const std::optional<Tensor>& seed, double dropout_p) {
  TORCH_CHECK(dropout_p == 0.0 || seed.has_value(), "add_layer_norm: dropout needs a seed");
  AddLayerNormInputs in{};
  in.x = arguments.rows(x);
  in.x_is_fp32 = is_fp32(x);
  in.x_bias = arguments.parameter(x_bias);
  in.residual = arguments.rows(residual);
  in.residual_is_fp32 = is_fp32(residual);
  in.seed = dropout_p > 0.0 ? seed->const_data_ptr<int64_t>() : nullptr;
  in.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  in.keep_threshold = keep_threshold(dropout_p);
  return in;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(
    const Tensor& x, const std::optional<Tensor>& x_bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& seed, double eps, double dropout_p, bool is_rms,
    std::optional<at::ScalarType> sum_dtype) {
  const CudaCall call(x);
  const int64_t rows = row_count(x);
  const auto fp32 = x.options().dtype(at::kFloat);
  Tensor output = at::empty(x.sizes(), x.options());
  Tensor sum =
      sum_dtype ? at::empty(x.sizes(), x.options().dtype(*sum_dtype)) : at::empty({0}, x.options());
  Tensor mean = at::empty({is_rms ? 0 : rows}, fp32);
  Tensor rstd = at::empty({rows}, fp32);
  if (x.numel() == 0) return {output, sum, mean, rstd};

  Arguments arguments(x.scalar_type());
  AddLayerNormForwardCuda p{};
  p.inputs = inputs_of(arguments, x, x_bias, residual, seed, dropout_p);
  p.weight = arguments.parameter(weight);
  p.bias = arguments.parameter(bias);
  p.output = arguments.output(output);
  p.sum = arguments.output(sum);
  p.sum_is_fp32 = is_fp32(sum);
  p.mean = is_rms ? nullptr : mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.rows = rows;
  p.width = static_cast<int>(x.size(-1));
  p.eps = static_cast<float>(eps);
  p.is_vectorised = arguments.is_aligned();
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    add_layer_norm_forward_cuda<T>(p, call.stream);
  });
  return {output, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_output, const std::optional<Tensor>& grad_sum, const Tensor& x,
    const std::optional<Tensor>& x_bias, const std::optional<Tensor>& residual, const Tensor& mean,
    const Tensor& rstd, const std::optional<Tensor>& weight, const std::optional<Tensor>& seed,
    double dropout_p, bool is_rms, bool x_is_sum, std::optional<at::ScalarType> grad_residual_dtype,
    bool need_x_bias, bool need_weight, bool need_bias) {
  const CudaCall call(x);
  const int64_t rows = row_count(x);
  const int64_t width = x.size(-1);
  const at::ScalarType dtype = grad_output.scalar_type();
  const auto fp32 = x.options().dtype(at::kFloat);
  Tensor grad_x = at::empty(x.sizes(), grad_output.options());
  Tensor grad_residual = grad_residual_dtype
                             ? at::empty(x.sizes(), x.options().dtype(*grad_residual_dtype))
                             : at::empty({0}, grad_output.options());
  const bool needed[3] = {need_x_bias, need_weight, need_bias};
  Tensor gradients[3];
  for (int k = 0; k < 3; ++k) gradients[k] = at::empty({needed[k] ? width : 0}, fp32);
  if (x.numel() == 0) {
    for (Tensor& gradient : gradients) gradient.zero_();
    return {grad_x, grad_residual, gradients[0], gradients[1], gradients[2]};
  }

  Arguments arguments(dtype);
  AddLayerNormBackwardCuda p{};
  p.inputs = inputs_of(arguments, x, x_bias, residual, seed, dropout_p);
  p.x_is_sum = x_is_sum;
  p.grad_output = arguments.rows(grad_output);
  p.grad_sum = arguments.rows(grad_sum);
  p.grad_sum_is_fp32 = is_fp32(grad_sum);
  p.weight = arguments.parameter(weight);
  const Tensor mean_rows = mean.contiguous();
  const Tensor rstd_rows = rstd.contiguous();
  p.mean = is_rms ? nullptr : mean_rows.const_data_ptr<float>();
  p.rstd = rstd_rows.const_data_ptr<float>();
  p.grad_x = arguments.output(grad_x);
  p.grad_residual = arguments.output(grad_residual);
  p.grad_residual_is_fp32 = is_fp32(grad_residual);
  p.rows = rows;
  p.width = static_cast<int>(width);

  p.is_vectorised = arguments.is_aligned();
  const AddLayerNormTiling tiling = add_layer_norm_backward_tiling(p.width, p.is_vectorised);
  Tensor means;
  if (tiling.slices > 1) {
    means = at::empty({2, rows}, fp32);
    p.mean_g = means.mutable_data_ptr<float>();
    p.mean_gy = p.mean_g + rows;
  }
  // One block a multiprocessor, as its registers allow, and as many turns for each.
  const int64_t tiles = ceil_div(rows, tiling.rows);
  int64_t programs = std::min<int64_t>(tiles, ceil_div(call.multiprocessors, tiling.slices));
  programs = ceil_div(tiles, ceil_div(tiles, programs));
  p.programs = static_cast<int>(programs);

  const int kinds = need_x_bias + need_weight + need_bias;
  const bool is_direct = programs == 1;
  Tensor partial = at::empty({is_direct ? 0 : kinds, programs, width}, fp32);
  float* next = partial.mutable_data_ptr<float>();
  float* totals[3] = {};
  int kind = 0;
  float** const targets[3] = {&p.partial_x_bias, &p.partial_weight, &p.partial_bias};
  for (int k = 0; k < 3; ++k) {
    if (!needed[k]) continue;
    *targets[k] = is_direct ? gradients[k].mutable_data_ptr<float>() : next;
    next += programs * width;
    totals[kind++] = gradients[k].mutable_data_ptr<float>();
  }
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    add_layer_norm_backward_cuda<T>(p, call.stream);
    if (!is_direct && kinds > 0)
      add_layer_norm_reduce_cuda<T>(partial.const_data_ptr<float>(), kinds, p.programs, p.width,
                                    totals, call.stream);
  });
  return {grad_x, grad_residual, gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace fused_attn

FUSED_ATTN_CUDA_LIBRARY(m) {
  m.impl("add_layer_norm_forward", &fused_attn::forward_cuda);
  m.impl("add_layer_norm_backward", &fused_attn::backward_cuda);
}
