// From the bindings' arguments to the kernels' own.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "common/dispatch.h"
#include "recurrent_cell/recurrent_cell.h"

namespace fused_attn {

inline Cell cell_of(std::string_view kind) {
  if (kind == "lstm") return Cell::kLstm;
  if (kind == "gru") return Cell::kGru;
  if (kind == "tanh") return Cell::kTanh;
  if (kind == "relu") return Cell::kRelu;
  TORCH_CHECK(false, "recurrent_cell: unknown kind ", kind);
}

inline int64_t gates_of(Cell cell) {
  if (cell == Cell::kLstm) return 4;
  return cell == Cell::kGru ? 3 : 1;
}

// Rows that a thread takes at least. An element's gates cost as much as several elements of a
// kernel that waits for memory.
inline int64_t row_grain(Cell cell, int64_t hidden_size) {
  constexpr int64_t kCost = 4;
  return task_grain(kCost * gates_of(cell) * hidden_size);
}

}  // namespace fused_attn
