"""The ``cuda`` backend: CUDA C++."""

from __future__ import annotations

from torch import Tensor

from fused_attn import _extension

from .._check import FLOATING
from .edits import TokenEdits

_MAX_BEAMS = 256


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
    if logits.size(1) > _MAX_BEAMS:
        reasons.append(f"{logits.size(1)} beams > {_MAX_BEAMS}")
    if any(x is not None for x in (edits, temperature, forced_tokens, shortlist)):
        reasons.append("temperature, edits, forced tokens, shortlists: not in the cuda kernels")
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
    operators = _extension.cuda_operators(logits.device)
    return operators.beam_search_step(
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
