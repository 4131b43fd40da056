"""Checks and defaults that every search shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .strategies import Constraints, is_integer, per_source

_PROTOCOL = ("bos_token", "eos_token", "max_length", "start", "step", "reorder")


@dataclass(frozen=True)
class Job:
    """A source that waits for its turn."""

    number: int
    """Its place among the sources of the call."""
    source: Tensor
    """``[S]`` tokens or ``[S, ...]`` features."""
    limit: int
    """Most steps; depends on this source alone."""
    prefix: tuple[int, ...] = ()
    shortlist: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Lengths:
    """How long targets may be."""

    max_length: int | None
    min_length: int


def check_model(search: str, model: Any) -> None:
    """Raise TypeError unless the model is a decoder."""
    for name in _PROTOCOL:
        if not hasattr(model, name):
            raise TypeError(f"{search}: model must have {name}, got {type(model).__name__}")
    for name in ("bos_token", "eos_token"):
        if not is_integer(getattr(model, name)):
            raise TypeError(
                f"{search}: the model's {name} must be an int, got {getattr(model, name)!r}"
            )


def check_methods(search: str, model: Any, needs: dict[str, bool]) -> None:
    """Raise TypeError unless the model has the optional methods that are needed."""
    for name, is_needed in needs.items():
        if is_needed and not hasattr(model, name):
            raise TypeError(
                f"{search}: this call needs a model with {name}, got {type(model).__name__}"
            )


def check_jobs(
    search: str,
    model: Any,
    source: Tensor,
    source_lengths: Tensor | None,
    lengths: Lengths,
    constraints: Constraints,
) -> list[Job]:
    """A batch of sources as jobs; reads the lengths back from the device once.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: A shape or a number is out of range.
    """
    if not isinstance(source, Tensor):
        raise TypeError(f"{search}: source must be a tensor, got {type(source).__name__}")
    if source.dim() < 2:
        raise ValueError(f"{search}: source must have shape [B, S], got {list(source.shape)}")
    B, S = source.shape[:2]
    sizes = [S] * B
    if source_lengths is not None:
        sizes = _read_lengths(search, source_lengths, B)
    for i, size in enumerate(sizes):
        if not 1 <= size <= S:
            raise ValueError(
                f"{search}: every source must have 1..{S} tokens (S from source), got {size} "
                f"for sentence {i}"
            )
    check_lengths(search, model, lengths)
    prefixes, shortlists = _per_sentence(search, constraints, B)
    jobs = []
    for i, size in enumerate(sizes):
        why = too_long(search, model, size, i)
        if why is not None:
            raise ValueError(why)
        jobs.append(
            make_job(search, model, i, source[i, :size], lengths, prefixes[i], shortlists[i])
        )
    return jobs


def too_long(search: str, model: Any, size: int, number: int) -> str | None:
    """Why the model cannot read a source of that many tokens; None where it can."""
    capacity: int | None = model.max_length
    if capacity is None or size <= capacity:
        return None
    return (
        f"{search}: every source must have at most {capacity} tokens (the model's max_length), got "
        f"{size} for sentence {number}"
    )


def make_job(
    search: str,
    model: Any,
    number: int,
    source: Tensor,
    lengths: Lengths,
    prefix: Sequence[int],
    shortlist: Sequence[int] | None,
) -> Job:
    """A source with its limit.

    Raises:
        ValueError: The prefix is longer than a target may be.
    """
    limit = lengths.max_length
    if limit is None:
        limit = max(2 * len(source) + 10, lengths.min_length + 1, len(prefix) + 1)
        if model.max_length is not None:
            limit = min(limit, model.max_length)
    if limit < len(prefix):
        raise ValueError(
            f"{search}: max_length must be at least the prefix's {len(prefix)} tokens, got {limit}"
        )
    return Job(
        number, source, limit, tuple(prefix), None if shortlist is None else tuple(shortlist)
    )


def _per_sentence(
    search: str, constraints: Constraints, B: int
) -> tuple[list[Sequence[int]], list[Any]]:
    prefixes = per_source(constraints.prefix, B)
    shortlists: list[Any] = [None] * B
    if constraints.shortlist is not None:
        shortlists = list(per_source(constraints.shortlist, B))
    for name, rows in (("prefix", prefixes), ("shortlist", shortlists)):
        if len(rows) != B:
            raise ValueError(
                f"{search}: {name} must be one sequence or B = {B} (from source), got {len(rows)}"
            )
    return prefixes, shortlists


def check_logits(
    search: str, logits: object, B: int, K: int, eos_token: int, beam_size: int
) -> None:
    """Raise unless a model's step returned ``[B, K, V]``, of a vocabulary that is large enough."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{search}: the model's step must return a tensor of logits first, got "
            f"{type(logits).__name__}"
        )
    if logits.dim() != 3 or logits.size(0) != B or logits.size(1) != K:
        raise ValueError(
            f"{search}: the model's logits must have shape [B, K, V] with B = {B}, K = {K}, got "
            f"{list(logits.shape)}"
        )
    V = logits.size(2)
    if not 0 <= eos_token < V:
        raise ValueError(
            f"{search}: the model's eos_token must be in 0..V-1 with V = {V} (from its logits), "
            f"got {eos_token}"
        )
    if beam_size > V:
        raise ValueError(
            f"{search}: beam_size must be at most V = {V} (from the model's logits), got "
            f"{beam_size}"
        )


