"""The stages, their shares of the time, and their order."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from fused_attn.validation import fused_backends, op_cases

from .. import results
from ..results import ROOT, Row, dtype_name
from .building import build
from .processes import Ending, Task, side_by_side, tail
from .session import SIDE_BY_SIDE, Outcome, Session, of_ending, worker_command
from .timed import time_operators
from .validating import validate

SECONDS = {
    "build": 140.0,
    "validate": 140.0,
    "operators": 130.0,
    "models": 60.0,
    "profile": 40.0,
    "tests": 40.0,
    "sanitizer": 20.0,
}
"""What is planned for a stage, in order; where fewer run, each has more in proportion."""
TOTAL_SECONDS = sum(SECONDS.values())
STAGES = tuple(SECONDS)
SIDE_BY_SIDE_STAGES = ("tests", "sanitizer")
"""These time nothing, and leave each other enough of the machine: they have their time together."""
SANITIZERS = ("memcheck", "racecheck")
# What a module ends with where it began some case no more, for want of time.
_LEFT_OUT = 3
# Files outside these folders may need packages (sacreBLEU) that a borrowed machine lacks, and have
# no test that needs a GPU.
GPU_TESTS = (
    "tests/ops",
    "tests/nn",
    "tests/models/test_generation.py",
    "tests/models/test_rnn_gpu.py",
    "tests/cuda_host/test_hopper.py",
    "tests/benchmarks",
)
# Where there is no GPU: that the stage itself works. `make test` runs them all.
REHEARSED_TESTS = ("tests/ops/test_philox.py",)


def models(session: Session, seconds: float) -> Outcome:
    """Whole models beside their peers."""
    command = _module(session, "benchmarks.models", seconds)
    if session.suite("models") and not session.retry_failed:
        command += ("--known", str(session.writer.path.resolve()))
    return _of_module(session, "models", session.run(command, seconds, "models"))


def profile(session: Session, seconds: float) -> Outcome:
    """Traces, and the counters of the kernel that is slowest beside its roof."""
    command = _module(session, "benchmarks.profile", seconds)
    folder = session.writer.path.parent / "profile"
    command += ("--results", str(session.writer.path.resolve()), "--out", str(folder.resolve()))
    return _of_module(session, "profile", session.run(command, seconds, "profile"))


def _of_module(session: Session, suite: str, ending: Ending) -> Outcome:
    outcome = of_ending(ending)
    # Its last line is of whatever library spoke last.
    rows = session.suite(suite)
    failed, absent = (sum(problem in row for row in rows) for problem in ("failed", "absent"))
    outcome.last_line = f"{len(rows)} rows, {failed} failed, {absent} absent"
    if ending.exit_code == _LEFT_OUT:
        outcome.status = "timed out"
    return outcome


def _module(session: Session, module: str, seconds: float) -> tuple[str, ...]:
    """The command of a module that keeps to a time, with some left for its last case."""
    return (
        *(sys.executable, "-m", module, "--device", session.device, "--json"),
        *("--seconds", f"{0.8 * seconds:.0f}", *(["--quick"] if session.quick else [])),
    )


def tests(session: Session, seconds: float) -> Outcome:
    """Pytest, without what needs no GPU and what ``validate`` has done."""
    # The options of pyproject.toml are for plugins that a borrowed machine may lack.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=short"]
    command += ["--strict-markers", "--continue-on-collection-errors"]
    command += ["-p", "benchmarks.gpu.pytest_rows"]
    if importlib.util.find_spec("xdist") is not None:
        workers = max((os.cpu_count() or 2) - 2, 1) if session.device == "cuda" else 1
        command += ["-n", str(workers), "--dist", "worksteal"]
    environment = SIDE_BY_SIDE
    if session.device == "cuda":
        command += ["-m", "gpu", "-k", "not test_matches_the_oracle", *GPU_TESTS]
    else:
        command += ["-m", "not gpu and not slow", *REHEARSED_TESTS]
        # Else CUDA kernels would first be compiled for the host.
        environment = {**environment, "FUSED_ATTN_CUDA_HOST": ""}
    return of_ending(session.run(command, seconds, "tests", environment=environment))


def sanitizer(session: Session, seconds: float) -> Outcome:
    """A small case of each op under compute-sanitizer, both tools side by side."""
    tool = shutil.which("compute-sanitizer")
    if session.device != "cuda" or tool is None:
        why = "needs a CUDA GPU" if session.device != "cuda" else "compute-sanitizer is not here"
        return Outcome("absent", None, why)
    # An allocation a tensor: memcheck knows no bounds within a block that the allocator keeps.
    environment = {**SIDE_BY_SIDE, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watch(name: str) -> Ending:
        tasks = json.dumps(sanitized(session.ops, name))
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        if name == "memcheck":
            # Calls that fail and are expected to: PyTorch asks drivers for what they lack.
            command += ["--report-api-errors", "no"]
        command += worker_command("cuda")
        command += ["--tasks", tasks]
        return session.run(command, seconds, name, environment=environment)

    endings = side_by_side(watch, SANITIZERS)
    for name, ending in zip(SANITIZERS, endings, strict=True):
        row: Row = {"suite": "stage", "stage": "sanitizer", "label": name, "status": ending.status}
        row |= {"exit_code": ending.exit_code, "seconds": round(ending.seconds, 1)}
        row |= {"last_line": ending.last_line}
        session.add(row | ({"error": ending.error} if ending.error else {}))
    worst = max(endings, key=lambda e: ("passed", "timed out", "failed").index(e.status))
    return Outcome(worst.status, worst.exit_code, worst.last_line, worst.error)


def sanitized(ops: Sequence[str], tool: str) -> list[Task]:
    """What a tool watches: of each op's backends the first ordinary case, hand-written ones first.

    Races are looked for in the CUDA kernels alone, whose barriers are written by hand.
    """
    tasks = []
    for backend in ("cuda", "triton") if tool == "memcheck" else ("cuda",):
        for op in ops:
            if backend in fused_backends(op, "cuda"):
                case = next(case for case in op_cases(op) if case.kind == "typical")
                dtype = dtype_name(case.dtypes[-1])
                task = {"op": op, "backend": backend, "case": case.name, "dtype": dtype}
                tasks.append({"kind": "run", **task})
    return tasks


RUN: dict[str, Callable[[Session, float], Outcome]] = {
    "build": build,
    "validate": validate,
    "operators": time_operators,
    "models": models,
    "profile": profile,
    "tests": tests,
    "sanitizer": sanitizer,
}


def run_stages(session: Session, names: Sequence[str], seconds: float) -> int:
    """Run stages in order, whatever becomes of each.

    Returns:
        The number of those that did not pass.
    """
    passed = {
        row["stage"]
        for row in session.suite("stage")
        if row["status"] == "passed" and "label" not in row
    }
    # These leave out what they have rows of; the earlier run may have been asked for less.
    passed -= {"validate", "operators"}
    # A fresh machine has no extension, whatever an earlier one had.
    if not list((ROOT / "fused_attn").glob("_C*.so")):
        passed.discard("build")
    todo = [name for name in names if name not in passed]
    for name in names:
        if name not in todo:
            print(f"{name}: passed before", flush=True)
    scale = seconds / max(sum(SECONDS[name] for name in todo), 1.0)
    end = time.monotonic()
    failures = 0
    for group in _groups(todo):
        end += scale * sum(SECONDS[name] for name in group)
        limit = end - time.monotonic()
        if limit < 1:
            for name in group:
                session.add({"suite": "stage", "stage": name, "status": "no time left"})
            failures += len(group)
            continue
        print(f"{', '.join(group)}: at most {limit:.0f} s", flush=True)
        session.log.begin(", ".join(group))
        rows = side_by_side(functools.partial(_run_stage, session, limit), group)
        session.log.end()
        for row in rows:
            session.add(row)
            failures += row["status"] not in ("passed", "absent")
        if "build" in group:
            # Which kernels there are is a part of what the machine is.
            session.writer.restate(results.describe(session.device))
    return failures


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Stages that run together; each is there once, in order."""
    together = [name for name in names if name in SIDE_BY_SIDE_STAGES]
    alone = [[name] for name in names if name not in SIDE_BY_SIDE_STAGES]
    return [*alone, together] if together else alone


def _run_stage(session: Session, limit: float, name: str) -> Row:
    """Run a stage, and its row."""
    before = results.clocks()
    started = time.monotonic()
    try:
        outcome = RUN[name](session, limit)
    except Exception:  # a row of the report, so that the other stages still run
        outcome = Outcome("failed", error=tail(traceback.format_exc()))
        session.log.write(name, outcome.error)
    row: Row = {
        "suite": "stage",
        "stage": name,
        "status": outcome.status,
        "exit_code": outcome.exit_code,
        "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": round(limit, 1),
        "last_line": outcome.last_line,
        "clocks": {"before": before, "after": results.clocks()},
        **outcome.more,
    }
    return row | ({"error": outcome.error} if outcome.error else {})
