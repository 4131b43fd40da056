"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import head_reasons
from .contract import AttentionInputs


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    return head_reasons(inputs.query, inputs.value)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    return torch.ops.fused_attn_C.attention_forward(*inputs)


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is empty unless it is needed."""
    return torch.ops.fused_attn_C.attention_backward(
        grad_output, grad_lse, *inputs, output, lse, need_grad_bias
    )
