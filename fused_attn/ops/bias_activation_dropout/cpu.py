"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import FLOATING


def unsupported_reasons(x: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if x.dtype not in FLOATING:
        reasons.append(f"dtype {x.dtype}: float32, float16 or bfloat16 only")
    return reasons


def forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
) -> Tensor:
    """Output."""
    return torch.ops.fused_attn_C.bias_activation_dropout_forward(
        x, bias, residual, seed, activation, gated, dropout_p
    )


def backward(
    grad_output: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    need_grad_x: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    return torch.ops.fused_attn_C.bias_activation_dropout_backward(
        grad_output, x, bias, seed, activation, gated, dropout_p, need_grad_x, need_grad_bias
    )
