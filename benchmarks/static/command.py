"""The command: compile, show, compare with the committed table."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from fused_attn.validation import OPS

from . import cuda, launches, page, table
from .table import Row, Scope
from .targets import CUDA_TARGETS, TRITON_TARGETS
from .triton import Compiler

# Differences.
_SHOWN = 100


class Job(NamedTuple):
    """What is compiled at a time."""

    place: Scope
    call: launches.Call | None
    """None: a unit for nvcc."""

    @property
    def unit(self) -> str:
        """nvcc's."""
        return f"{self.place.op}_cuda_{self.place.call}"


def jobs(ops: Sequence[str] = (), targets: Sequence[str] = (), is_quick: bool = False) -> list[Job]:
    """What there is to compile, nvcc's units first: they take longest.

    Args:
        ops: Only these; default: all.
        targets: Only these; default: all.
        is_quick: Only what the tests compile.
    """
    found = []
    cuda_targets = cuda.QUICK_TARGETS if is_quick else CUDA_TARGETS
    for unit, target in itertools.product(cuda.unit_names(is_quick), cuda_targets):
        op, _, kind = unit.partition("_cuda_")
        found.append(Job(Scope("cuda", op, target, kind), None))
    triton_targets = launches.QUICK_TARGETS if is_quick else TRITON_TARGETS
    for op, target in itertools.product(OPS, triton_targets):
        for call in launches.calls(op, target, is_quick):
            found.append(Job(Scope("triton", op, target, call.name), call))
    return [
        job
        for job in found
        if (not ops or job.place.op in ops) and (not targets or job.place.target in targets)
    ]


def compile_jobs(
    wanted: Sequence[Job], processes: int, show: Callable[[str], None]
) -> tuple[list[Row], list[str]]:
    """The rows of jobs, and a line for each that does not compile."""
    own = threading.local()
    rows: list[Row] = []
    failed: list[str] = []
    with contextlib.ExitStack() as compilers, ThreadPoolExecutor(processes) as pool:

        def run(job: Job) -> list[Row]:
            if job.call is None:
                compiled = cuda.compile_unit(job.unit, job.place.target)
                return table.cuda_rows(compiled, job.unit, job.place.target)
            if not hasattr(own, "compiler"):
                own.compiler = compilers.enter_context(Compiler())
            return table.triton_rows(own.compiler, job.place.op, job.place.target, job.call)

        started = {pool.submit(run, job): job for job in wanted}
        for number, future in enumerate(as_completed(started), 1):
            try:
                rows += future.result()
            except RuntimeError as error:
                failed.append(str(error))
            show(f"{number}/{len(wanted)} {' '.join(started[future].place)}")
    return rows, failed


def main(
    argv: Sequence[str] | None = None,
    paths: tuple[Path, Path] = (table.PATH, page.PATH),
    compile_all: Callable[..., tuple[list[Row], list[str]]] = compile_jobs,
) -> int:
    """Compile, print the summary and the differences; 1 if something must not be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static",
        description="Compile the kernels for GPUs that are not there, and compare with the table.",
    )
    parser.add_argument("--quick", action="store_true", help="what the tests compile")
    parser.add_argument("--op", action="append", choices=OPS, help="repeatable")
    targets = dict.fromkeys((*TRITON_TARGETS, *CUDA_TARGETS))
    parser.add_argument("--target", action="append", choices=list(targets), help="repeatable")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--update", action="store_true", help="rewrite the table and its page")
    arguments = parser.parse_args(argv)

    wanted = jobs(arguments.op or (), arguments.target or (), arguments.quick)
    lacking = {"cuda": cuda.absent(), "triton": triton_absent()}
    for kind, reason in lacking.items():
        if reason != "" and any(job.place.kind == kind for job in wanted):
            print(f"no {kind} kernels are compiled: {reason}")
    wanted = [job for job in wanted if lacking[job.place.kind] == ""]
    begun = time.perf_counter()
    rows, failed = compile_all(wanted, arguments.jobs, _progress)
    print(page.summary(rows, is_markdown=False))
    print(f"\n{len(rows)} kernels in {time.perf_counter() - begun:.0f} s")

    compilers, committed = table.read(paths[0])
    now = {**compilers, **table.versions()}
    for tool in ("triton", "nvcc"):
        if compilers[tool] != now[tool]:
            print(f"the table is of {tool} {compilers[tool]}, this is {now[tool]}")
    places = {job.place for job in wanted}
    is_whole = not (arguments.quick or arguments.op or arguments.target)
    compared = [
        row
        for row in committed
        if table.scope(row) in places or (is_whole and lacking[row["kind"]] == "")
    ]
    wrong = failed + table.problems(rows)
    if not failed:
        changes = table.differences(compared, rows)
        print(f"{len(changes)} rows differ from the committed table" + ":" * bool(changes))
        for line in changes[:_SHOWN]:
            print(f"  {line}")
        if len(changes) > _SHOWN:
            print(f"  and {len(changes) - _SHOWN} more")
    for row in rows:
        if (reason := table.allowed_spill(row)) != "" and row["spills"] > 0:
            print(f"allowed: {table.name(row)}: {row['spills']} bytes spilled: {reason}")
    for line in wrong:
        print(f"WRONG {line}")
    if arguments.update and not failed:
        if not is_whole and now != compilers:
            print("not updated: the table is of other compilers; update the whole of it")
            return 1
        kept = [row for row in committed if row not in compared]
        table.write(now, [*kept, *rows], paths[0])
        page.write(*table.read(paths[0]), paths[1])
    return int(bool(wrong))


def triton_absent() -> str:
    """What is missing to compile Triton kernels; empty if nothing is."""
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line[:100]:100}", end="", file=sys.stderr, flush=True)
