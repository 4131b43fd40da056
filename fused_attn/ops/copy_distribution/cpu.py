"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import FLOATING


def unsupported_reasons(logits: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if logits.dtype not in FLOATING:
        reasons.append(f"dtype {logits.dtype}: float32, float16 or bfloat16 only")
    return reasons


def forward(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    extended_size: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, or with targets their negative log-probabilities, and lse."""
    return torch.ops.fused_attn_C.copy_distribution_forward(
        logits, copy, source_tokens, gate, source_lengths, targets, extended_size, ignore_index
    )


def backward(
    grad_output: Tensor,
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    lse: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, copy and gate."""
    return torch.ops.fused_attn_C.copy_distribution_backward(
        grad_output,
        logits,
        copy,
        source_tokens,
        gate,
        source_lengths,
        targets,
        lse,
        ignore_index,
    )
