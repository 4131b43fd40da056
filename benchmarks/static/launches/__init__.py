"""The calls that are compiled, a module an op: ``launch`` and ``CALLS``.

``launch`` runs the op's own launchers on tensors without memory, so signatures, specialisation and
launch parameters are theirs. ``CALLS`` are arguments for it: each kind of element, table entry and
way through a launcher that makes another kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch

from ..targets import TRITON_TARGETS

QUICK_TARGETS = ("sm_90", "gfx942")


class Call(NamedTuple):
    """A call of an op's launcher."""

    arguments: dict[str, Any]
    is_quick: bool
    """It is among the few that the tests compile."""
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        """Short, and different for each call of an op: ``bfloat16 head_size=64 causal``."""
        words = []
        for name, value in self.arguments.items():
            if value is True:
                words.append(name)
            else:
                words.append(value if isinstance(value, str) else f"{name}={value}")
        return " ".join(words)


def quick(dtype: str, /, targets: tuple[str, ...] = TRITON_TARGETS, **arguments: Any) -> Call:
    """A call that the tests compile too."""
    return Call({"dtype": dtype, **arguments}, True, targets)


def call(dtype: str, /, targets: tuple[str, ...] = TRITON_TARGETS, **arguments: Any) -> Call:
    """A call of the whole table alone."""
    return Call({"dtype": dtype, **arguments}, False, targets)


def calls(op: str, target: str, is_quick: bool) -> list[Call]:
    """What is compiled of an op for a target."""
    found: tuple[Call, ...] = import_module(f"{__name__}.{op}").CALLS
    return [c for c in found if target in c.targets and (c.is_quick or not is_quick)]


def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=kind, device="meta")
