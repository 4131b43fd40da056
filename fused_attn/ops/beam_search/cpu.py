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


def step(
    logits: Tensor, scores: Tensor, eos_token: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores and finished parents."""
    return torch.ops.fused_attn_C.beam_search_step(logits, scores, eos_token)
