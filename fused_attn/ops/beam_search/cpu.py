"""The ``cpu`` backend: vectorised, multi-threaded C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import FLOATING
from .edits import TokenEdits


def unsupported_reasons(
    logits: Tensor,
    edits: TokenEdits | None,
    temperature: Tensor | None,
    forced_tokens: Tensor | None,
    shortlist: Tensor | None,
) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if logits.dtype not in FLOATING:
        reasons.append(f"dtype {logits.dtype}: float32, float16 or bfloat16 only")
    return reasons


def step(
    logits: Tensor,
    scores: Tensor,
    eos_token: int,
    temperature: Tensor | None,
    edit_tokens: Tensor | None,
    edit_factors: Tensor | None,
    edit_offsets: Tensor | None,
    forced_tokens: Tensor | None,
    shortlist: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores and parents, and invalid."""
    return torch.ops.fused_attn_C.beam_search_step(
        logits,
        scores,
        eos_token,
        temperature,
        edit_tokens,
        edit_factors,
        edit_offsets,
        forced_tokens,
        shortlist,
    )
