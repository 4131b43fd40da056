"""How large the tiles of the Triton kernels are, and how they run, for each architecture.

Chosen by compiling ahead of time: as large as they can be without spilled registers and within
shared memory. Not measured: no entry has run on a GPU. None divides the work among warps
(``specialize``), which compiles, until a GPU has shown what it gives.
``python -m benchmarks.tune_attention`` measures candidates on one and prints its rows of the table
anew.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PLAIN, MASKED, HEAVY = range(3)
"""What a tile of pairs costs in registers beside the products: nothing but lengths, causality and
windows; a mask, bias, block mask or ALiBi too; dropout, a softcap or another activation too."""


class Launch(NamedTuple):
    """How a kernel runs."""

    BLOCK_M: int
    """Queries of a tile."""
    BLOCK_N: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    DESCRIPTORS: bool = False
    """Tiles come through tensor descriptors (TMA); the next launch is for rows not aligned."""
    SPECIALIZE: bool = False
    """Warps divide into those that load and those that compute; with descriptors alone."""
    registers: int = 0
    """Of a thread at most; 0: as the assembler likes."""


HEAD_SIZES = (64, 128, 256)

# For each architecture, kernel and bytes of an element: a row for heads up to each of HEAD_SIZES,
# with a column each for plain, masked and heavy calls. "128x64 8w 2s": 128 queries, 64 keys, 8
# warps, 2 stages; "255r": registers.
_TABLE: dict[tuple[str, str, int], tuple[tuple[str, str, str], ...]] = {
    ("sm_90", "forward", 2): (
        ("128x128 8w 2s tma | 128x128 8w 2s", "128x64 8w 2s", "128x32 8w 1s"),
        ("128x128 8w 2s tma | 128x128 8w 2s", "128x64 8w 2s", "128x32 8w 1s"),
        ("64x32 4w 1s", "64x32 8w 1s", "64x16 8w 1s"),
    ),
    ("sm_90", "query_gradient", 2): (
        ("128x64 8w 2s tma | 128x64 8w 2s", "64x64 8w 2s", "64x16 8w 1s"),
        ("128x64 8w 2s tma | 64x64 8w 1s", "64x64 8w 1s", "64x16 4w 1s 255r"),
        ("64x64 8w 1s", "64x32 8w 1s", "32x16 8w 1s 255r"),
    ),
    ("sm_90", "key_gradient", 2): (
        ("64x128 8w 2s tma | 64x128 8w 2s", "64x128 8w 2s", "16x64 8w 2s"),
        ("32x128 8w 2s", "32x64 8w 1s", "16x64 8w 2s"),
        ("16x64 8w 1s", "16x64 8w 1s", "16x32 8w 1s"),
    ),
    ("sm_80", "forward", 2): (
        ("128x64 4w 2s", "128x64 8w 2s", "128x64 8w 2s"),
        ("128x64 8w 2s", "128x32 8w 2s", "128x32 8w 2s"),
        ("64x32 8w 1s", "64x32 8w 1s", "64x16 8w 1s"),
    ),
    ("sm_80", "query_gradient", 2): (
        ("128x64 8w 2s", "64x32 4w 2s", "64x32 4w 2s"),
        ("64x64 8w 2s", "64x32 8w 1s", "64x32 8w 1s"),
        ("32x32 8w 1s", "32x32 8w 1s", "32x32 8w 1s"),
    ),
    ("sm_80", "key_gradient", 2): (
        ("32x128 8w 2s", "32x64 8w 2s", "16x64 8w 1s"),
        ("32x64 8w 1s", "32x64 8w 1s", "16x32 8w 1s 255r"),
        ("16x32 8w 1s", "16x32 8w 1s", "16x32 8w 1s"),
    ),
    ("sm_100", "forward", 2): (
        ("128x128 8w 2s", "128x64 8w 2s", "128x64 8w 2s"),
        ("128x64 8w 2s", "64x64 4w 1s", "64x64 4w 1s"),
        ("64x32 4w 1s", "64x32 4w 1s", "64x16 4w 1s"),
    ),
    ("sm_100", "query_gradient", 2): (
        ("128x64 8w 2s", "64x64 8w 1s", "64x64 8w 1s"),
        ("64x64 8w 1s", "64x64 8w 1s", "64x64 8w 1s"),
        ("64x32 8w 1s", "64x32 8w 1s", "64x32 8w 1s"),
    ),
    ("sm_100", "key_gradient", 2): (
        ("32x128 8w 2s", "32x64 8w 2s", "32x64 8w 1s 255r"),
        ("32x64 8w 1s 255r", "32x64 8w 1s 255r", "16x64 8w 1s"),
        ("16x32 8w 1s", "16x32 8w 1s", "16x32 8w 1s"),
    ),
    ("gfx942", "forward", 2): (
        ("128x64 4w 1s", "128x64 4w 1s", "128x64 4w 1s"),
        ("128x64 4w 1s", "128x64 4w 1s", "128x64 4w 1s"),
        ("64x64 4w 1s", "64x64 4w 1s", "64x64 4w 1s"),
    ),
    ("gfx942", "query_gradient", 2): (
        ("128x64 8w 1s", "64x64 4w 1s", "64x64 4w 1s"),
        ("64x64 4w 1s", "64x64 4w 1s", "64x64 4w 1s"),
        ("64x64 4w 1s", "64x32 4w 1s", "64x32 4w 1s"),
    ),
    ("gfx942", "key_gradient", 2): (
        ("64x128 8w 1s", "64x64 4w 1s", "64x64 4w 1s"),
        ("64x64 4w 1s", "32x64 4w 1s", "32x64 4w 1s"),
        ("32x64 4w 1s", "32x32 4w 1s", "32x32 4w 1s"),
    ),
    ("sm_90", "forward", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 8w 1s 255r"),
    ),
    ("sm_90", "query_gradient", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 8w 2s 255r", "16x16 8w 2s 255r", "16x16 8w 2s 255r"),
    ),
    ("sm_90", "key_gradient", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 8w 1s 255r", "16x16 8w 1s 255r"),
    ),
    ("sm_90", "bias_gradient", 2): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "32x32 8w 1s"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
    ),
    ("sm_90", "bias_gradient", 4): (
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 8w 1s", "16x16 8w 1s", "16x16 8w 1s"),
        ("16x16 8w 1s 255r", "16x16 8w 1s 255r", "16x16 8w 1s"),
    ),
    ("sm_80", "forward", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 4w 1s 255r"),
    ),
    ("sm_80", "query_gradient", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 8w 2s 255r", "16x16 8w 2s 255r", "16x16 8w 2s 255r"),
    ),
    ("sm_80", "key_gradient", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 8w 1s 255r", "16x16 8w 1s 255r", "16x16 8w 1s 255r"),
    ),
    ("sm_80", "bias_gradient", 2): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "32x32 8w 1s"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
    ),
    ("sm_80", "bias_gradient", 4): (
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s"),
        ("16x16 8w 1s", "16x16 8w 1s", "16x16 8w 1s"),
        ("16x16 8w 1s 255r", "16x16 8w 1s 255r", "16x16 8w 1s 255r"),
    ),
    ("sm_100", "forward", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 8w 1s 255r"),
    ),
    ("sm_100", "query_gradient", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 8w 2s 255r", "16x16 8w 2s 255r", "16x16 8w 2s 255r"),
    ),
    ("sm_100", "key_gradient", 4): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 8w 1s 255r", "16x16 8w 1s 255r", "16x16 8w 1s 255r"),
    ),
    ("sm_100", "bias_gradient", 2): (
        ("32x32 8w 1s 255r", "32x32 8w 1s 255r", "32x32 8w 1s 255r"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "32x32 8w 1s"),
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
    ),
    ("sm_100", "bias_gradient", 4): (
        ("16x32 8w 1s 255r", "16x32 8w 1s 255r", "16x32 8w 1s 255r"),
        ("16x16 8w 1s", "16x16 8w 1s", "16x16 8w 1s"),
        ("16x16 8w 1s 255r", "16x16 8w 1s 255r", "16x16 8w 1s"),
    ),
    ("gfx942", "forward", 4): (
        ("32x32 4w 1s 255r", "32x32 4w 1s 255r", "32x32 4w 1s 255r"),
        ("32x16 4w 1s 255r", "32x16 4w 1s 255r", "32x16 4w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 4w 1s 255r"),
    ),
    ("gfx942", "query_gradient", 4): (
        ("32x32 4w 1s 255r", "32x32 4w 1s 255r", "32x32 4w 1s 255r"),
        ("32x16 4w 1s 255r", "32x16 4w 1s 255r", "32x16 4w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 4w 1s 255r"),
    ),
    ("gfx942", "key_gradient", 4): (
        ("32x32 4w 1s 255r", "32x32 4w 1s 255r", "32x32 4w 1s 255r"),
        ("16x32 4w 1s 255r", "16x32 4w 1s 255r", "16x32 4w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 4w 1s 255r"),
    ),
    ("gfx942", "bias_gradient", 2): (
        ("32x32 4w 1s 255r", "32x32 4w 1s 255r", "32x32 4w 1s 255r"),
        ("32x32 4w 1s 255r", "32x32 4w 1s 255r", "32x32 4w 1s 255r"),
        ("32x32 4w 1s 255r", "32x32 4w 1s 255r", "32x32 4w 1s 255r"),
    ),
    ("gfx942", "bias_gradient", 4): (
        ("32x32 4w 1s 255r", "32x32 4w 1s 255r", "32x32 4w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 4w 1s 255r"),
        ("16x16 4w 1s 255r", "16x16 4w 1s 255r", "16x16 4w 1s 255r"),
    ),
}

# Large tiles: the interpreter takes its time for every operation, whatever its size.
_INTERPRETED = (Launch(128, 128, 4, 1, True), Launch(128, 128, 4, 1))


def launches_for(
    architecture: str, kernel: str, itemsize: int, head_size: int, load: int
) -> tuple[Launch, ...]:
    """The launches for a kernel, best first; the last one needs no descriptors."""
    if architecture == "interpreter":
        return _INTERPRETED
    rows = _TABLE[_nearest(architecture), kernel, itemsize]
    row = next(i for i, size in enumerate(HEAD_SIZES) if head_size <= size)
    return tuple(_parsed(text) for text in rows[row][load].split(" | "))


def _parsed(text: str) -> Launch:
    match = re.fullmatch(r"(\d+)x(\d+) (\d+)w (\d+)s( tma)?( specialize)?(?: (\d+)r)?", text)
    assert match is not None, text
    m, n, warps, stages, tma, specialize, registers = match.groups()
    return Launch(
        int(m),
        int(n),
        int(warps),
        int(stages),
        tma is not None,
        specialize is not None,
        int(registers or 0),
    )


def _nearest(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx942"
    major = int(architecture.removeprefix("sm_")) // 10
    # Others than the two are served by what sm_80 has: 99 KB of shared memory are enough.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
