"""Options of ``RecurrentAttention``: their check, and how matrices begin."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor, nn

Kind = Literal["additive", "dot", "general", "scaled_dot", "location"]

_NAME = "RecurrentAttention"


def xavier(weight: Tensor, inputs: int, outputs: int) -> None:
    """Draw ``weight`` uniformly, its variance 2 / (inputs + outputs): Glorot and Bengio, 2010."""
    bound = math.sqrt(6.0 / (inputs + outputs))
    nn.init.uniform_(weight, -bound, bound)


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
