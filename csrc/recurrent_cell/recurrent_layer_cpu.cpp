// One direction of a recurrent layer on a CPU: for each step a product with the recurrent weight,
// then the kernels of recurrent_cell on the rows of that step.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>

#include "common/large_outputs.h"
#include "recurrent_cell/recurrent_cell_arguments.h"

namespace fused_attn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// rows @ weight^T + bias for many products with one weight. Where torch offers oneDNN's linear
// layer the weight is brought into its layout once; then each row of a product also has the same
// bits whatever stands beside it.
class Product {
 public:
  Product(const Tensor& weight, const OptionalTensor& bias) : weight_(weight), bias_(bias) {
    auto& dispatcher = c10::Dispatcher::singleton();
    const auto reorder = dispatcher.findSchema({"mkldnn::_reorder_linear_weight", ""});
    product_ = dispatcher.findSchema({"mkldnn::_linear_pointwise", ""});
    if (!reorder || !product_) {
      product_.reset();
      return;
    }
    if (weight.is_mkldnn()) return;
    // Rows for which oneDNN chooses the layout; it serves other numbers as well.
    constexpr int64_t kTypicalRows = 64;
    weight_ = reorder->typed<Tensor(const Tensor&, std::optional<int64_t>)>().call(
        weight.contiguous(), kTypicalRows);
  }

  Tensor operator()(const Tensor& rows) const {
    if (!product_) return at::linear(rows, weight_, bias_);
    // A single row is another kernel of oneDNN's, which sums in another order.
    if (rows.size(0) == 1) return call(rows.expand({2, -1}).contiguous()).narrow(0, 0, 1);
    return call(rows);
  }

 private:
  Tensor call(const Tensor& rows) const {
    using Linear = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
                          c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
    return product_->typed<Linear>().call(rows, weight_, bias_, "none",
                                          c10::List<std::optional<at::Scalar>>(), "");
  }

  Tensor weight_;
  OptionalTensor bias_;
  std::optional<c10::OperatorHandle> product_;
};

// The rows of a step among the packed ones.
struct Step {
  int64_t first;
  int64_t rows;
};

// In the order in which the direction takes them.
std::vector<Step> steps_of(const Tensor& batch_sizes, int64_t sequences, int64_t total,
                           bool reverse) {
  std::vector<Step> steps;
  int64_t first = 0;
  int64_t most = sequences;
  const Tensor sizes = batch_sizes.contiguous();
  for (int64_t s = 0; s < sizes.numel(); ++s) {
    const int64_t rows = sizes.const_data_ptr<int64_t>()[s];
    TORCH_CHECK_VALUE(0 < rows && rows <= most,
                      "recurrent_layer: batch_sizes must not rise, from at most the number of "
                      "sequences, ",
                      sequences, ", to at least 1, got ", rows, " after ", most);
    steps.push_back({first, rows});
    first += rows;
    most = rows;
  }
  TORCH_CHECK_VALUE(first == total,
                    "recurrent_layer: batch_sizes must add up to the rows of "
                    "input_gates, ",
                    total, ", got ", first);
  if (reverse) std::reverse(steps.begin(), steps.end());
  return steps;
}

StridedRows plain_rows(const float* data, int64_t width) {
  return {data, std::numeric_limits<int64_t>::max(), 0, width};
}

void copy_rows(float* to, const float* from, int64_t begin, int64_t end, int64_t width) {
  std::memcpy(to + begin * width, from + begin * width, sizeof(float) * (end - begin) * width);
}

void add_rows(float* to, const float* from, int64_t begin, int64_t end, int64_t width) {
  for (int64_t i = begin * width; i < end * width; ++i) to[i] += from[i];
}

