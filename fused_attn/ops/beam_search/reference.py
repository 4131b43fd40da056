"""One step of beam search in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def beam_search_step_reference(
    logits: Tensor, scores: Tensor, *, eos_token: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores, finished parents; see the public function.

    Computes in fp32 (fp64 for fp64 logits).
    """
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    B, K, V = logits.shape
    log_probabilities = torch.log_softmax(logits.to(compute), dim=-1)
    total = scores.to(compute)[:, :, None] + log_probabilities  # [B, K, V]
    # NaN (from NaN or +inf logits) ranks last, with the impossible ones.
    total = total.masked_fill(total.isnan(), -math.inf).reshape(B, K * V)

    # A stable sort breaks ties by the lower flat index; topk does not promise any order.
    ranked, flat = total.sort(dim=-1, descending=True, stable=True)
    ranked, flat = ranked[:, : 2 * K], flat[:, : 2 * K]
    if ranked.size(1) < 2 * K:  # V = 1
        missing = 2 * K - ranked.size(1)
        ranked = torch.nn.functional.pad(ranked, (0, missing), value=-math.inf)
        flat = torch.nn.functional.pad(flat, (0, missing), value=eos_token)
    parents, tokens = flat // V, flat % V

    is_eos = tokens == eos_token
    # The K best candidates that go on, in order: stable, so rank is kept within each group.
    going_on = is_eos.to(torch.int8).argsort(dim=-1, stable=True)[:, :K]
    next_tokens = tokens.gather(1, going_on)
    next_parents = parents.gather(1, going_on)
    next_scores = ranked.gather(1, going_on)
    next_scores = next_scores.masked_fill(next_tokens == eos_token, -math.inf)

    # Candidates that end, among the K best: slot i holds the one of rank i, or -inf.
    finished_scores = ranked[:, :K].masked_fill(~is_eos[:, :K], -math.inf)
    finished_parents = parents[:, :K].masked_fill(finished_scores == -math.inf, 0)
    return next_tokens, next_parents, next_scores, finished_scores, finished_parents


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
