"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import FLOATING


def unsupported_reasons(input_gates: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    if input_gates.dtype not in FLOATING:
        return [f"dtype {input_gates.dtype}: float32, float16 or bfloat16 only"]
    return []


def forward(
    input_gates: Tensor, hidden_gates: Tensor, state: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """New hidden state and cell."""
    return torch.ops.fused_attn_C.recurrent_cell_forward(input_gates, hidden_gates, state, kind)


def backward(
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: Tensor | None,
    kind: str,
    need_grad_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates, of a GRU's hidden gates, and of the state."""
    return torch.ops.fused_attn_C.recurrent_cell_backward(
        grad_hidden, grad_cell, input_gates, hidden_gates, state, kind, need_grad_state
    )


def layer_unsupported_reasons(input_gates: Tensor) -> list[str]:
    """Why this backend cannot run a whole layer; empty if it can."""
    if input_gates.dtype != torch.float32:
        return [f"dtype {input_gates.dtype}: float32 only"]
    return []


def layer_forward(
    input_gates: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch_sizes: Tensor,
    kind: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, final states, and the residuals."""
    return torch.ops.fused_attn_C.recurrent_layer_forward(
        input_gates, hidden, cell, weight, bias, batch_sizes, kind, reverse, save
    )


def layer_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the gates, of a GRU's recurrent products, and of the first states.

    Args:
        arguments: As of the schema in ``layer_contract.py``, without the backend.
    """
    return torch.ops.fused_attn_C.recurrent_layer_backward(*arguments)
