"""The stage ``validate``: every case against the oracle, and what the timings need compiled."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fused_attn.validation import Comparison, fused_backends, op_cases

from .. import operators
from ..results import Row, dtype_name, identity
from .processes import Failure, Pool, Task, side_by_side
from .session import (
    CASE_SECONDS,
    SIDE_BY_SIDE,
    Outcome,
    Session,
    worker_command,
)
from .timed import operator_tasks

# Processes that prepare benchmark cases: of sixteen cores, what keeps both pools busy for as long.
PREPARING = 6
MEMORY = {"validate": 0.015, "prepare": 0.12}
"""Of the GPU's memory, what a process may have: of an H200's, 2 and 17 GB. A benchmark case that
wants more, or a peer of it, is checked when it is timed, alone on the GPU."""
PREPARE_SECONDS = 120.0
"""A case's peers are compiled with it."""
DEATHS_ALLOWED = 8
"""How many processes a backend may end before it is left out of the rest of its op: each costs
one of many some ten seconds."""


def validation_tasks(session: Session) -> list[Task]:
    """Every op, backend, case and dtype that has no verdict yet; ordinary cases first."""
    done = set()
    for row in session.suite("validate"):
        if not session.retry_failed or row["verdict"] in ("passed", "refused"):
            done.add((row["op"], row["backend"], row["case"], row["dtype"]))
    ranked: list[tuple[tuple[bool, int], Task]] = []
    for op in session.ops:
        for backend in fused_backends(op, session.device):
            cases = [case for case in op_cases(op) if case.kind != "benchmark"]
            if session.quick:
                cases = [case for case in cases if case.kind == "typical"]
            for number, case in enumerate(cases):
                for dtype in case.dtypes[: 1 if session.quick else None]:
                    key = (op, backend, case.name, dtype_name(dtype))
                    if key not in done:
                        task = dict(zip(("op", "backend", "case", "dtype"), key, strict=True))
                        rank = (case.kind != "typical", number)
                        ranked.append((rank, {"kind": "validate", **task}))
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


class Validation:
    """The stage's pools: one for all cases, one for the benchmark cases and what they compile."""

    def __init__(self, session: Session, command: Sequence[str]) -> None:
        self._session = session
        self._command = command
        self._deaths: Counter[tuple[str, str]] = Counter()
        self._seen: set[tuple[Any, ...]] = set()
        self.errors: list[str] = []
        """Why workers did not begin."""

    def work(self, deadline: float) -> int:
        """Do all that has no verdict; how much was left undone."""
        session = self._session
        cores = os.cpu_count() or 2
        preparing = min(PREPARING, max(cores // 2, 1))
        # One task a case and dtype, whatever directions are wanted of it.
        cases = {(t["op"], t["case"], t["dtype"]): t for t in operator_tasks(session)}
        todo = {
            "validate": (validation_tasks(session), max(cores - preparing, 1), CASE_SECONDS),
            "prepare": (
                [{**task, "kind": "prepare", "without": []} for task in cases.values()],
                preparing,
                PREPARE_SECONDS,
            ),
        }

        def serve(kind: str) -> int:
            tasks, count, case_seconds = todo[kind]
            pool = Pool(
                (*self._command, "--memory", str(MEMORY[kind])),
                session.log,
                kind,
                case_seconds,
                on_row=self._add,
                on_failure=self._failed,
                before=self._before,
                environment=SIDE_BY_SIDE,
            )
            left = pool.work(tasks, count, deadline)
            if pool.start_error:
                self.errors.append(pool.start_error)
            return left

        return sum(side_by_side(serve, list(todo)))

    def _add(self, row: Row) -> None:
        self._seen.add(identity(row))
        if row.get("verdict") == "passed" and len(row["comparisons"]) > 1:
            # Of what passed, the comparison that came nearest to its limit.
            row["comparisons"] = [max(row["comparisons"], key=_share)]
        self._session.add(row)

    def _failed(self, task: Task, failure: Failure) -> Task | None:
        if task["kind"] == "prepare":
            return self._prepare_without(task, failure)
        self._deaths[task["op"], task["backend"]] += 1
        row = _verdict(task, self._session.device, failure.error)
        if identity(row) not in self._seen:  # else it has told more itself
            self._session.add(row)
        return None

    def _prepare_without(self, task: Task, failure: Failure) -> Task | None:
        """The task again without the provider that its process has died of."""
        if failure.took_too_long or not failure.at:
            return None  # the cores are busy: the times will tell
        for direction in ("forward", "forward+backward"):
            head = {name: task[name] for name in ("op", "case", "dtype")}
            head |= {"direction": direction, "provider": failure.at}
            self._session.add({"suite": "agreement", **head, "failed": failure.error})
        return {**task, "without": [*task["without"], failure.at]}

    def _before(self, task: Task) -> Task | None:
        deaths = self._deaths[task["op"], task.get("backend", "")]
        if deaths >= DEATHS_ALLOWED:
            why = f"left out, since this backend has ended {deaths} processes"
            self._session.add(_verdict(task, self._session.device, why))
            return None
        return task


def _verdict(task: Task, device: str, error: str) -> Row:
    """Of a case that was not finished."""
    return {
        "suite": "validate",
        **{name: task[name] for name in ("op", "backend", "case", "dtype")},
        "device": device,
        "verdict": "error",
        "comparisons": [],
        "detail": error,
    }


def validate(session: Session, seconds: float) -> Outcome:
    """Check every case, and prepare those that will be timed."""
    validation = Validation(session, worker_command(session.device))
    left = validation.work(time.monotonic() + seconds)
    verdicts = Counter(row["verdict"] for row in session.suite("validate"))
    ours = [row for row in session.suite("agreement") if row["provider"] in operators.OURS]
    wrong = sum("failed" in row for row in ours)
    words = [f"{verdicts[name]} {name}" for name in ("passed", "refused", "failed", "error")]
    words += [f"{len(ours) - wrong} benchmarks right", f"{wrong} wrong", f"{left} left"]
    failed = wrong or verdicts["failed"] or verdicts["error"] or validation.errors
    status = "failed" if failed or not verdicts["passed"] else "timed out" if left else "passed"
    more = {f"cases_{name}": count for name, count in verdicts.items()}
    more |= {"benchmarks_right": len(ours) - wrong, "benchmarks_wrong": wrong, "left": left}
    return Outcome(status, None, ", ".join(words), "\n".join(validation.errors), more)


def _share(values: Mapping[str, Any]) -> float:
    return Comparison(**{name: value for name, value in values.items() if name != "passed"}).share
