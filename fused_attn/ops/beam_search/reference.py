"""One step of beam search in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def beam_search_step_reference(
    logits: Tensor,
    scores: Tensor,
    *,
    eos_token: int,
    temperature: Tensor | None = None,
    edit_tokens: Tensor | None = None,
    edit_factors: Tensor | None = None,
    edit_offsets: Tensor | None = None,
    forced_tokens: Tensor | None = None,
    shortlist: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores, finished parents, invalid; see the public function.

    Totals are computed in fp64 and rounded once, to the dtype of ``scores``. The order of the
    sum matters: score + logit comes first and is exact for all but the most distant numbers, so
    that candidates of equal rows tie whenever their score + logit do. The total of an edited token
    is computed as it reads: (score + factor * (logit - lse)) + offset.
    """
    K, V = logits.shape[1:]
    wide, running = logits.double(), scores.double()[:, :, None]
    if temperature is not None:
        wide = wide / temperature.double()[:, None, None]
    if shortlist is not None:
        wide = wide.masked_fill(~_listed(shortlist, V)[:, None], -math.inf)
    lse = wide.logsumexp(dim=-1, keepdim=True)
    total = running + wide - lse  # [B, K, V]
    order = wide
    edited: Tensor | None = None
    if edit_tokens is not None and edit_factors is not None and edit_offsets is not None:
        edited, factors, offsets = _spread(edit_tokens, edit_factors, edit_offsets, V)
        total = torch.where(edited, (running + factors * (wide - lse)) + offsets, total)
        order = wide.masked_fill(edited, 0.0)
    total = total.to(scores.dtype)
    if forced_tokens is not None:
        forced = forced_tokens[:, None, None]
        possible = (forced < 0) | (forced == torch.arange(V, device=logits.device))
        total = total.masked_fill(~possible, -math.inf)
    # NaN (from NaN or +inf logits) ranks last, with the impossible ones.
    impossible = total.isnan() | (total == -math.inf)
    total = total.masked_fill(impossible, -math.inf)

    # The best of each beam, by logit: rounding may have made the totals of different logits
    # equal. Stable sorts put the lower index first among equals; topk does not promise any order.
    best = order.masked_fill(impossible, -math.inf).argsort(dim=-1, descending=True, stable=True)
    if edited is not None:
        # Edited ones behind, by token; then by total, which has the last word.
        best = best.gather(2, edited.gather(2, best).to(torch.int8).argsort(dim=-1, stable=True))
        best = best.gather(2, total.gather(2, best).argsort(dim=-1, descending=True, stable=True))
        # Impossible ones by token alone, edited or not.
        by_token = torch.where(impossible.gather(2, best), best, -1)
        best = best.gather(2, by_token.argsort(dim=-1, stable=True))
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

    wrong = lse.isnan() | (lse == math.inf)
    invalid = (wrong & (running > -math.inf)).flatten(1).any(dim=1)
    return next_tokens, next_parents, next_scores, finished_scores, finished_parents, invalid


def _listed(shortlist: Tensor, V: int) -> Tensor:
    """``[B, V]``: whether the sentence's vocabulary has the token."""
    # One column more takes what is no token.
    columns = torch.where((shortlist >= 0) & (shortlist < V), shortlist, V)
    listed = torch.zeros(len(shortlist), V + 1, dtype=torch.bool, device=shortlist.device)
    return listed.scatter(1, columns, True)[:, :V]


def _spread(
    edit_tokens: Tensor, edit_factors: Tensor, edit_offsets: Tensor, V: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, K, V]``: whether the token is edited, its factor in fp64, its offset in fp64."""
    changes = (edit_factors != 1.0) | (edit_offsets != 0.0)
    is_edit = changes & (edit_tokens >= 0) & (edit_tokens < V)
    columns = torch.where(is_edit, edit_tokens, V)
    shape = (*edit_tokens.shape[:2], V + 1)
    factors = edit_factors.new_ones(shape, dtype=torch.float64)
    factors = factors.scatter(2, columns, edit_factors.double())[:, :, :V]
    offsets = edit_offsets.new_zeros(shape, dtype=torch.float64)
    offsets = offsets.scatter(2, columns, edit_offsets.double())[:, :, :V]
    return (factors != 1.0) | (offsets != 0.0), factors, offsets


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
