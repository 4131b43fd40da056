"""Beam search: the K likeliest targets so far, continued side by side."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fused_attn.ops import beam_search_step

from ._finished import Finished, pack_path, read_hypotheses
from ._history import History
from ._request import check_logits, check_request, is_integer, steps_between_looks, worth_compacting
from .hypothesis import Hypothesis
from .state import Decoder, State

Stopping = Literal["heuristic", "first", "never"]

_SEARCH = "beam_search"


@torch.inference_mode()
def beam_search(
    model: Decoder[State],
    source: Tensor,
    source_lengths: Tensor | None = None,
    *,
    beam_size: int = 4,
    max_length: int | None = None,
    min_length: int = 0,
    length_penalty: float = 1.0,
    stopping: Stopping = "heuristic",
    num_hypotheses: int = 1,
) -> list[list[Hypothesis]]:
    """Decode each source with K beams; the results are those of Hugging Face's ``generate``.

    In each step the K targets of a sentence are continued by every token and the continuations
    are ranked by their sum of log-probabilities. The K best that do not end go on. Those among
    the K best that end, n tokens long with the end-of-sequence token, enter the sentence's pool
    of finished hypotheses with

        score = log_probability / n ** length_penalty

    and the pool keeps its K best. At the sentence's longest length the targets that go on enter
    the pool as they are. A sentence stops there, or as soon as its pool is full and

    - ``heuristic`` (``early_stopping=False``): the best target that goes on, scored as if it
      ended with its present length, does not exceed the pool's worst score;
    - ``first`` (``early_stopping=True``): at once;
    - ``never`` (``early_stopping="never"``): it does not exceed it when scored with the length,
      up to the longest, that favours it most. Then nothing in the beam can change the pool.

    Ties go to the lower beam and token, and to what finished first. A sentence's hypotheses
    depend on that sentence alone, not on the batch it was decoded in (up to the rounding of
    the model's own arithmetic).

    Args:
        model: A decoder; see ``fused_attn.generation.Decoder``.
        source: ``[B, S]`` token indices.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        beam_size: K, at most the size of the vocabulary.
        max_length: Most tokens of a hypothesis, the end-of-sequence token included. Default:
            for each sentence twice its source's length plus 10, or the model's limit if that
            is lower.
        min_length: Fewest tokens of a hypothesis, the end-of-sequence token not included.
            Shorter ends are passed over; no probability is redistributed.
        length_penalty: 0 ranks by log-probability, 1 by the mean of a token; more favours
            longer hypotheses.
        stopping: The rule above.
        num_hypotheses: At most K.

    Returns:
        For each source its ``num_hypotheses`` best hypotheses, best first; fewer where the
        model leaves fewer than that possible.

    Raises:
        TypeError: ``model`` is no decoder, or an argument is of a wrong type.
        ValueError: A shape or a number is out of range, a source is empty or longer than the
            model allows, or the model's logits are of a wrong shape or all -inf or NaN.

    Reference: Sutskever et al., 2014, https://arxiv.org/abs/1409.3215; length penalty and
    stopping as documented for ``generate`` in Hugging Face transformers.
    """
    K = beam_size
    _check_options(K, length_penalty, stopping, num_hypotheses)
    request = check_request(_SEARCH, model, source, source_lengths, max_length, min_length)
    B = len(request.limits)
    if B == 0:
        return []
    device = request.source.device
    patience = steps_between_looks(device)
    state = model.start(request.source, request.source_lengths, K)
    history = History(B, device)
    last, limit_values = max(request.limits), set(request.limits)
    limits = torch.tensor(request.limits, device=device)[:, None]  # [B, 1]
    tokens = torch.full((B, K), request.bos_token, dtype=torch.int64, device=device)
    # All beams are the same at first: only one may have children.
    scores = torch.full((B, K), -math.inf, device=device)
    scores[:, 0] = 0.0
    done = torch.zeros(B, 1, dtype=torch.bool, device=device)
    pool = Finished.none(B, K, device)
    all_beams = torch.arange(K, device=device).expand(B, K)
    parts: list[tuple[Tensor, Finished]] = []

    for n in range(1, last + 1):
        logits, state = model.step(tokens, state)
        check_logits(_SEARCH, logits, len(tokens), K, request.eos_token)
        step = beam_search_step(logits, scores, eos_token=request.eos_token)
        history.append(step.tokens, step.parents)
        tokens, scores = step.tokens, step.scores

        entrants: list[Finished] = []
        if n > min_length and (patience > 1 or bool((step.finished_scores > -math.inf).any())):
            entrants.append(
                _entrants(
                    step.finished_scores.masked_fill(done, -math.inf),
                    n**length_penalty,
                    pack_path(n - 1, step.finished_parents, K, complete=True),
                )
            )
        if n in limit_values:
            entrants.append(
                _entrants(
                    scores.masked_fill(done | (limits != n), -math.inf),
                    n**length_penalty,
                    pack_path(n, all_beams[: len(done)], K, complete=False),
                )
            )
        if entrants:
            pool = pool.merge(entrants)
        if n == last:
            break

        worst = pool.scores[:, -1:]  # -inf until the pool is full
        if stopping == "first":
            # A beam at -inf has no future either.
            stops = (worst > -math.inf) | (scores[:, :1] == -math.inf)
        elif stopping == "never" and length_penalty > 0.0:
            stops = scores[:, :1] / limits**length_penalty <= worst
        else:
            stops = scores[:, :1] / n**length_penalty <= worst
        done |= stops | (limits <= n)

        rows: Tensor | None = None
        if n % patience == 0:
            active = len(done) - int(done.sum())
            if active == 0:
                break
            if worth_compacting(active, len(done)):
                rows, leaving = (~done[:, 0]).nonzero()[:, 0], done[:, 0].nonzero()[:, 0]
                parts.append((history.sentences[leaving], pool.rows(leaving)))
                history.keep(rows)
                tokens, scores, done, limits = tokens[rows], scores[rows], done[rows], limits[rows]
                pool = pool.rows(rows)
        parents = step.parents if rows is None else step.parents[rows]
        state = model.reorder(state, parents, rows)

    parts.append((history.sentences, pool))
    found = read_hypotheses(_SEARCH, parts, history, K)
    return [hypotheses[:num_hypotheses] for hypotheses in found]


def _entrants(sums: Tensor, normaliser: float, paths: Tensor) -> Finished:
    return Finished(sums / normaliser, sums, paths)


def _check_options(
    beam_size: int, length_penalty: float, stopping: str, num_hypotheses: int
) -> None:
    for name, value in (("beam_size", beam_size), ("num_hypotheses", num_hypotheses)):
        if not is_integer(value):
            raise TypeError(f"{_SEARCH}: {name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{_SEARCH}: {name} must be at least 1, got {value}")
    if num_hypotheses > beam_size:
        raise ValueError(
            f"{_SEARCH}: num_hypotheses must be at most beam_size = {beam_size}, got "
            f"{num_hypotheses}"
        )
    if not isinstance(length_penalty, int | float) or isinstance(length_penalty, bool):
        raise TypeError(f"{_SEARCH}: length_penalty must be a number, got {length_penalty!r}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"{_SEARCH}: length_penalty must be finite, got {length_penalty}")
    if stopping not in get_args(Stopping):
        raise ValueError(
            f"{_SEARCH}: stopping must be one of {', '.join(get_args(Stopping))}, got {stopping!r}"
        )
