"""A recurrent layer's step in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def recurrent_cell_reference(
    input_gates: Tensor, hidden_gates: Tensor, state: Tensor | None, *, kind: str
) -> tuple[Tensor, Tensor]:
    """``new_hidden`` and ``new_cell``; see the public function.

    Computes in fp32 (fp64 for fp64 inputs) and rounds once. ``state`` is an LSTM's cell and a
    GRU's hidden state.
    """
    compute = torch.float64 if input_gates.dtype == torch.float64 else torch.float32
    dtype = input_gates.dtype
    no_cell = input_gates.new_empty(0)
    x, h = input_gates.to(compute), hidden_gates.to(compute)
    if kind == "tanh":
        return torch.tanh(x + h).to(dtype), no_cell
    if kind == "relu":
        return torch.relu(x + h).to(dtype), no_cell
    assert state is not None  # the public function checks it
    before = state.to(compute)
    if kind == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
        reset, update = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        new = torch.tanh(x_n + reset * h_n)
        return (new + update * (before - new)).to(state.dtype), no_cell
    input_gate, forget_gate, candidate, output_gate = (x + h).chunk(4, dim=-1)
    after = torch.sigmoid(forget_gate) * before + torch.sigmoid(input_gate) * candidate.tanh()
    new_hidden = torch.sigmoid(output_gate) * torch.tanh(after)
    return new_hidden.to(dtype), after.to(state.dtype)


def recurrent_layer_reference(
    input_gates: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch_sizes: Tensor,
    *,
    kind: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final states; see the public function. States are rounded at each step."""
    sizes = batch_sizes.tolist()
    steps = input_gates.split(sizes)
    outputs: list[Tensor] = [input_gates.new_empty(0)] * len(sizes)
    order = range(len(sizes))
    for s in reversed(order) if reverse else order:
        rows = sizes[s]
        hidden_gates = F.linear(hidden[:rows], weight, bias)
        state = hidden[:rows] if cell is None else cell[:rows]
        outputs[s], new_cell = recurrent_cell_reference(steps[s], hidden_gates, state, kind=kind)
        hidden = torch.cat((outputs[s], hidden[rows:]))
        if cell is not None:
            cell = torch.cat((new_cell, cell[rows:]))
    output = torch.cat(outputs) if outputs else hidden[:0]
    return output, hidden, input_gates.new_empty(0) if cell is None else cell


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []


def layer_unsupported_reasons(*tensors: object) -> list[str]:
    """The reference runs every call."""
    return []
