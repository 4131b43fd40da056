"""What ``RecurrentAttention`` takes, and refuses."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ._attention_state import AttentionMemory, AttentionState

Kind = Literal["additive", "dot", "general", "scaled_dot", "location"]

_NAME = "RecurrentAttention"


def check_options(
    kind: str,
    query_size: int,
    memory_size: int,
    attention_size: int,
    num_heads: int,
    location_filters: int,
    location_width: int,
    coverage: bool,
    monotonic_noise: float,
) -> None:
    """Raise ValueError unless the arguments of the constructor go together."""
    kinds = get_args(Kind)
    if kind not in kinds:
        raise ValueError(f"{_NAME}: kind must be one of {', '.join(kinds)}, got {kind!r}")
    sizes = {
        "query_size": query_size,
        "memory_size": memory_size,
        "attention_size": attention_size,
        "num_heads": num_heads,
        "location_filters": location_filters,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{_NAME}: {name} must be positive, got {size}")
    if location_width < 1 or location_width % 2 == 0:
        raise ValueError(f"{_NAME}: location_width must be odd, got {location_width}")
    if kind == "dot" and query_size != memory_size:
        raise ValueError(
            f"{_NAME}: query_size must be memory_size = {memory_size} where kind is 'dot', got "
            f"{query_size}"
        )
    if memory_size % num_heads != 0:
        raise ValueError(
            f"{_NAME}: memory_size must be a multiple of num_heads = {num_heads}, got {memory_size}"
        )
    if kind not in ("dot", "general") and attention_size % num_heads != 0:
        raise ValueError(
            f"{_NAME}: attention_size must be a multiple of num_heads = {num_heads}, got "
            f"{attention_size}"
        )
    if coverage and kind not in ("additive", "location"):
        raise ValueError(
            f"{_NAME}: coverage is a feature of the kinds 'additive' and 'location', got {kind!r}"
        )
    if monotonic_noise < 0.0:
        raise ValueError(f"{_NAME}: monotonic_noise must not be negative, got {monotonic_noise}")


def check_memory(memory: Tensor, lengths: Tensor | None, memory_size: int) -> None:
    """Raise unless these are sources ``[B, S, M]`` and their lengths."""
    if memory.dim() != 3 or memory.size(2) != memory_size:
        raise ValueError(
            f"{_NAME}: memory must have shape [B, S, M] with M = {memory_size}, got "
            f"{list(memory.shape)}"
        )
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        dtype = str(lengths.dtype).removeprefix("torch.")
        raise TypeError(f"{_NAME}: lengths must have dtype int32 or int64, got {dtype}")
    if tuple(lengths.shape) != (memory.size(0),):
        raise ValueError(
            f"{_NAME}: lengths must have shape [B] = {[memory.size(0)]}, got {list(lengths.shape)}"
        )
    # On a GPU reading them would wait for the device.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and len(lengths) > 0:
        least, most = (int(x) for x in lengths.aminmax())
        if least < 0 or most > memory.size(1):
            raise ValueError(
                f"{_NAME}: lengths must lie within 0 and {memory.size(1)}, got "
                f"{least if least < 0 else most}"
            )


def check_query(query: Tensor, memory: AttentionMemory, query_size: int) -> None:
    """Raise ValueError unless these are queries ``[B, T, Q]`` of the sources."""
    B = memory.value.size(0)
    if query.dim() != 3 or query.size(0) != B or query.size(2) != query_size:
        raise ValueError(
            f"{_NAME}: query must have shape [B, T, Q] with B = {B} (from memory) and "
            f"Q = {query_size}, got {list(query.shape)}"
        )


def check_state(
    state: AttentionState, memory: AttentionMemory, targets: int, needed: tuple[str, ...]
) -> None:
    """Raise ValueError unless the state has what is needed, of as many targets a source."""
    B, H, S, _ = memory.value.shape
    shape = (B, targets, H, S)
    for name in needed:
        tensor = getattr(state, name)
        if tensor is None or tuple(tensor.shape) != shape:
            got = None if tensor is None else list(tensor.shape)
            raise ValueError(
                f"{_NAME}: state.{name} must have shape [B, K, H, S] = {list(shape)}, got {got}"
            )
