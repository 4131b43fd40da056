"""The pytest side of the benchmarks: which rows an op has, and how their times are told.

The providers of a row are measured together, in turns (`benchmarks.operators.measure`); each has a
test, which hands its times to pytest-benchmark, whose tables, storage and comparison then work as
ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn.ops._cases import Case, Direction

from . import operators
from .peers import peers_of
from .results import Row, Writer, dtype_name, last_line, writer
from .roofs import measure_roof, to_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class ReplayedClock:
    """A clock that stands still but for :meth:`advance`.

    pytest-benchmark asks it before and after each round, so it is how a time that was measured
    elsewhere is told.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


CLOCK = ReplayedClock()


def parametrize(op: str) -> pytest.MarkDecorator:
    """Rows (case, dtype, direction, provider) of an op's benchmark on this machine."""
    return pytest.mark.parametrize(("case", "dtype", "direction", "provider"), list(_rows(op)))


def _rows(op: str) -> Iterator[Any]:
    ours = operators.our_providers(op, DEVICE)
    for case in operators.benchmark_cases(op, DEVICE):
        for dtype in operators.timed_dtypes(case, DEVICE):
            label = dtype_name(dtype)
            for direction in operators.directions(case):
                group = f"{op} {case.name} {label} {direction}"
                marks = [pytest.mark.benchmark(timer=CLOCK, group=group)]
                if not operators.is_quick(case, DEVICE):
                    marks.append(pytest.mark.full)
                for provider in (*ours, *peers_of(op, DEVICE)):
                    yield pytest.param(
                        case,
                        dtype,
                        direction,
                        provider,
                        id=f"{case.name}-{label}-{direction}-{provider}",
                        marks=marks,
                    )


@dataclass
class Session:
    """What one run of pytest measures, a row of providers at a time."""

    rounds: int
    out: Path | None
    _writer: Writer | None = None
    _roof: Any = None
    _key: tuple[Any, ...] = ()
    _rows: dict[str, Row] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=dict)
    _notes: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def row(
        self, case: Case, dtype: torch.dtype, direction: Direction, provider: str
    ) -> tuple[Row, list[float]]:
        """A provider's row, and the seconds of its rounds; measured with its neighbours' once."""
        if self._writer is None:
            self._writer = writer(DEVICE, self.out)
            self._roof = measure_roof(DEVICE)
            self._writer.add(to_row(self._roof))
        key = (case.op, case.name, dtype, direction)
        if key != self._key:
            times: dict[str, Any] = {}
            rows = operators.measure(
                case, dtype, direction, DEVICE, self._roof, self.rounds, samples=times
            )
            for row in rows:
                self._writer.add(row)
                self._note(row)
            self._key = key
            self._rows = {row["provider"]: row for row in rows}
            self._seconds = {name: taken.seconds for name, taken in times.items()}
        return self._rows[provider], self._seconds.get(provider, [])

    def _note(self, row: Row) -> None:
        for kind in ("absent", "failed", "unchecked"):
            if kind in row:
                note = (kind, row["provider"], last_line(row[kind]))
                self._notes[note] = self._notes.get(note, 0) + 1

    def notes(self) -> Iterator[str]:
        """Who was absent, failed or could not be checked, and why: each reason once."""
        for (kind, provider, reason), times in sorted(self._notes.items()):
            yield f"{kind}: {provider} ({times} row{'s' if times > 1 else ''}): {reason}"

    def close(self) -> Path | None:
        """Close the file of results, which is returned."""
        if self._writer is None:
            return None
        self._writer.close()
        return self._writer.path
