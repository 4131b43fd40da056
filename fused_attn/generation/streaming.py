"""Streaming: the tokens of the best target as they settle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._engine import Engine
from ._finished import Path
from ._reading import Entry, read_hypotheses
from ._request import Job, Lengths, check_jobs, check_model
from .generate import make_settings, search_name
from .hypothesis import GenerationError
from .state import Decoder, State
from .strategies import NO_CONSTRAINTS, BeamSearch, Constraints, Greedy, Sampling


@torch.inference_mode()
def stream(
    model: Decoder[State],
    source: Tensor,
    source_lengths: Tensor | None = None,
    *,
    strategy: BeamSearch | Greedy | Sampling | None = None,
    constraints: Constraints = NO_CONSTRAINTS,
    max_length: int | None = None,
    min_length: int = 0,
) -> Iterator[tuple[int, list[int]]]:
    """Decode sources and yield the tokens of each one's best hypothesis as they settle.

    A token has settled when every beam that is still alive has it at its place, and so has the
    best hypothesis that has finished: whatever comes, it will be in the best hypothesis. Under
    greedy search and sampling (one sample) that is every token at once. Put together, what is
    yielded for a source is ``generate``'s best hypothesis. Made for few sources: the host looks
    at the beams after every step.

    Args:
        model: A decoder.
        source: ``[B, S]`` token indices.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        strategy: Of groups of beams one, and of samples one. Default: ``BeamSearch()``.
        constraints: See ``generate``; so are the other options.
        max_length: See ``generate``.
        min_length: See ``generate``.

    Yields:
        ``(sentence, tokens)``: at least one token; a source's last are followed by
        ``(sentence, [])``.

    Raises:
        TypeError: See ``generate``.
        ValueError: See ``generate``; or there are several groups or samples.
        GenerationError: The model's logits held NaN or left nothing possible.
    """
    strategy = BeamSearch() if strategy is None else strategy
    search = search_name(strategy)
    check_model(search, model)
    if isinstance(strategy, BeamSearch) and strategy.groups != 1:
        raise ValueError(f"{search}: groups must be 1 to stream, got {strategy.groups}")
    if isinstance(strategy, Sampling) and strategy.num_samples != 1:
        raise ValueError(f"{search}: num_samples must be 1 to stream, got {strategy.num_samples}")
    lengths = Lengths(max_length, min_length)
    jobs = check_jobs(search, model, source, source_lengths, lengths, constraints)
    if not jobs:
        return
    settings = make_settings(model, strategy, constraints, lengths, len(jobs), jobs[0].source)
    engine = Engine(model, settings(keeps_prefixes=True), source.device)
    shown = [0] * len(jobs)
    nothing: Iterator[Job] = iter(())
    engine.begin(iter(jobs))
    while engine.is_running:
        engine.advance()
        for row, job in enumerate(engine.occupants):
            if job is None or bool(engine.slots.done[row].all()):
                continue
            tokens = _settled(engine, row)[shown[job.number] :]
            if tokens:
                shown[job.number] += len(tokens)
                yield job.number, tokens
        for number, result in engine.finished(nothing):
            if result.error is not None:
                raise GenerationError(result.error, [result])
            tokens = result.best.tokens[shown[number] :]
            if tokens:
                yield number, tokens
            yield number, []


def _settled(engine: Engine, row: int) -> list[int]:
    """What all beams of a place that are alive begin with, and the best that has finished."""
    slots = engine.slots
    assert slots.prefixes is not None
    alive = slots.scores[row] > -torch.inf
    beams = slots.prefixes[row, alive, 1 : engine.ages[row] + 1]
    settled = beams[0][_common(beams, beams[0])].tolist()
    if not isinstance(engine.settings.strategy, BeamSearch):
        return settled
    score = float(slots.pool_scores[row, 0])
    if score == -torch.inf:
        return settled
    path = Path.unpack(int(slots.pool_paths[row, 0]), engine.settings.beam_size)
    rows = torch.tensor([row], device=engine.device)
    [best] = read_hypotheses(slots, rows, [Entry(0, path, score, 0.0)], engine.settings.beam_size)
    common = 0
    for token, other in zip(settled, best.tokens, strict=False):
        if token != other:
            break
        common += 1
    return settled[:common]


def _common(beams: Tensor, first: Tensor) -> slice:
    """How far all rows of ``[K, n]`` are alike."""
    alike = (beams == first).all(dim=0)
    return slice(0, int(alike.cumprod(dim=0).sum()))
