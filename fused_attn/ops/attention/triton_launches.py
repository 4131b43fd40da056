"""How large the tiles of the Triton kernels are, and how they run, for each architecture.

Chosen by compiling ahead of time: no spilled registers, no more shared memory than there is. Not
measured: no entry has run on a GPU. ``python -m benchmarks.tune_attention`` measures the
candidates on one and prints the table anew.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """How a kernel runs."""

    BLOCK_M: int
    """Queries of a tile."""
    BLOCK_N: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    DESCRIPTORS: bool = False
    """Tiles come through tensor descriptors (TMA) where alignment allows."""
    SPECIALIZE: bool = False
    """Warps divide into those that load and those that compute (with descriptors alone)."""
    registers: int = 0
    """Of a thread at most; 0: as the assembler likes."""


class Choice(NamedTuple):
    """What an entry is for."""

    architecture: str
    """``sm_80``, ``sm_90``, ``sm_100``, ``gfx942`` or ``interpreter``."""
    kernel: str
    """``forward``, ``query_gradient``, ``key_gradient`` or ``bias_gradient``."""
    itemsize: int
    """Bytes of an element: 2 or 4."""
    head_size: int
    """At most: 64, 128 or 256."""
    is_plain: bool
    """Nothing but lengths, causality and windows: no bias, mask, dropout, softcap, and so on."""


def launch_for(
    architecture: str, kernel: str, itemsize: int, head_size: int, is_plain: bool
) -> Launch:
    """The launch for a kernel, from the table's row of the nearest architecture."""
    return LAUNCHES[
        Choice(_nearest(architecture), kernel, itemsize, _head_class(kernel, head_size), is_plain)
    ]


def _nearest(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx942"
    if architecture.startswith("sm_"):
        major = int(architecture.removeprefix("sm_")) // 10
        # Consumer parts of sm_120 have the shared memory, and the instructions, of sm_80's.
        return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
    return architecture


def _head_class(kernel: str, head_size: int) -> int:
    return next(size for size in (64, 128, 256) if head_size <= size)


class _Any(dict):
    def __missing__(self, key):
        if key.kernel == "bias_gradient":
            return Launch(64, 64, 4, 1)
        return Launch(128, 128 if key.kernel != "key_gradient" else 128, 4, 2, True)


LAUNCHES = _Any()
