// CPU kernels of recurrent_cell: raw pointers, no torch. Compiled once per instruction set.
#pragma once

#include "common/rows.h"
#include "recurrent_cell/recurrent_cell.h"

namespace fused_attn {
namespace FUSED_ATTN_ISA {

// tanh and its derivative, to about 3 units in the last place: e^-2|x| cancels in neither but near
// 0, where the value is the polynomial of `tanh`.
struct Tanh {
  Vec value;
  Vec slope;
};

FUSED_ATTN_INLINE Tanh tanh_with_slope(Vec x) {
  const Vec size = magnitude(x);
  const Vec e = exp_of_negative(-2.0f * size);
  const Vec r = 1.0f / (1.0f + e);
  const Vec far = (1.0f - e) * r;
  const Vec z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * x + x;
  return {select(size < broadcast(0.625f), near, by_sign(x, -far, far)), 4.0f * e * r * r};
}

// A row of gates, T [G H], of both products.
template <typename T>
struct Gates {
  const T* from_input;
  const T* from_hidden;
  int64_t hidden_size;

  template <typename Lanes>
  FUSED_ATTN_INLINE Vec sum(int gate, int64_t i, Lanes lanes) const {
    return input(gate, i, lanes) + hidden(gate, i, lanes);
  }
  template <typename Lanes>
  FUSED_ATTN_INLINE Vec input(int gate, int64_t i, Lanes lanes) const {
    return load_lanes(from_input + gate * hidden_size + i, lanes);
  }
  template <typename Lanes>
  FUSED_ATTN_INLINE Vec hidden(int gate, int64_t i, Lanes lanes) const {
    return load_lanes(from_hidden + gate * hidden_size + i, lanes);
  }
};

// Calls run(T{}, S{}, cell) with the types and constants that the arguments name. Cells without a
// state have the S that is T.
template <typename Run>
static void for_kind(DType dtype, DType state_dtype, Cell cell, Run&& run) {
  const auto with_cell = [&](auto element, auto state) {
    if (cell == Cell::kLstm)
      return run(element, state, std::integral_constant<Cell, Cell::kLstm>{});
    return run(element, state, std::integral_constant<Cell, Cell::kGru>{});
  };
  const auto with_element = [&](auto element) {
    switch (cell) {
      case Cell::kTanh:
        return run(element, element, std::integral_constant<Cell, Cell::kTanh>{});
      case Cell::kRelu:
        return run(element, element, std::integral_constant<Cell, Cell::kRelu>{});
      default:
        if (state_dtype == dtype) return with_cell(element, element);
        return with_cell(element, float{});
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return with_element(float{});
    case DType::kFloat16:
      return with_element(Half{});
    case DType::kBFloat16:
      return with_element(BFloat16{});
  }
}

// Calls body(i, lanes) for each vector of a row. The body is long, so that nothing is gained by
// unrolling as `for_vectors` does, and a call of it would pass all that it captures in memory.
template <typename Body>
FUSED_ATTN_INLINE void for_long_vectors(int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + kVec <= width; i += kVec) body(i, FullVec{});
  if (i < width) body(i, width - i);
}

// The type of new_hidden.
template <typename T, typename S, Cell kCell>
using Hidden = std::conditional_t<kCell == Cell::kGru, S, T>;

template <Cell kCell>
constexpr int kGates = kCell == Cell::kLstm  ? 4
                       : kCell == Cell::kGru ? 3
                                             : 1;

// --- forward --------------------------------------------------------------------------------

template <typename T, typename S, Cell kCell>
static void forward_rows(const RecurrentCellForward& p, int64_t begin, int64_t end) {
  const int64_t H = p.hidden_size;
  for (int64_t r = begin; r < end; ++r) {
    const Gates<T> gates{row_of<T>(p.input_gates, r), row_of<T>(p.hidden_gates, r), H};
    const S* state = p.state.data ? row_of<S>(p.state, r) : nullptr;
    auto* new_hidden = static_cast<Hidden<T, S, kCell>*>(p.new_hidden) + r * H;
    for_long_vectors(H, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      if constexpr (kCell == Cell::kLstm) {
        const Vec input = sigmoid_with_slope(gates.sum(0, i, lanes)).value;
        const Vec forget = sigmoid_with_slope(gates.sum(1, i, lanes)).value;
        const Vec candidate = tanh_with_slope(gates.sum(2, i, lanes)).value;
        const Vec output = sigmoid_with_slope(gates.sum(3, i, lanes)).value;
        const Vec cell = forget * load_lanes(state + i, lanes) + input * candidate;
        store_lanes(static_cast<S*>(p.new_cell) + r * H + i, cell, lanes);
        store_lanes(new_hidden + i, output * tanh_with_slope(cell).value, lanes);
      } else if constexpr (kCell == Cell::kGru) {
        const Vec reset = sigmoid_with_slope(gates.sum(0, i, lanes)).value;
        const Vec update = sigmoid_with_slope(gates.sum(1, i, lanes)).value;
        const Vec n = gates.input(2, i, lanes) + reset * gates.hidden(2, i, lanes);
        const Vec candidate = tanh_with_slope(n).value;
        const Vec change = load_lanes(state + i, lanes) - candidate;
        store_lanes(new_hidden + i, candidate + update * change, lanes);
      } else {
        const Vec sum = gates.sum(0, i, lanes);
        // NaN stays NaN, as in torch.
        const Vec value = kCell == Cell::kTanh ? tanh_with_slope(sum).value : max(Vec{}, sum);
        store_lanes(new_hidden + i, value, lanes);
      }
    });
  }
}

void recurrent_cell_forward(const RecurrentCellForward& p, int64_t begin, int64_t end) {
  for_kind(p.dtype, p.state_dtype, p.cell, [&](auto element, auto state, auto cell) {
    forward_rows<decltype(element), decltype(state), cell.value>(p, begin, end);
  });
}

// --- backward -------------------------------------------------------------------------------

template <typename T, typename S, Cell kCell>
static void backward_rows(const RecurrentCellBackward& p, int64_t begin, int64_t end) {
  constexpr int64_t G = kGates<kCell>;
  using HiddenType = Hidden<T, S, kCell>;
  const int64_t H = p.hidden_size;
  for (int64_t r = begin; r < end; ++r) {
    const Gates<T> gates{row_of<T>(p.input_gates, r), row_of<T>(p.hidden_gates, r), H};
    const S* state = p.state.data ? row_of<S>(p.state, r) : nullptr;
    const auto* grad_hidden = p.grad_hidden.data ? row_of<HiddenType>(p.grad_hidden, r) : nullptr;
    const S* grad_cell = p.grad_cell.data ? row_of<S>(p.grad_cell, r) : nullptr;
    T* grad_gates = static_cast<T*>(p.grad_gates) + r * G * H;
    S* grad_state = p.grad_state ? static_cast<S*>(p.grad_state) + r * H : nullptr;
    for_long_vectors(H, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec grad = grad_hidden ? load_lanes(grad_hidden + i, lanes) : Vec{};
      if constexpr (kCell == Cell::kLstm) {
        const Sigmoid input = sigmoid_with_slope(gates.sum(0, i, lanes));
        const Sigmoid forget = sigmoid_with_slope(gates.sum(1, i, lanes));
        const Tanh candidate = tanh_with_slope(gates.sum(2, i, lanes));
        const Sigmoid output = sigmoid_with_slope(gates.sum(3, i, lanes));
        const Vec before = load_lanes(state + i, lanes);
        const Tanh squashed =
            tanh_with_slope(forget.value * before + input.value * candidate.value);
        Vec grad_new = grad * output.value * squashed.slope;
        if (grad_cell) grad_new += load_lanes(grad_cell + i, lanes);
        store_lanes(grad_gates + i, grad_new * candidate.value * input.slope, lanes);
        store_lanes(grad_gates + H + i, grad_new * before * forget.slope, lanes);
        store_lanes(grad_gates + 2 * H + i, grad_new * input.value * candidate.slope, lanes);
        store_lanes(grad_gates + 3 * H + i, grad * squashed.value * output.slope, lanes);
        if (grad_state) store_lanes(grad_state + i, grad_new * forget.value, lanes);
      } else if constexpr (kCell == Cell::kGru) {
        T* grad_hidden_gates = static_cast<T*>(p.grad_hidden_gates) + r * G * H;
        const Sigmoid reset = sigmoid_with_slope(gates.sum(0, i, lanes));
        const Sigmoid update = sigmoid_with_slope(gates.sum(1, i, lanes));
        const Vec hidden_n = gates.hidden(2, i, lanes);
        const Tanh candidate = tanh_with_slope(gates.input(2, i, lanes) + reset.value * hidden_n);
        const Vec change = load_lanes(state + i, lanes) - candidate.value;
        const Vec grad_update = grad * change * update.slope;
        const Vec grad_n = (grad - grad * update.value) * candidate.slope;
        const Vec grad_reset = grad_n * hidden_n * reset.slope;
        store_lanes(grad_gates + i, grad_reset, lanes);
        store_lanes(grad_gates + H + i, grad_update, lanes);
        store_lanes(grad_gates + 2 * H + i, grad_n, lanes);
        store_lanes(grad_hidden_gates + i, grad_reset, lanes);
        store_lanes(grad_hidden_gates + H + i, grad_update, lanes);
        store_lanes(grad_hidden_gates + 2 * H + i, grad_n * reset.value, lanes);
        if (grad_state) store_lanes(grad_state + i, grad * update.value, lanes);
      } else {
        const Vec sum = gates.sum(0, i, lanes);
        // NaN lets the gradient of relu pass, as in torch.
        const Vec before = kCell == Cell::kTanh ? grad * tanh_with_slope(sum).slope
                                                : select(sum <= Vec{}, Vec{}, grad);
        store_lanes(grad_gates + i, before, lanes);
      }
    });
  }
}

void recurrent_cell_backward(const RecurrentCellBackward& p, int64_t begin, int64_t end) {
  for_kind(p.dtype, p.state_dtype, p.cell, [&](auto element, auto state, auto cell) {
    backward_rows<decltype(element), decltype(state), cell.value>(p, begin, end);
  });
}

}  // namespace FUSED_ATTN_ISA
}  // namespace fused_attn
