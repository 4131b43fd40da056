"""The stage ``operators``: every op beside its peers, alone on the GPU."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fused_attn.ops._cases import Case

from .. import operators
from ..peers import peers_of
from ..results import Row, dtype_name, identity
from .processes import Failure, Pool, Task
from .session import (
    ALL,
    CASE_SECONDS,
    ENVIRONMENT,
    Outcome,
    Session,
    worker_command,
)

_HEAD: tuple[str, ...] = ("op", "case", "dtype", "direction")
_FOUND = ("error", "budget", "unchecked", "failed")
ROUNDS, QUICK_ROUNDS = 15, 5
DEATHS_ALLOWED = 2
"""How many processes a provider may end before it is left out of the rest of its op."""


def operator_tasks(session: Session) -> list[Task]:
    """Every case, dtype and direction that has no times yet, most valuable first."""
    timed, failed = set(), set()
    for row in session.suite("operators"):
        key = tuple(row[name] for name in _HEAD)
        if "p50_ms" in row or row["provider"] == ALL:
            timed.add(key)
        if "failed" in row and row["provider"] in (*operators.OURS, ALL):
            failed.add(key)
    done = timed - failed if session.retry_failed else timed
    ranked: list[tuple[tuple[int, int], Task]] = []
    for op in session.ops:
        cases = operators.benchmark_cases(op, session.device, session.quick)
        for number, case in enumerate(cases):
            for dtype in operators.timed_dtypes(case, session.device):
                rank = (_rank(case, dtype, session.device), number)
                for direction in operators.directions(case):
                    key = (op, case.name, dtype_name(dtype), direction)
                    if key not in done:
                        task = dict(zip(_HEAD, key, strict=True))
                        ranked.append((rank, {"kind": "time", **task}))
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


def _rank(case: Case, dtype: torch.dtype, device: str) -> int:
    """How soon a case is measured: first where others publish figures, in bf16."""
    if device == "cuda" and dtype != torch.bfloat16:
        return 3
    if case.op != "attention":
        return 1
    headline = re.fullmatch(r"(full|causal)_\d+_D128", case.name)
    return 0 if headline else 2


class Timing:
    """The stage's worker, and what is known of those that ended one."""

    def __init__(self, session: Session, command: Sequence[str], rounds: int) -> None:
        self._session = session
        self._rounds = rounds
        self._deaths: Counter[tuple[str, str]] = Counter()
        self._checked = _checked(session.suite("agreement"))
        self._roof_error = ""
        self._seen: set[tuple[Any, ...]] = set()
        self.pool = Pool(
            command,
            session.log,
            "operators",
            CASE_SECONDS,
            on_row=self._add,
            on_failure=self._failed,
            before=self._before,
            environment=ENVIRONMENT,
        )

    def work(self, deadline: float) -> int:
        """Measure all that has no times; how much was left undone."""
        tasks = operator_tasks(self._session)
        if not self._session.suite("roof"):
            tasks.insert(0, {"kind": "roof"})
        # A process does all, since it takes seconds to begin; only its end makes another one.
        left = self.pool.work(tasks, 1, deadline)
        if not self._session.suite("roof"):
            raise RuntimeError(f"no roof was measured\n{self.pool.start_error or self._roof_error}")
        return left

    def _add(self, row: Row) -> None:
        self._seen.add(identity(row))
        self._session.add(row)

    def _before(self, task: Task) -> Task | None:
        if task["kind"] == "roof":
            return task
        if not self._session.suite("roof"):
            return None
        names = [*operators.our_providers(task["op"], self._session.device)]
        names += peers_of(task["op"], self._session.device)
        without = list(task.get("without", ()))
        for name in names:
            deaths = self._deaths[task["op"], name]
            if deaths >= DEATHS_ALLOWED and name not in without:
                why = f"left out, since it has ended {deaths} processes of this op"
                self._session.add(_failed_row(task, name, why))
                without.append(name)
        both = "forward" if task["direction"] == "forward" else "forward+backward"
        checked = (task["op"], task["case"], task["dtype"], both)
        return {
            **task,
            "rounds": self._rounds,
            "roof": self._session.suite("roof")[-1],
            "checked": self._checked.get(checked, {}),
            "without": without,
        }

    def _failed(self, task: Task, failure: Failure) -> Task | None:
        """A row with the error; the case again without whom its process has died of."""
        if task["kind"] == "roof":
            self._roof_error = failure.error
            return None
        name = failure.at
        row = _failed_row(task, name or ALL, failure.error)
        if identity(row) not in self._seen:  # else it has told more itself
            self._session.add(row)
        if not name:
            return None
        self._deaths[task["op"], name] += 1
        return {**task, "without": [*task["without"], name]}


def _checked(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """By op, case, dtype and direction, what was found of each provider; see `operators.check`."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in _HEAD)
        kept: Row = {name: row[name] for name in _FOUND if name in row}
        found.setdefault(key, {})[row["provider"]] = kept
    return found


def _failed_row(task: Task, provider: str, error: str) -> Row:
    head = {name: task[name] for name in _HEAD}
    return {"suite": "operators", **head, "provider": provider, "failed": error}


def time_operators(session: Session, seconds: float) -> Outcome:
    """Time every op beside its peers."""
    rounds = QUICK_ROUNDS if session.quick else ROUNDS
    timing = Timing(session, worker_command(session.device), rounds)
    left = timing.work(time.monotonic() + seconds)
    rows = [row for row in session.suite("operators") if row["provider"] in operators.OURS]
    failed = sum("failed" in row for row in rows)
    timed = sum("p50_ms" in row for row in rows)
    line = f"{timed} times of ours, {failed} failed, {left} cases left"
    status = "failed" if failed or not timed else "timed out" if left else "passed"
    return Outcome(status, None, line, timing.pool.start_error, {"left": left})
