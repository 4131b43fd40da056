"""Greedy search: the likeliest next token, one after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_attn.ops import beam_search_step

from ._finished import Finished, pack_path, read_hypotheses
from ._history import History
from ._request import check_logits, check_request, steps_between_looks, worth_compacting
from .hypothesis import Hypothesis
from .state import Decoder, State

_SEARCH = "greedy_search"


@torch.inference_mode()
def greedy_search(
    model: Decoder[State],
    source: Tensor,
    source_lengths: Tensor | None = None,
    *,
    max_length: int | None = None,
    min_length: int = 0,
) -> list[Hypothesis]:
    """Decode each source by taking the likeliest next token until the target ends.

    Equal to beam search with one beam. Ties go to the lower token. A hypothesis depends on its
    source alone, not on the batch it was decoded in (up to the rounding of the model's own
    arithmetic). Its ``score`` is the mean log-probability of its tokens, the end's included.

    Args:
        model: A decoder; see ``fused_attn.generation.Decoder``.
        source: ``[B, S]`` token indices.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        max_length: Most tokens of a hypothesis, the end-of-sequence token included. Default:
            for each sentence twice its source's length plus 10, or the model's limit if that
            is lower.
        min_length: Fewest tokens of a hypothesis, the end-of-sequence token not included.

    Returns:
        B hypotheses, in the order of the sources.

    Raises:
        TypeError: ``model`` is no decoder, or an argument is of a wrong type.
        ValueError: A shape or a number is out of range, a source is empty or longer than the
            model allows, or the model's logits are of a wrong shape or all -inf or NaN.
    """
    request = check_request(_SEARCH, model, source, source_lengths, max_length, min_length)
    B = len(request.limits)
    if B == 0:
        return []
    device = request.source.device
    patience = steps_between_looks(device)
    state = model.start(request.source, request.source_lengths, 1)
    history = History(B, device)
    limits = torch.tensor(request.limits, device=device)[:, None]  # [B, 1]
    tokens = torch.full((B, 1), request.bos_token, dtype=torch.int64, device=device)
    scores = torch.zeros(B, 1, device=device)
    done = torch.zeros(B, 1, dtype=torch.bool, device=device)
    finished = Finished.none(B, 1, device)
    parts: list[tuple[Tensor, Finished]] = []

    last = max(request.limits)
    for n in range(1, last + 1):
        logits, state = model.step(tokens, state)
        check_logits(_SEARCH, logits, len(tokens), 1, request.eos_token)
        step = beam_search_step(logits, scores, eos_token=request.eos_token)
        history.append(step.tokens, step.parents)
        tokens, scores = step.tokens, step.scores

        # What was found so far, should the sentence stop here: its end, or the cut target.
        sums, paths = scores, pack_path(n, step.parents, 1, complete=False)
        stops = (limits <= n) | (scores == -math.inf)
        if n > min_length:
            ends = step.finished_scores > -math.inf
            sums = torch.where(ends, step.finished_scores, sums)
            paths = torch.where(ends, pack_path(n - 1, step.parents, 1, complete=True), paths)
            stops |= ends
        finished = Finished(
            scores=torch.where(done, finished.scores, sums / n),
            sums=torch.where(done, finished.sums, sums),
            paths=torch.where(done, finished.paths, paths),
        )
        done |= stops

        if n == last or n % patience != 0:
            continue
        active = len(done) - int(done.sum())
        if active == 0:
            break
        if worth_compacting(active, len(done)):
            rows, leaving = (~done[:, 0]).nonzero()[:, 0], done[:, 0].nonzero()[:, 0]
            parts.append((history.sentences[leaving], finished.rows(leaving)))
            history.keep(rows)
            state = model.reorder(state, step.parents[rows], rows)
            tokens, scores, done, limits = tokens[rows], scores[rows], done[rows], limits[rows]
            finished = finished.rows(rows)
    parts.append((history.sentences, finished))
    return [best for (best,) in read_hypotheses(_SEARCH, parts, history, beam_size=1)]