def check_weights(search: str, weights: object, coverage: Tensor) -> None:
    """Raise unless a model's ``cross_attention`` returned ``[B, K, S]``."""
    if not isinstance(weights, Tensor) or weights.shape[:2] != coverage.shape[:2]:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        B, K = coverage.shape[:2]
        raise ValueError(
            f"{search}: the model's cross_attention must return [B, K, S] with B = {B}, K = {K}, "
            f"got {got}"
        )


def steps_between_looks(device: torch.device) -> int:
    """After how many steps to look whether sentences are done.

    On a CPU, looking costs nothing. Elsewhere it makes the host wait for the device, and what a
    finished sentence does meanwhile changes nothing.
    """
    return 1 if device.type == "cpu" else 8


def worth_compacting(active: int, rows: int) -> bool:
    """Whether to drop finished sentences from a batch of ``rows``.

    Dropping copies the state of those that stay, about as much work as part of one step, and
    saves their share of every later step: not for less than an eighth of the batch.
    """
    return 0 < active <= rows - max(1, rows // 8)


def _read_lengths(search: str, source_lengths: Tensor, B: int) -> list[int]:
    if not isinstance(source_lengths, Tensor):
        raise TypeError(
            f"{search}: source_lengths must be a tensor, got {type(source_lengths).__name__}"
        )
    if source_lengths.dtype not in (torch.int32, torch.int64):
        dtype = str(source_lengths.dtype).removeprefix("torch.")
        raise TypeError(f"{search}: source_lengths must have dtype int32 or int64, got {dtype}")
    if source_lengths.shape != (B,):
        raise ValueError(
            f"{search}: source_lengths must have shape [B] with B = {B} (from source), got "
            f"{list(source_lengths.shape)}"
        )
    return source_lengths.tolist()


def check_lengths(search: str, model: Any, lengths: Lengths) -> None:
    """Raise unless targets of these lengths are possible.

    Raises:
        TypeError: A length is no int.
        ValueError: A length is out of range.
    """
    max_length, min_length = lengths.max_length, lengths.min_length
    capacity: int | None = model.max_length
    for name, value in (("max_length", max_length), ("min_length", min_length)):
        if value is not None and not is_integer(value):
            raise TypeError(f"{search}: {name} must be an int, got {value!r}")
    if min_length < 0:
        raise ValueError(f"{search}: min_length must be at least 0, got {min_length}")
    if capacity is not None and min_length > capacity:
        raise ValueError(
            f"{search}: min_length must be at most {capacity} (the model's max_length), got "
            f"{min_length}"
        )
    if max_length is None:
        return
    if max_length < 1:
        raise ValueError(f"{search}: max_length must be at least 1, got {max_length}")
    if max_length < min_length:
        raise ValueError(
            f"{search}: max_length must be at least min_length = {min_length}, got {max_length}"
        )
    if capacity is not None and max_length > capacity:
        raise ValueError(
            f"{search}: max_length must be at most {capacity} (the model's max_length), got "
            f"{max_length}"
        )
