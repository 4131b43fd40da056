"""``python -m benchmarks.exponents [FILE]``: how fast time and memory grow, beside the model.

Where y = c xᵃ, log y is a straight line over log x, and a its slope: fitted by least squares to
the upper half of a sweep (`benchmarks.scaling`), where what a call costs by itself is small. The
model's exponent is that of its floors at the same sizes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .operators import OURS
from .results import Row, newest, read


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of log value over log size; None where a value is 0 or there is one size.

    Args:
        sizes: Above 0.
        values: One a size.
    """
    if len(sizes) < 2 or min(values) <= 0.0:
        return None
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    middle, height = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spread


def upper_half(rows: Sequence[Row]) -> list[Row]:
    """Of the sizes that were measured the larger ones, the one in the middle too; at least 2."""
    measured = sorted((row for row in rows if "p50_ms" in row), key=lambda row: row["value"])
    return measured[-max(2, math.ceil(len(measured) / 2)) :]


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: a line a sweep, exponents of ours, of the others and of the model.

    Args:
        rows: Of the suite ``scaling``.
    """
    lines = [
        "| op | over | direction | time: ours | others | model | ours / floor | memory: ours | "
        "others | model |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    sweeps: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "dimension", "dtype", "direction"))
        sweeps.setdefault(key, {}).setdefault(row["provider"], []).append(row)
    for (op, dimension, _, direction), providers in sweeps.items():
        upper = {name: upper_half(some) for name, some in providers.items()}
        upper = {name: some for name, some in upper.items() if len(some) > 1}
        for name in [name for name in upper if name in OURS]:
            ours = upper[name]
            others = {other: some for other, some in upper.items() if other not in OURS}
            last = ours[-1]
            called = "" if name == "fused_attn" else f" ({name})"
            cells = [
                f"{op}{called}",
                dimension,
                direction,
                _slope(ours, "p50_ms"),
                _slopes(others, "p50_ms"),
                _slope(ours, "floor_ms"),
                f"{last['p50_ms'] / last['floor_ms']:.1f}",
                _slope(ours, "peak_bytes"),
                _slopes(others, "peak_bytes"),
                _slope(ours, "held_bytes"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _slopes(others: dict[str, list[Row]], what: str) -> str:
    return ", ".join(f"{name} {_slope(some, what)}" for name, some in others.items()) or "–"


def _slope(rows: Sequence[Row], what: str) -> str:
    given = [row[what] or 0.0 for row in rows]
    found = exponent([row["value"] for row in rows], given)
    # + 0.0 makes a zero of a negative one.
    return "–" if found is None else f"{round(found, 2) + 0.0:.2f}"


def _newest() -> Iterator[Path]:
    """The newest file of each device that has a sweep."""
    for runs in newest().values():
        yield from [run.path for run in runs if run.suite("scaling")][:1]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a file, or of the newest of each device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", help="default: the newest of each device")
    arguments = parser.parse_args(argv)
    for path in [arguments.file] if arguments.file else _newest():
        print(f"{path}\n")
        print("\n".join(table(read(path).suite("scaling"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
