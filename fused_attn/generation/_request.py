"""Checks and defaults that every search shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PROTOCOL = ("bos_token", "eos_token", "max_length", "start", "step", "reorder")


@dataclass(frozen=True)
class Request:
    """A checked call: what to decode and for how many steps."""

    source: Tensor
    """``[B, S]``, S the longest source's length."""
    source_lengths: Tensor
    """``[B]`` int64."""
    limits: list[int]
    """Most steps of each sentence. They depend on that sentence alone."""
    bos_token: int
    eos_token: int


def check_request(
    search: str,
    model: Any,
    source: Tensor,
    source_lengths: Tensor | None,
    max_length: int | None,
    min_length: int,
) -> Request:
    """The call with its defaults filled in; reads the lengths back from the device once.

    Raises:
        TypeError: ``model`` is no decoder, or an argument is of a wrong type.
        ValueError: A shape or a number is out of range.
    """
    for name in _PROTOCOL:
        if not hasattr(model, name):
            raise TypeError(f"{search}: model must have {name}, got {type(model).__name__}")
    for name in ("bos_token", "eos_token"):
        if not is_integer(getattr(model, name)):
            raise TypeError(
                f"{search}: the model's {name} must be an int, got {getattr(model, name)!r}"
            )
    if not isinstance(source, Tensor):
        raise TypeError(f"{search}: source must be a tensor, got {type(source).__name__}")
    if source.dim() < 2:
        raise ValueError(f"{search}: source must have shape [B, S], got {list(source.shape)}")
    B, S = source.shape[:2]
    lengths = [S] * B
    if source_lengths is not None:
        lengths = _read_lengths(search, source_lengths, B)
    for i, length in enumerate(lengths):
        if not 1 <= length <= S:
            raise ValueError(
                f"{search}: every source must have 1..{S} tokens (S from source), got {length} "
                f"for sentence {i}"
            )
    capacity: int | None = model.max_length
    longest = max(lengths, default=0)
    if capacity is not None and longest > capacity:
        raise ValueError(
            f"{search}: every source must have at most {capacity} tokens (the model's "
            f"max_length), got {longest} for sentence {lengths.index(longest)}"
        )
    limits = _limits(search, lengths, max_length, min_length, capacity)
    return Request(
        # Columns that are padding in every sentence would only cost time.
        source=source[:, :longest],
        source_lengths=torch.tensor(lengths, dtype=torch.int64, device=source.device),
        limits=limits,
        bos_token=model.bos_token,
        eos_token=model.eos_token,
    )


def check_logits(search: str, logits: object, B: int, K: int, eos_token: int) -> None:
    """Raise unless a model's step returned ``[B, K, V]`` with the end token in the vocabulary."""
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
    if K > V:
        raise ValueError(
            f"{search}: beam_size must be at most V = {V} (from the model's logits), got {K}"
        )


def is_integer(value: object) -> bool:
    """An int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


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


def _limits(
    search: str, lengths: list[int], max_length: int | None, min_length: int, capacity: int | None
) -> list[int]:
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
        wanted = [max(2 * length + 10, min_length + 1) for length in lengths]
        return wanted if capacity is None else [min(limit, capacity) for limit in wanted]
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
    return [max_length] * len(lengths)
