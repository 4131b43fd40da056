"""Results that nobody measured, for tests of what is made from results."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row, Run
from benchmarks.timing import ratio, summary

MACHINE: Row = {
    "suite": "machine",
    "device": "cpu",
    "name": "Some CPU",
    "cpu": "family 1, model 2",
    "our_instructions": "avx2",
    "threads": 2,
    "python": "3.12.0",
    "torch": "2.13.0",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "changed": False,
    "started": "2026-01-02T03:04:05Z",
    "folder": "some-avx2",
}
ROOF: Row = {
    "suite": "roof",
    "copies": [[1 << 16, 1e-6], [1 << 28, 1e-2]],
    "products": {"float32": 4e11},
}


def machine(**fields: Any) -> Row:
    """The machine of all tests, with other fields."""
    return {**MACHINE, **fields}


def providers(
    case: str,
    seconds: Mapping[str, Sequence[float]],
    op: str = "attention",
    direction: str = "forward",
    floor: float = 0.5e-3,
    **fields: Any,
) -> list[Row]:
    """The rows of a case from the times of its providers' turns, ours first.

    Args:
        case: Its name.
        seconds: By provider, the turns.
        op: Of the rows.
        direction: Of the rows.
        floor: Seconds.
        fields: Of the row of ours besides.
    """
    head = {
        "suite": "operators",
        "op": op,
        "case": case,
        "dtype": "float32",
        "direction": direction,
    }
    ours = next(iter(seconds))
    rows = []
    for name, turns in seconds.items():
        s = summary(turns)
        times = {"p20_ms": s.p20 * 1e3, "p50_ms": s.median * 1e3, "p80_ms": s.p80 * 1e3}
        row: Row = {**head, "provider": name, **times, "rounds": len(turns)}
        if name != ours:
            r = ratio(turns, seconds[ours])
            row["ratio"] = [r.q25, r.median, r.q75]
        if name != "copy":
            row |= {"floor_ms": floor * 1e3, "bound": "memory", "share_of_roof": floor / s.median}
            row |= {"bytes": 2_000_000, "flop": 3_000_000, "peak_bytes": 1_500_000}
        rows.append(row)
    rows[0] |= {"error": 1e-6, "budget": 0.25, **fields}
    return rows


def noisy_run(
    seed: int,
    cases: int,
    turns: int = 15,
    within: float = 0.03,
    between: float = 0.01,
    slow: float = 1.0,
    slow_cases: int = 0,
    speed: float = 1.0,
    peers: Sequence[str] = ("eager", "compile", "copy"),
    **fields: Any,
) -> Run:
    """A run of cases of three milliseconds or ten.

    Args:
        seed: Of the noise.
        cases: How many.
        turns: Of each provider.
        within: Standard deviation of a turn, as a logarithm.
        between: Likewise of a provider's times in this run together.
        slow: How many times as long ours takes in the first ``slow_cases`` cases.
        slow_cases: See there.
        speed: How many times as long everything takes.
        peers: Beside ours.
        fields: Of the machine.
    """
    noise = random.Random(seed)
    rows = []
    for number in range(cases):
        seconds: dict[str, Sequence[float]] = {}
        for name in ("fused_attn", *peers):
            usual = (3e-3 if name == "fused_attn" else 10e-3) * speed
            usual *= slow if name == "fused_attn" and number < slow_cases else 1.0
            usual *= noise.lognormvariate(0.0, between)
            seconds[name] = [usual * noise.lognormvariate(0.0, within) for _ in range(turns)]
        rows += providers(f"case_{number}", seconds)
    return Run(Path(f"run_{seed}.jsonl"), machine(**fields), rows)


def write(path: Path, rows: Sequence[Row]) -> Path:
    """A file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
