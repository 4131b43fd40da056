"""Generation with any strategy: the general entry points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._engine import Engine, Settings
from ._request import (
    Job,
    Lengths,
    check_jobs,
    check_lengths,
    check_methods,
    check_model,
    make_job,
    too_long,
)
from .hypothesis import GenerationError, Result
from .state import Decoder, State
from .strategies import NO_CONSTRAINTS, BeamSearch, Constraints, Greedy, Strategy, is_integer

# Sources in a batch where the caller does not say: enough rows for the matrix products.
_BATCH_SIZE = {"cpu": 32}
_GPU_BATCH_SIZE = 128


Source = Tensor | Sequence[int]


@torch.inference_mode()
def generate(
    model: Decoder[State],
    source: Tensor,
    source_lengths: Tensor | None = None,
    *,
    strategy: Strategy | None = None,
    constraints: Constraints = NO_CONSTRAINTS,
    max_length: int | None = None,
    min_length: int = 0,
    batch_size: int | None = None,
    alignments: bool = False,
) -> list[Result]:
    """Decode each source by a strategy, under constraints.

    A source's result does not depend on the others, their order or ``batch_size``, up to the
    rounding of the model's own arithmetic (with ``fused_attn.models.Transformer`` in fp32 on a
    CPU: bit for bit). Where a model gives NaN, or leaves nothing possible, that source's result
    says so in ``error``; the others go on.

    Args:
        model: A decoder; see ``fused_attn.generation.Decoder``.
        source: ``[B, S]`` token indices, or ``[B, S, ...]`` features.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        strategy: ``BeamSearch``, ``Greedy`` or ``Sampling``. Default: ``BeamSearch()``.
        constraints: What the targets must obey.
        max_length: Most tokens of a target, the end-of-sequence token included. Default: for
            each source twice its length plus 10, or the model's limit if that is lower.
        min_length: Fewest tokens of a target, the end-of-sequence token not included.
        batch_size: Sources decoded at a time; as they finish, others take their places. Default:
            32 on a CPU, 128 on a GPU.
        alignments: Return each hypothesis's ``alignment``. The model must have ``align``.

    Returns:
        A result for each source.

    Raises:
        TypeError: ``model`` is no decoder or lacks a method that the call needs, or an argument
            is of a wrong type.
        ValueError: A shape or a number is out of range, a source is empty or longer than the
            model allows, or the model's logits are of a wrong shape.
    """
    strategy = BeamSearch() if strategy is None else strategy
    search = search_name(strategy)
    check_model(search, model)
    lengths = Lengths(max_length, min_length)
    jobs = check_jobs(search, model, source, source_lengths, lengths, constraints)
    if not jobs:
        return []
    settings = make_settings(model, strategy, constraints, lengths, batch_size, jobs[0].source)
    engine = Engine(model, settings(alignments=alignments), source.device)
    found = dict(engine.run(iter(jobs)))
    return [found[i] for i in range(len(jobs))]


@torch.inference_mode()
def generate_each(
    model: Decoder[State],
    sources: Iterable[Source] | Iterable[tuple[int, Source]],
    *,
    numbered: bool = False,
    strategy: Strategy | None = None,
    constraints: Constraints = NO_CONSTRAINTS,
    max_length: int | None = None,
    min_length: int = 0,
    batch_size: int | None = None,
    alignments: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[tuple[int, Result]]:
    """Decode a stream of sources, yielding the number and the result of each as it finishes.

    As ``generate``, but sources are taken as there is room for them, so that their number does
    not matter to memory. They need not be sorted; where neighbours are of similar length, less
    padding is read. A source that is empty, or too long for the model or for a prefix, is a
    result with an ``error``.

    Args:
        model: A decoder.
        sources: ``[S]`` token indices each, or ``[S, ...]`` features.
        numbered: Sources come in pairs, each after a number of its own, at least 0: what is
            yielded with its result, and what its samples are drawn by, so that those do not
            depend on the order of the sources. Default: they are counted from 0.
        strategy: See ``generate``; so are the other options.
        constraints: With one prefix and one shortlist for all.
        max_length: See ``generate``.
        min_length: See ``generate``.
        batch_size: See ``generate``.
        alignments: See ``generate``.
        device: Where the model is. Default: where a source that is a tensor is; else the CPU.

    Yields:
        ``(number, result)``.

    Raises:
        TypeError: See ``generate``.
        ValueError: See ``generate``, but for what is said of single sources.
    """
    strategy = BeamSearch() if strategy is None else strategy
    search = search_name(strategy)
    check_model(search, model)
    lengths = Lengths(max_length, min_length)
    check_lengths(search, model, lengths)
    for name in ("prefix", "shortlist"):
        tokens = getattr(constraints, name)
        if tokens and not is_integer(tokens[0]):
            raise ValueError(f"{search}: {name} must be one sequence for all sources of a stream")
    refused: list[tuple[int, Result]] = []
    prefix: Any = constraints.prefix
    shortlist: Any = constraints.shortlist

    def jobs() -> Iterator[Job]:
        pairs: Iterable[Any] = sources if numbered else enumerate(sources)
        for number, tokens in pairs:
            source: Tensor = tokens if isinstance(tokens, Tensor) else torch.tensor(list(tokens))
            source = source.to(source.device if device is None else device)
            why = too_long(search, model, len(source), number)
            if len(source) == 0:
                why = f"{search}: every source must have a token, got none for sentence {number}"
            if why is None:
                try:
                    yield make_job(search, model, number, source, lengths, prefix, shortlist)
                    continue
                except ValueError as error:
                    why = str(error)
            refused.append((number, Result([], why)))

    queue = jobs()
    first = next(queue, None)
    if first is not None:
        settings = make_settings(model, strategy, constraints, lengths, batch_size, first.source)
        engine = Engine(model, settings(alignments=alignments), first.source.device)
        for number, result in engine.run(_chain(first, queue)):
            yield from _drain(refused)
            yield number, result
    yield from _drain(refused)


def search_name(strategy: Strategy) -> str:
    """What messages call a search by this strategy."""
    if isinstance(strategy, BeamSearch):
        return "beam_search"
    return "greedy_search" if isinstance(strategy, Greedy) else "sample"


def make_settings(
    model: Any,
    strategy: Strategy,
    constraints: Constraints,
    lengths: Lengths,
    batch_size: int | None,
    source: Tensor,
    search: str | None = None,
) -> Any:
    """A function that makes an engine's settings of the options that are left.

    Raises:
        TypeError: The model lacks a method that the call needs.
        ValueError: ``batch_size`` is out of range.
    """
    search = search or search_name(strategy)
    if batch_size is None:
        batch_size = _BATCH_SIZE.get(source.device.type, _GPU_BATCH_SIZE)
    if not is_integer(batch_size):
        raise TypeError(f"{search}: batch_size must be an int, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"{search}: batch_size must be at least 1, got {batch_size}")
    covers = isinstance(strategy, BeamSearch) and strategy.coverage_penalty > 0.0

    def settings(alignments: bool = False, keeps_prefixes: bool = False) -> Settings:
        check_methods(search, model, {"cross_attention": covers, "align": alignments})
        return Settings(
            search,
            strategy,
            constraints,
            lengths.min_length,
            batch_size,
            alignments,
            keeps_prefixes,
        )

    return settings


def all_of(results: list[Result]) -> list[Result]:
    """The results, if every source has one.

    Raises:
        GenerationError: Some have none; it holds all.
    """
    errors = [result.error for result in results if result.error is not None]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise GenerationError(f"{errors[0]}{more}", results)
    return results


def _chain(first: Job, others: Iterator[Job]) -> Iterator[Job]:
    yield first
    yield from others


def _drain(refused: list[tuple[int, Result]]) -> Iterator[tuple[int, Result]]:
    while refused:
        yield refused.pop(0)
