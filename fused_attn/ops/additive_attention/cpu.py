"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import FLOATING
from .contract import AdditiveInputs, Gradients


def unsupported_reasons(inputs: AdditiveInputs) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if inputs.query.dtype not in FLOATING:
        reasons.append(f"dtype {inputs.query.dtype}: float32, float16 or bfloat16 only")
    return reasons


def forward(inputs: AdditiveInputs) -> tuple[Tensor, Tensor]:
    """Context and weights, or an empty tensor and scores."""
    return torch.ops.fused_attn_C.additive_attention_forward(*inputs)


def backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    inputs: AdditiveInputs,
    weights: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """Gradients of query, key, value, score_weight, features and feature_weight."""
    return torch.ops.fused_attn_C.additive_attention_backward(
        grad_context, grad_weights, *inputs, weights, needs
    )
