// Parameters of the recurrent_cell kernels. A null pointer is an absent tensor. T stands for the
// element type of the gates, `dtype`, and S for that of the state, `state_dtype`, which is T or
// float. G is the number of gates, H is `hidden_size`.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided_rows.h"

namespace fused_attn {

enum class Cell { kLstm, kGru, kTanh, kRelu };

struct RecurrentCellForward {
  StridedRows input_gates;   // T [rows, G H]
  StridedRows hidden_gates;  // T [rows, G H]
  StridedRows state;         // S [rows, H]: the cell of an LSTM, the hidden state of a GRU
  void* new_hidden;          // [rows, H], of a GRU S, else T
  void* new_cell;            // S [rows, H] or null
  int64_t hidden_size;
  Cell cell;
  DType dtype;
  DType state_dtype;
};

struct RecurrentCellBackward {
  StridedRows grad_hidden;   // [rows, H] as new_hidden, or null: 0
  StridedRows grad_cell;     // S [rows, H] or null: 0
  StridedRows input_gates;   // T [rows, G H]
  StridedRows hidden_gates;  // T [rows, G H]
  StridedRows state;         // S [rows, H]
  void* grad_gates;          // T [rows, G H]
  void* grad_hidden_gates;   // T [rows, G H], of a GRU alone
  void* grad_state;          // S [rows, H] or null
  int64_t hidden_size;
  Cell cell;
  DType dtype;
  DType state_dtype;
};

}  // namespace fused_attn

FUSED_ATTN_DECLARE_KERNELS(
    // Rows [begin, end).
    void recurrent_cell_forward(const RecurrentCellForward& p, int64_t begin, int64_t end);
    void recurrent_cell_backward(const RecurrentCellBackward& p, int64_t begin, int64_t end);)
