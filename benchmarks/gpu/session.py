"""What the stages share: where rows go, which there are, what is asked for, and how one ends."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fused_attn.validation import OPS

from .. import operators, results
from ..results import Row, identity, last_line, problem
from .processes import Ending, Log, run

# Nothing is fetched, and torch.compile has no processes of its own that would disturb a timing.
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
SIDE_BY_SIDE = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
"""Of processes that share the cores."""
CASE_SECONDS = 75.0
"""The limit of a case, once its process has begun."""
LINE_CHARACTERS = 160
"""Of a row on the screen."""
ALL = "all"
"""The provider of a row that says what befell a case as a whole."""


class Session:
    """What the stages share: where rows go, which there are, and for what they are asked."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        writer: results.Writer,
        log: Log,
        known: Iterable[Row] = (),
    ) -> None:
        """Begin.

        Args:
            arguments: Of the command.
            writer: For the rows.
            log: For all that is printed.
            known: Rows of an earlier run, which are not measured again.
        """
        self.device: str = arguments.device
        self.quick: bool = arguments.quick
        self.ops: list[str] = arguments.op or list(OPS)
        self.retry_failed: bool = arguments.retry_failed
        self.writer, self.log = writer, log
        self.rows: dict[tuple[Any, ...], Row] = {identity(row): row for row in known}
        self._lock = threading.RLock()

    def add(self, row: Row) -> None:
        """Write a row, and a line of it to the screen where it is worth one."""
        with self._lock:
            self.writer.add(row)
            self.rows[identity(row)] = row
            if text := line(row):
                print(f"  {text}", flush=True)

    def suite(self, name: str) -> list[Row]:
        """The rows of a suite so far."""
        return [row for row in self.rows.values() if row["suite"] == name]

    def run(self, command: Sequence[str], seconds: float, label: str, **options: Any) -> Ending:
        """:func:`benchmarks.gpu.processes.run` with our rows, log and environment."""
        options = {"on_row": self.add, "environment": ENVIRONMENT, **options}
        return run(command, seconds, self.log, label, **options)


@dataclass
class Outcome:
    """Of a stage."""

    status: str
    exit_code: int | None = None
    last_line: str = ""
    error: str = ""
    more: Row = field(default_factory=dict)
    """What else its row has."""


def of_ending(ending: Ending) -> Outcome:
    """The outcome of a stage that is one process."""
    return Outcome(ending.status, ending.exit_code, ending.last_line, ending.error)


def worker_command(device: str) -> tuple[str, ...]:
    """Starts a worker."""
    return (sys.executable, "-m", "benchmarks.gpu.worker", "--device", device)


def line(row: Row) -> str:
    """A row for the screen; empty where it is not worth a line."""
    teller = _LINES.get(row["suite"])
    return teller(row)[:LINE_CHARACTERS] if teller else ""


def _stage_line(row: Row) -> str:
    name = " ".join([row["stage"], *([row["label"]] if "label" in row else [])])
    text = f"{name}: {row['status']}"
    return f"{text} in {row['seconds']} s  {row['last_line']}" if "seconds" in row else text


def _validate_line(row: Row) -> str:
    if row["verdict"] in ("passed", "refused"):
        return ""
    case = " ".join(row[name] for name in ("op", "backend", "case", "dtype"))
    return f"{case}: {row['verdict']}, {last_line(row['detail'])}"


def _operators_line(row: Row) -> str:
    ours = row["provider"] in (*operators.OURS, ALL)
    return operators.line(row) if ours or "failed" in row else ""


def _agreement_line(row: Row) -> str:
    if row["provider"] not in operators.OURS or "failed" not in row:
        return ""
    case = " ".join(row[name] for name in ("op", "case", "dtype", "direction", "provider"))
    return f"{case}: {last_line(row['failed'])}"


def _tests_line(row: Row) -> str:
    return f"{row['case']}: {last_line(row['failed'])}" if "failed" in row else ""


def _model_line(row: Row) -> str:
    names = ("suite", "model", "task", "case", "dtype", "provider")
    text = " ".join(str(row[name]) for name in names if name in row)
    if why := problem(row):
        return f"{text}: {why}"
    return f"{text}: {row['p50_ms']:.4g} ms" if "p50_ms" in row else text


_LINES: dict[str, Callable[[Row], str]] = {
    "stage": _stage_line,
    "validate": _validate_line,
    "agreement": _agreement_line,
    "operators": _operators_line,
    "tests": _tests_line,
    "models": _model_line,
    "profile": _model_line,
}
