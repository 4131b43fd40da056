"""Add & Norm in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .._philox import keep_mask


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    x_bias: Tensor | None,
    is_rms: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Output, in the dtype of ``x``, and sum; see the public function.

    Computes in fp32 (fp64 for fp64 inputs) and rounds at each output. A sum that is returned, in
    ``sum_dtype``, is rounded before it is normalised, so that output and sum agree; else it is
    never rounded.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(compute)
    if x_bias is not None:
        total = total + x_bias.to(compute)
    if dropout_p > 0.0:
        assert seed is not None  # the public function draws one
        total = torch.where(keep_mask(seed, x.shape, dropout_p), total / (1.0 - dropout_p), 0.0)
    if residual is not None:
        total = total + residual.to(compute)
    if sum_dtype is not None:
        total = total.to(sum_dtype).to(compute)
    centred = total if is_rms else total - total.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    output = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        output = output * weight.to(compute)
    if bias is not None:
        output = output + bias.to(compute)
    return output.to(x.dtype), total.to(x.dtype if sum_dtype is None else sum_dtype)


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