float* data_or_null(const Tensor& tensor) {
  return tensor.numel() > 0 ? tensor.mutable_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_layer_forward_cpu(
    const Tensor& input_gates, const Tensor& hidden, const OptionalTensor& cell,
    const Tensor& weight, const OptionalTensor& bias, const Tensor& batch_sizes,
    std::string_view kind, bool reverse, bool save) {
  const Cell type = cell_of(kind);
  const bool is_lstm = type == Cell::kLstm;
  TORCH_CHECK(!is_lstm || cell.has_value(), "recurrent_layer: lstm needs a cell");
  const int64_t H = hidden.size(1);
  const int64_t columns = gates_of(type) * H;
  const int64_t N = input_gates.size(0);
  const auto options = input_gates.options();
  const Tensor gates = input_gates.contiguous();
  const Product product(weight, bias);

  // The states of all sequences, of which a step changes the first rows.
  Tensor now = at::empty(hidden.sizes(), options).copy_(hidden);
  Tensor cell_now = at::empty(is_lstm ? hidden.sizes() : at::IntArrayRef({0}), options);
  if (is_lstm) cell_now.copy_(*cell);
  Tensor output = in_huge_pages(at::empty({N, H}, options));
  Tensor before = in_huge_pages(at::empty({save ? N : 0, H}, options));
  Tensor cell_before = in_huge_pages(at::empty({save && is_lstm ? N : 0, H}, options));
  Tensor hidden_gates = in_huge_pages(at::empty({save ? N : 0, columns}, options));
  float* state = now.mutable_data_ptr<float>();
  float* cell_state = data_or_null(cell_now);

  for (const Step& step : steps_of(batch_sizes, hidden.size(0), N, reverse)) {
    const Tensor made = product(now.narrow(0, 0, step.rows));
    const float* from_hidden = made.const_data_ptr<float>();
    float* out = output.mutable_data_ptr<float>() + step.first * H;
    RecurrentCellForward p{};
    p.input_gates = plain_rows(gates.const_data_ptr<float>() + step.first * columns, columns);
    p.hidden_gates = plain_rows(from_hidden, columns);
    p.state = is_lstm ? plain_rows(cell_state, H) : plain_rows(state, H);
    p.new_hidden = out;
    p.new_cell = cell_state;
    p.hidden_size = H;
    p.cell = type;
    p.dtype = p.state_dtype = DType::kFloat32;
    at::parallel_for(0, step.rows, row_grain(type, H), [&](int64_t begin, int64_t end) {
      if (save) {
        copy_rows(before.mutable_data_ptr<float>() + step.first * H, state, begin, end, H);
        copy_rows(hidden_gates.mutable_data_ptr<float>() + step.first * columns, from_hidden, begin,
                  end, columns);
        if (is_lstm)
          copy_rows(cell_before.mutable_data_ptr<float>() + step.first * H, cell_state, begin, end,
                    H);
      }
      FUSED_ATTN_CALL_KERNEL(recurrent_cell_forward, p, begin, end);
      copy_rows(state, out, begin, end, H);
    });
  }
  return {output, now, cell_now, before, cell_before, hidden_gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_layer_backward_cpu(
    const OptionalTensor& grad_output, const OptionalTensor& grad_final_hidden,
    const OptionalTensor& grad_final_cell, const Tensor& input_gates, const Tensor& hidden_before,
    const Tensor& cell_before, const Tensor& hidden_gates, const Tensor& weight,
    const Tensor& batch_sizes, int64_t sequences, std::string_view kind, bool reverse,
    bool need_grad_state) {
  const Cell type = cell_of(kind);
  const bool is_lstm = type == Cell::kLstm;
  const bool is_gru = type == Cell::kGru;
  const int64_t H = weight.size(1);
  const int64_t columns = gates_of(type) * H;
  const int64_t N = input_gates.size(0);
  const auto options = input_gates.options();
  const Tensor gates = input_gates.contiguous();
  const Tensor from_output = grad_output ? grad_output->contiguous() : Tensor();
  const Product product(weight.t(), std::nullopt);

  // The gradients of all sequences' states, of which a step changes the first rows.
  const auto carried = [&](const OptionalTensor& given) {
    return given ? at::empty({sequences, H}, options).copy_(*given)
                 : at::zeros({sequences, H}, options);
  };
  Tensor grad_hidden = carried(grad_final_hidden);
  Tensor grad_cell = is_lstm ? carried(grad_final_cell) : at::empty({0}, options);
  Tensor kept = at::empty({is_gru ? sequences : 0, H}, options);
  Tensor grad_gates = in_huge_pages(at::empty({N, columns}, options));
  Tensor grad_hidden_gates = in_huge_pages(at::empty({is_gru ? N : 0, columns}, options));
  float* carry = grad_hidden.mutable_data_ptr<float>();
  float* cell_carry = data_or_null(grad_cell);
  const Tensor& from_product = is_gru ? grad_hidden_gates : grad_gates;

  const std::vector<Step> steps = steps_of(batch_sizes, sequences, N, !reverse);
  for (const Step& step : steps) {
    const int64_t at_gates = step.first * columns;
    const int64_t at_states = step.first * H;
    RecurrentCellBackward p{};
    p.grad_hidden = plain_rows(carry, H);
    if (is_lstm) p.grad_cell = plain_rows(cell_carry, H);
    p.input_gates = plain_rows(gates.const_data_ptr<float>() + at_gates, columns);
    p.hidden_gates = plain_rows(hidden_gates.const_data_ptr<float>() + at_gates, columns);
    const Tensor& state = is_lstm ? cell_before : hidden_before;
    p.state = plain_rows(state.const_data_ptr<float>() + at_states, H);
    p.grad_gates = grad_gates.mutable_data_ptr<float>() + at_gates;
    p.grad_hidden_gates = is_gru ? grad_hidden_gates.mutable_data_ptr<float>() + at_gates : nullptr;
    p.grad_state = is_lstm ? cell_carry : data_or_null(kept);
    p.hidden_size = H;
    p.cell = type;
    p.dtype = p.state_dtype = DType::kFloat32;
    at::parallel_for(0, step.rows, row_grain(type, H), [&](int64_t begin, int64_t end) {
      if (grad_output)
        add_rows(carry, from_output.const_data_ptr<float>() + at_states, begin, end, H);
      FUSED_ATTN_CALL_KERNEL(recurrent_cell_backward, p, begin, end);
    });
    if (&step == &steps.back() && !need_grad_state) break;
    const Tensor made = product(from_product.narrow(0, step.first, step.rows));
    copy_rows(carry, made.const_data_ptr<float>(), 0, step.rows, H);
    if (is_gru) add_rows(carry, kept.const_data_ptr<float>(), 0, step.rows, H);
  }
  if (!need_grad_state) grad_hidden = grad_cell = at::empty({0}, options);
  return {grad_gates, grad_hidden_gates, grad_hidden, grad_cell};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("recurrent_layer_forward", &fused_attn::recurrent_layer_forward_cpu);
  m.impl("recurrent_layer_backward", &fused_attn::recurrent_layer_backward_cpu);
}

// With a weight in oneDNN's layout.
TORCH_LIBRARY_IMPL(fused_attn_C, MkldnnCPU, m) {
  m.impl("recurrent_layer_forward", &fused_attn::recurrent_layer_forward_cpu);
}
