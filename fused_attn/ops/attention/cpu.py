"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import FLOATING

MAX_HEAD_SIZE = 256


def unsupported_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if query.dtype not in FLOATING:
        reasons.append(f"dtype {query.dtype}: float32, float16 or bfloat16 only")
    if query.size(-1) > MAX_HEAD_SIZE:
        reasons.append(f"head size {query.size(-1)} > {MAX_HEAD_SIZE}")
    if value.size(-1) > MAX_HEAD_SIZE:
        reasons.append(f"head size {value.size(-1)} of value > {MAX_HEAD_SIZE}")
    if dropout_p > 0.0:
        reasons.append("dropout_p > 0: no dropout")
    return reasons


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    return torch.ops.fused_attn_C.attention_forward(
        query, key, value, mask, bias, query_lengths, key_lengths, is_causal, scale
    )


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is empty unless it is needed."""
    return torch.ops.fused_attn_C.attention_backward(
        grad_output,
        query,
        key,
        value,
        mask,
        bias,
        query_lengths,
        key_lengths,
        output,
        lse,
        is_causal,
        scale,
        need_grad_bias,
    )
