"""One step of beam search in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def beam_search_step_reference(
    logits: Tensor, scores: Tensor, *, eos_token: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores, finished parents; see the public function.

    Totals are computed in fp64 and rounded once, to the dtype of ``scores``. The order of the
    sum matters: score + logit comes first and is exact for all but the most distant numbers, so
    that candidates of equal rows tie whenever their score + logit do.
    """
    K, V = logits.shape[1:]
    wide = logits.double()
    total = scores.double()[:, :, None] + wide - wide.logsumexp(dim=-1, keepdim=True)
    total = total.to(scores.dtype)  # [B, K, V]
    # NaN (from NaN or +inf logits) ranks last, with the impossible ones.
    impossible = total.isnan() | (total == -math.inf)
    total = total.masked_fill(impossible, -math.inf)

    # The best of each beam, by logit: rounding may have made the totals of different logits
    # equal. Stable sorts put the lower index first among equals; topk does not promise any order.
    best = wide.masked_fill(impossible, -math.inf).argsort(dim=-1, descending=True, stable=True)
    best = best[:, :, : 2 * K]  # [B, K, min(2K, V)]
    total = total.gather(2, best)
    # The best of the sentence, by total; among equals the lower beam and the order above.
    ranked, place = total.flatten(1).sort(dim=-1, descending=True, stable=True)
    ranked, place = ranked[:, : 2 * K], place[:, : 2 * K]
    tokens = best.flatten(1).gather(1, place)
    parents = place // best.size(2)
    if V == 1:
        ranked = torch.nn.functional.pad(ranked, (0, K), value=-math.inf)
        tokens = torch.nn.functional.pad(tokens, (0, K), value=eos_token)
        parents = torch.nn.functional.pad(parents, (0, K), value=0)

    is_eos = tokens == eos_token
    # The K best candidates that go on, in order: stable, so rank is kept within each group.
    going_on = is_eos.to(torch.int8).argsort(dim=-1, stable=True)[:, :K]
    next_tokens = tokens.gather(1, going_on)
    nothing = next_tokens == eos_token  # V = 1
    next_parents = parents.gather(1, going_on).masked_fill(nothing, 0)
    next_scores = ranked.gather(1, going_on).masked_fill(nothing, -math.inf)

    # Candidates that end, among the K best: slot i holds the one of rank i, or -inf.
    finished_scores = ranked[:, :K].masked_fill(~is_eos[:, :K], -math.inf)
    finished_parents = parents[:, :K].masked_fill(finished_scores == -math.inf, 0)
    return next_tokens, next_parents, next_scores, finished_scores, finished_parents


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
