"""The ``cuda`` backend: CUDA C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import _extension

from .._check import FLOATING


def unsupported_reasons(x: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    if x.dtype not in FLOATING:
        return [f"dtype {x.dtype}: float32, float16 or bfloat16 only"]
    return []


def forward(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, sum, mean, rstd."""
    return _extension.cuda_operators(x.device).add_layer_norm_forward(
        x, x_bias, residual, weight, bias, seed, eps, dropout_p, is_rms, sum_dtype
    )


def backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_rms: bool,
    x_is_sum: bool,
    grad_residual_dtype: torch.dtype | None,
    need_x_bias: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, x_bias, weight and bias."""
    return _extension.cuda_operators(x.device).add_layer_norm_backward(
        grad_output,
        grad_sum,
        x,
        x_bias,
        residual,
        mean,
        rstd,
        weight,
        seed,
        dropout_p,
        is_rms,
        x_is_sum,
        grad_residual_dtype,
        need_x_bias,
        need_weight,
        need_bias,
    )
