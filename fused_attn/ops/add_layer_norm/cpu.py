"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import FLOATING


def unsupported_reasons(x: Tensor, *, weight: Tensor | None, dropout_p: float) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if x.dtype not in FLOATING:
        reasons.append(f"dtype {x.dtype}: float32, float16 or bfloat16 only")
    return reasons


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    need_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, sum, mean, rstd."""
    return torch.ops.fused_attn_C.add_layer_norm_forward(
        x, residual, weight, bias, seed, eps, dropout_p, need_sum
    )


def backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    x_is_sum: bool,
    need_grad_residual: bool,
    need_grad_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias."""
    return torch.ops.fused_attn_C.add_layer_norm_backward(
        grad_output,
        grad_sum,
        x,
        residual,
        mean,
        rstd,
        weight,
        seed,
        dropout_p,
        x_is_sum,
        need_grad_residual,
        need_grad_parameters,
    )
