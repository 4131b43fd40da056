"""The ``cuda`` backend: CUDA C++ on tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import _extension

from .._check import head_reasons
from .contract import AttentionInputs


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = head_reasons(inputs.query, inputs.value)
    if inputs.query.dtype == torch.float32:
        reasons.append("dtype torch.float32: the products are made by 16-bit tensor cores")
    return reasons


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    operators = _extension.cuda_operators(inputs.query.device)
    return operators.attention_forward(*inputs)


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is empty unless it is needed."""
    operators = _extension.cuda_operators(inputs.query.device)
    return operators.attention_backward(grad_output, grad_lse, *inputs, output, lse, need_grad_bias)
