"""Rows of results that belong together: the providers of one case, measured in turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .operators import OURS
from .results import IDENTITY, Row, Run

YARDSTICKS = ("copy", "sum", "cross_entropy")
"""Providers that do less than a case asks for: what its data alone take, and no peers."""
TIMED = ("operators", "models", "scaling")
"""Suites whose rows are times of providers."""


def is_ours(provider: str) -> bool:
    """Whether a provider is this library."""
    return provider in OURS or provider.startswith("fused_attn")


@dataclass(frozen=True)
class Comparison:
    """The rows of one case, by provider, absent and failed ones too."""

    what: Row
    """What identifies it: suite, op or model, case, dtype and so on."""
    rows: dict[str, Row]

    @property
    def name(self) -> str:
        """In words, e.g. ``attention causal_512 float32 forward``."""
        return " ".join(str(value) for key, value in self.what.items() if key != "suite")

    @property
    def timed(self) -> dict[str, Row]:
        """Those with a time."""
        return {name: row for name, row in self.rows.items() if "p50_ms" in row}

    @property
    def ours(self) -> dict[str, Row]:
        """Ours with a time; the first is the one that ratios are to."""
        return {name: row for name, row in self.timed.items() if is_ours(name)}

    @property
    def first(self) -> Row | None:
        """The one of ours that ratios are to."""
        return next(iter(self.ours.values()), None)

    @property
    def peers(self) -> dict[str, Row]:
        """Others with a time that do what the case asks for."""
        known = self.timed.items()
        return {name: r for name, r in known if not is_ours(name) and name not in YARDSTICKS}

    @property
    def fastest(self) -> Row | None:
        """Of ours."""
        return min(self.ours.values(), key=lambda row: row["p50_ms"], default=None)

    @property
    def best_peer(self) -> Row | None:
        """The fastest of the peers."""
        return min(self.peers.values(), key=lambda row: row["p50_ms"], default=None)


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Rows of :data:`TIMED` suites by case, in the order in which the cases came."""
    found: dict[tuple[Any, ...], Comparison] = {}
    for row in rows:
        if row["suite"] not in TIMED:
            continue
        names = (name for name in IDENTITY if name != "provider" and row.get(name) is not None)
        what = {name: row[name] for name in names}
        one = found.setdefault(tuple(what.items()), Comparison(what, {}))
        one.rows[row["provider"]] = row
    return list(found.values())


def newest_rows(runs: Sequence[Run], suite: str, **wanted: str) -> tuple[Run, list[Row]] | None:
    """Of a device's runs, the newest that has rows of a suite, and these.

    Args:
        runs: The newest first.
        suite: Of the rows.
        wanted: What else a row must have, e.g. ``op="attention"``.
    """
    for run in runs:
        rows = [r for r in run.suite(suite) if all(r.get(k) == v for k, v in wanted.items())]
        if rows:
            return run, rows
    return None
