// Unpacks tensors for the CPU kernels of recurrent_cell and spreads rows over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/large_outputs.h"
#include "recurrent_cell/recurrent_cell_arguments.h"

namespace fused_attn {
namespace {

using at::Tensor;

void check_state(const std::optional<Tensor>& state, Cell cell, std::string_view kind) {
  const bool needs_state = cell == Cell::kLstm || cell == Cell::kGru;
  TORCH_CHECK(!needs_state || state.has_value(), "recurrent_cell: ", kind, " needs a state");
}

std::tuple<Tensor, Tensor> recurrent_cell_forward_cpu(const Tensor& input_gates,
                                                      const Tensor& hidden_gates,
                                                      const std::optional<Tensor>& state,
                                                      std::string_view kind) {
  RecurrentCellForward p{};
  p.cell = cell_of(kind);
  check_state(state, p.cell, kind);
  p.hidden_size = input_gates.size(-1) / gates_of(p.cell);
  const int64_t rows = input_gates.numel() / std::max<int64_t>(input_gates.size(-1), 1);
  std::vector<int64_t> sizes = input_gates.sizes().vec();
  sizes.back() = p.hidden_size;
  const auto options = input_gates.options();
  const auto state_options = state ? state->options() : options;
  const bool is_gru = p.cell == Cell::kGru;
  Tensor new_hidden = in_huge_pages(at::empty(sizes, is_gru ? state_options : options));
  Tensor new_cell = p.cell == Cell::kLstm ? in_huge_pages(at::empty(sizes, state_options))
                                          : at::empty({0}, options);

  Tensor input_owner, hidden_owner, state_owner;
  p.input_gates = strided_rows(input_gates, input_owner);
  p.hidden_gates = strided_rows(hidden_gates, hidden_owner);
  p.state = strided_rows(state, state_owner);
  p.new_hidden = new_hidden.mutable_data_ptr();
  p.new_cell = new_cell.mutable_data_ptr();
  p.dtype = kernel_dtype(input_gates.scalar_type());
  p.state_dtype = state ? kernel_dtype(state->scalar_type()) : p.dtype;

  at::parallel_for(0, rows, row_grain(p.cell, p.hidden_size), [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(recurrent_cell_forward, p, begin, end);
  });
  return {new_hidden, new_cell};
}

std::tuple<Tensor, Tensor, Tensor> recurrent_cell_backward_cpu(
    const std::optional<Tensor>& grad_hidden, const std::optional<Tensor>& grad_cell,
    const Tensor& input_gates, const Tensor& hidden_gates, const std::optional<Tensor>& state,
    std::string_view kind, bool need_grad_state) {
  RecurrentCellBackward p{};
  p.cell = cell_of(kind);
  check_state(state, p.cell, kind);
  p.hidden_size = input_gates.size(-1) / gates_of(p.cell);
  const int64_t rows = input_gates.numel() / std::max<int64_t>(input_gates.size(-1), 1);
  const auto options = input_gates.options();
  const bool is_gru = p.cell == Cell::kGru;
  const bool writes_state = need_grad_state && state.has_value();
  Tensor grad_gates = in_huge_pages(at::empty(input_gates.sizes(), options));
  Tensor grad_hidden_gates =
      is_gru ? in_huge_pages(at::empty(input_gates.sizes(), options)) : at::empty({0}, options);
  Tensor grad_state = writes_state ? in_huge_pages(at::empty(state->sizes(), state->options()))
                                   : at::empty({0}, options);

  Tensor grad_hidden_owner, grad_cell_owner, input_owner, hidden_owner, state_owner;
  p.grad_hidden = strided_rows(grad_hidden, grad_hidden_owner);
  p.grad_cell = strided_rows(grad_cell, grad_cell_owner);
  p.input_gates = strided_rows(input_gates, input_owner);
  p.hidden_gates = strided_rows(hidden_gates, hidden_owner);
  p.state = strided_rows(state, state_owner);
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_hidden_gates = grad_hidden_gates.mutable_data_ptr();
  p.grad_state = writes_state ? grad_state.mutable_data_ptr() : nullptr;
  p.dtype = kernel_dtype(input_gates.scalar_type());
  p.state_dtype = state ? kernel_dtype(state->scalar_type()) : p.dtype;

  at::parallel_for(0, rows, row_grain(p.cell, p.hidden_size), [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(recurrent_cell_backward, p, begin, end);
  });
  return {grad_gates, grad_hidden_gates, grad_state};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("recurrent_cell_forward", &fused_attn::recurrent_cell_forward_cpu);
  m.impl("recurrent_cell_backward", &fused_attn::recurrent_cell_backward_cpu);
}
