"""The ``cuda`` backend: CUDA C++."""

from __future__ import annotations

from torch import Tensor

from fused_attn import _extension

from .._check import FLOATING

_MAX_BEAMS = 256


def unsupported_reasons(logits: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if logits.dtype not in FLOATING:
        reasons.append(f"dtype {logits.dtype}: float32, float16 or bfloat16 only")
    if logits.size(1) > _MAX_BEAMS:
        reasons.append(f"{logits.size(1)} beams > {_MAX_BEAMS}")
    return reasons


def step(
    logits: Tensor, scores: Tensor, eos_token: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores and finished parents."""
    operators = _extension.cuda_operators(logits.device)
    return operators.beam_search_step(logits, scores, eos_token)
