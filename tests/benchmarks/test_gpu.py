"""The GPU run, rehearsed with stages and workers that take too long, fail and crash."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import operators, results
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import processes, stages, timed, validating
from benchmarks.gpu.building import ResourceReport
from benchmarks.gpu.processes import Failure, Log, Pool, Task
from benchmarks.gpu.session import Outcome, Session
from benchmarks.gpu.summary import summary
from benchmarks.results import Row

from .doubling import ROOF, THOUSAND, Doubling, install

MACHINE: Row = {"suite": "machine", "device": "cpu", "name": "none", "commit": "c0ffee"}
OPERATORS_ROW: Row = {
    "suite": "operators",
    "op": "recurrent_cell",
    "case": "lstm_64x512",
    "dtype": "float32",
    "direction": "forward",
}


ROOF_ROW: Row = {
    "suite": "roof", "copies": [[1, 1e-9], [1 << 30, 0.1]], "products": {"float32": 1e9}
}  # fmt: skip


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path / "run.log")
    yield log
    log.close()


NewSession = Callable[..., Session]


@pytest.fixture
def new_session(tmp_path: Path, log: Log) -> Iterator[NewSession]:
    writer = results.Writer(tmp_path / "run.jsonl", MACHINE)

    def make(known: tuple[Row, ...] = (), **changes: Any) -> Session:
        defaults = {"device": "cpu", "quick": True, "op": None, "retry_failed": False}
        return Session(argparse.Namespace(**(defaults | changes)), writer, log, known)

    yield make
    writer.close()


def rows_of(tmp_path: Path) -> list[Row]:
    return results.read(tmp_path / "run.jsonl").rows


# --- one process --------------------------------------------------------------------------------


def test_a_process_over_its_time_is_ended_and_keeps_what_it_wrote(log: Log) -> None:
    rows: list[Row] = []
    code = 'import time; print(\'{"suite": "a"}\'); print("deep"); time.sleep(60)'
    ending = processes.run(python(code), 1.5, log, "build", on_row=rows.append)
    assert (ending.status, ending.exit_code) == ("timed out", None)
    assert ending.seconds < 20
    assert rows == [{"suite": "a"}]
    assert ending.error == "deep"
    assert "build| deep" in log.path.read_text()


def test_a_process_that_fails_tells_the_end_of_its_error(log: Log) -> None:
    ending = processes.run(
        python('print("note"); raise SystemExit("no such kernel")'), 60.0, log, "validate"
    )
    assert (ending.status, ending.exit_code) == ("failed", 1)
    assert "no such kernel" in ending.error
    assert "note" in ending.error


def test_a_process_killed_by_a_signal_is_a_failure(log: Log) -> None:
    ending = processes.run(python("import os; os.abort()"), 60.0, log, "tests")
    assert (ending.status, ending.exit_code) == ("failed", -6)


def test_a_program_that_is_not_there_is_a_failure(log: Log) -> None:
    ending = processes.run(("/nowhere/compute-sanitizer",), 60.0, log, "sanitizer")
    assert ending.status == "failed"
    assert "/nowhere/compute-sanitizer" in ending.error


def test_a_process_over_its_time_is_ended_with_its_children(tmp_path: Path, log: Log) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    # In a group of its own, as ninja's compilers are.
    code = "import subprocess, sys; "
    code += f"subprocess.run([sys.executable, '-c', {child!r}], process_group=0)"
    processes.run(python(code), 2.0, log, "tests")
    pid = int(pid_file.read_text())
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.05)
    pytest.fail("the child of a process that timed out is still running")


def _alive(pid: int) -> bool:
    try:
        # A process that has ended but was not collected by its parent is a zombie.
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_log_keeps_both_ends_of_a_stage(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", head_bytes=1000, tail_bytes=500)
    for stage in ("first", "second"):
        log.begin(stage)
        for i in range(10_000):
            log.write(stage, f"line {i}")
        log.write(stage, "x" * 100_000)
        log.end()
    log.close()
    text = (tmp_path / "log").read_text()
    assert len(text) < 8000
    assert "first| line 0\n" in text
    assert "second| line 0\n" in text
    assert text.count("lines left out") == 2


# --- workers ------------------------------------------------------------------------------------

# Stands in for benchmarks.gpu.worker: does what a task says.
WORKER = r"""
import json, os, sys, time
def send(**message): print(json.dumps(message), flush=True)
send(ready=True)
for line in sys.stdin:
    task = json.loads(line)
    send(at=task.get("at", ""))
    without = task.get("without", [])
    if task.get("dies") and task["at"] not in without:
        print("about to abort", file=sys.stderr, flush=True)
        os.abort()
    if task.get("hangs") and task["at"] not in without:
        time.sleep(60)
    head = {n: task[n] for n in ("op", "case", "dtype", "direction") if n in task}
    if task["kind"] == "roof":
        send(row={"suite": "roof", "copies": [[1, 1.0]], "products": {"float32": 1.0}})
    else:
        for name in task.get("providers", ["fused_attn"]):
            if name not in without:
                row = {"suite": "operators", **head, "provider": name, "p50_ms": 1.0,
                       "p20_ms": 1.0, "p80_ms": 1.0, "bound": "memory", "share_of_roof": 0.5,
                       "pid": os.getpid()}
                send(row=row)
    send(exhausted=task.get("exhausted", False))
"""


def pool_of(log: Log, rows: list[Row], failures: list[Failure], **options: Any) -> Pool:
    def failed(task: Task, failure: Failure) -> Task | None:
        failures.append(failure)
        return None

    options = {"task_seconds": 30.0, "on_row": rows.append, "on_failure": failed, **options}
    return Pool(python(WORKER), log, "operators", **options)


def test_a_worker_that_dies_is_replaced_for_the_next_task(log: Log) -> None:
    rows: list[Row] = []
    failures: list[Failure] = []
    tasks = [{"kind": "time", "case": "a"}, {"kind": "time", "case": "b", "at": "x", "dies": True}]
    tasks += [{"kind": "time", "case": "c"}, {"kind": "time", "case": "d"}]
    left = pool_of(log, rows, failures).work(tasks, 1, time.monotonic() + 60)
    assert left == 0
    assert [row["case"] for row in rows] == ["a", "c", "d"]
    [failure] = failures
    assert failure.at == "x"
    assert "about to abort" in failure.error
    assert "SIGABRT" in failure.error
    assert rows[0]["pid"] != rows[1]["pid"] == rows[2]["pid"]


def test_a_task_over_its_time_costs_itself_alone(log: Log) -> None:
    rows: list[Row] = []
    failures: list[Failure] = []
    tasks = [{"kind": "time", "case": "a", "at": "x", "hangs": True}, {"kind": "time", "case": "b"}]
    pool = pool_of(log, rows, failures, task_seconds=1.0)
    assert pool.work(tasks, 1, time.monotonic() + 60) == 0
    assert [row["case"] for row in rows] == ["b"]
    assert "not done within 1 s" in failures[0].error


def test_tasks_that_the_time_cuts_off_are_neither_done_nor_failed(log: Log) -> None:
    rows: list[Row] = []
    failures: list[Failure] = []
    tasks = [{"kind": "time", "case": "a", "at": "x", "hangs": True}, {"kind": "time", "case": "b"}]
    assert pool_of(log, rows, failures).work(tasks, 1, time.monotonic() + 1.5) == 2
    assert not rows
    assert not failures


def test_an_exhausted_worker_is_replaced(log: Log) -> None:
    rows: list[Row] = []
    tasks = [{"kind": "time", "case": "a", "exhausted": True}, {"kind": "time", "case": "b"}]
    assert pool_of(log, rows, []).work(tasks, 1, time.monotonic() + 60) == 0
    assert rows[0]["pid"] != rows[1]["pid"]


def test_workers_that_do_not_begin_are_not_tried_for_ever(log: Log) -> None:
    pool = Pool(
        python('raise SystemExit("no module")'), log, "x", 5.0, lambda row: None, lambda *_: None
    )
    assert pool.work([{"kind": "a"}, {"kind": "b"}], 1, time.monotonic() + 60) == 2
    assert "no module" in pool.start_error


# --- operators ----------------------------------------------------------------------------------


def times_of(session: Session, monkeypatch: pytest.MonkeyPatch, tasks: list[Task]) -> int:
    monkeypatch.setattr(timed, "operator_tasks", lambda session: tasks)
    return timed.Timing(session, python(WORKER), 5).work(time.monotonic() + 60)


def task_of(case: str, **options: Any) -> Task:
    head = {name: OPERATORS_ROW[name] for name in ("op", "dtype", "direction")}
    return {"kind": "time", **head, "case": case, **options}


def test_a_case_is_measured_without_the_provider_that_ends_its_process(
    new_session: NewSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    bad = {"providers": ["fused_attn", "eager", "compile"], "at": "compile", "dies": True}
    tasks = [task_of(name, **bad) for name in "abc"]
    assert times_of(session, monkeypatch, tasks) == 0
    found = {(row["case"], row["provider"]): row for row in rows_of(tmp_path) if "case" in row}
    assert len(found) == 9
    for case in "abc":
        assert found[case, "eager"]["p50_ms"] == found[case, "fused_attn"]["p50_ms"] == 1.0
    assert "about to abort" in found["a", "compile"]["failed"]
    assert "SIGABRT" in found["b", "compile"]["failed"]
    # By then it is known for it, and costs no third process.
    assert "left out, since it has ended 2 processes" in found["c", "compile"]["failed"]
    assert "compile: failed" in "\n".join(summary(session))


def test_a_case_that_ends_its_process_among_all_is_a_row(
    new_session: NewSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    assert times_of(session, monkeypatch, [task_of("a", at="", dies=True), task_of("b")]) == 0
    roof, a, b = rows_of(tmp_path)
    assert roof["suite"] == "roof"
    assert (a["provider"], "about to abort" in a["failed"]) == ("all", True)
    assert b["p50_ms"] == 1.0


def test_what_was_measured_is_not_measured_again(new_session: NewSession) -> None:
    only = {"op": ["recurrent_cell"]}
    tasks = timed.operator_tasks(new_session(**only))
    assert OPERATORS_ROW["case"] in {task["case"] for task in tasks}
    measured = {**OPERATORS_ROW, "provider": "eager", "p50_ms": 1.0}
    failed = {**OPERATORS_ROW, "provider": "fused_attn", "failed": "is wrong"}
    assert len(timed.operator_tasks(new_session((measured, failed), **only))) == len(tasks) - 1
    # Where only a failure is known, the case was not finished.
    assert timed.operator_tasks(new_session((failed,), **only)) == tasks
    again = new_session((measured, failed), retry_failed=True, **only)
    assert timed.operator_tasks(again) == tasks


def test_on_a_gpu_the_cases_that_others_publish_come_first(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed.operators, "our_providers", lambda op, device: {"triton": "triton"})
    tasks = timed.operator_tasks(new_session(device="cuda", quick=False))
    names = list(dict.fromkeys((task["op"], task["case"], task["dtype"]) for task in tasks))
    assert {op for op, _, _ in names[:8]} == {"attention"}
    assert all("D128" in case for _, case, _ in names[:8])
    dtypes = [dtype for _, _, dtype in names]
    assert dtypes == sorted(dtypes)  # bfloat16, then float32


# --- validation ---------------------------------------------------------------------------------


def test_a_case_that_ends_its_process_has_a_verdict(
    new_session: NewSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    head = {"op": "attention", "backend": "cpu", "dtype": "float32", "at": "", "dies": True}
    tasks = [{"kind": "validate", **head, "case": name} for name in "abc"]
    monkeypatch.setattr(validating, "DEATHS_ALLOWED", 2)
    monkeypatch.setattr(validating, "validation_tasks", lambda session: tasks)
    monkeypatch.setattr(validating, "operator_tasks", lambda session: [])
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    left = validating.Validation(session, python(WORKER)).work(time.monotonic() + 60)
    assert left == 0
    rows = rows_of(tmp_path)
    assert [row["verdict"] for row in rows] == ["error"] * 3
    assert "SIGABRT" in rows[0]["detail"]
    assert "left out, since this backend has ended 2 processes" in rows[2]["detail"]


def test_verdicts_that_are_there_are_not_asked_for_again(new_session: NewSession) -> None:
    only = {"op": ["recurrent_cell"]}
    first, *others = validating.validation_tasks(new_session(**only))
    head = {name: first[name] for name in ("op", "backend", "case", "dtype")}
    row = {"suite": "validate", **head, "verdict": "failed"}
    assert validating.validation_tasks(new_session((row,), **only)) == others
    again = new_session((row,), retry_failed=True, **only)
    assert validating.validation_tasks(again) == [first, *others]


def test_times_use_what_validation_has_found(new_session: NewSession) -> None:
    head = {"suite": "agreement", **OPERATORS_ROW} | {"suite": "agreement"}
    both = {**head, "direction": "forward+backward"}
    right = {**both, "provider": "cuda", "error": 0.25, "budget": 0.5}
    wrong = {**both, "provider": "triton", "failed": "is wrong"}
    other = {**head, "provider": "cuda", "error": 0.125, "budget": 0.25}
    timing = timed.Timing(new_session((right, wrong, other, ROOF_ROW)), python(WORKER), 5)
    for direction in ("backward", "forward+backward"):
        task = timing._before(task_of(OPERATORS_ROW["case"]) | {"direction": direction})
        assert task is not None
        assert task["checked"] == {
            "cuda": {"error": 0.25, "budget": 0.5},
            "triton": {"failed": "is wrong"},
        }
    task = timing._before(task_of(OPERATORS_ROW["case"]))
    assert task is not None
    assert task["checked"] == {"cuda": {"error": 0.125, "budget": 0.25}}


def test_a_benchmark_case_is_prepared_without_whom_it_dies_of(
    new_session: NewSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    bad = {"providers": ["fused_attn", "eager"], "at": "fused_attn", "dies": True}
    monkeypatch.setattr(validating, "validation_tasks", lambda session: [])
    monkeypatch.setattr(validating, "operator_tasks", lambda session: [task_of("a", **bad)])
    left = validating.Validation(session, python(WORKER)).work(time.monotonic() + 60)
    assert left == 0
    wrong = [row for row in rows_of(tmp_path) if row["suite"] == "agreement"]
    assert [row["direction"] for row in wrong] == ["forward", "forward+backward"]
    assert all(row["provider"] == "fused_attn" for row in wrong)
    assert "SIGABRT" in wrong[0]["failed"]
    # The stand-in gives a row for each of the others.
    assert [row["provider"] for row in rows_of(tmp_path) if "p50_ms" in row] == ["eager"]


# --- stages -------------------------------------------------------------------------------------


def test_stages_go_on_whatever_becomes_of_one(
    new_session: NewSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(session: Session, seconds: float) -> Outcome:
        raise RuntimeError("a mistake of ours")

    limits = {}

    def note(session: Session, seconds: float) -> Outcome:
        limits["models"] = seconds
        return Outcome("passed", 0, "all well", more={"left": 0})

    monkeypatch.setitem(stages.RUN, "operators", crash)
    monkeypatch.setitem(stages.RUN, "models", note)
    session = new_session()
    assert stages.run_stages(session, ["operators", "models"], 100.0) == 1
    operators, models = rows_of(tmp_path)
    assert (operators["stage"], operators["status"]) == ("operators", "failed")
    assert "a mistake of ours" in operators["error"]
    assert (models["status"], models["last_line"], models["left"]) == ("passed", "all well", 0)
    assert models["clocks"] == {"before": None, "after": None}
    # What the first left over, the second has.
    assert limits["models"] == pytest.approx(100.0, abs=5.0)
    passed = results.read(tmp_path / "run.jsonl").rows
    assert stages.run_stages(new_session(passed), ["models"], 100.0) == 0
    assert len(rows_of(tmp_path)) == 2


def test_what_passed_is_left_out_unless_it_may_have_been_a_part(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def note(name: str) -> Callable[[Session, float], Outcome]:
        def stage(session: Session, seconds: float) -> Outcome:
            ran.append(name)
            return Outcome("passed")

        return stage

    names = ("validate", "operators", "models")
    for name in names:
        monkeypatch.setitem(stages.RUN, name, note(name))
    known = tuple({"suite": "stage", "stage": name, "status": "passed"} for name in names)
    assert stages.run_stages(new_session(known), names, 60.0) == 0
    assert ran == ["validate", "operators"]


def test_stages_without_time_are_rows(new_session: NewSession, tmp_path: Path) -> None:
    assert stages.run_stages(new_session(), ["models", "tests"], 0.0) == 2
    assert [row["status"] for row in rows_of(tmp_path)] == ["no time left"] * 2


def test_what_times_nothing_runs_side_by_side(
    new_session: NewSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(2)

    def meet(session: Session, seconds: float) -> Outcome:
        barrier.wait(timeout=20)
        return Outcome("passed")

    monkeypatch.setitem(stages.RUN, "tests", meet)
    monkeypatch.setitem(stages.RUN, "sanitizer", meet)
    assert stages.run_stages(new_session(), ["tests", "sanitizer"], 60.0) == 0
    assert [row["limit_seconds"] for row in rows_of(tmp_path)] == [pytest.approx(60.0, abs=5)] * 2


def test_the_shares_of_the_stages_fit_into_ten_minutes() -> None:
    assert stages.TOTAL_SECONDS <= 570
    assert set(stages.RUN) == set(stages.STAGES)


def test_reads_the_assemblers_report() -> None:
    report = ResourceReport()
    name = "_Z4kernILi3EEvPf"
    for line in (
        "ptxas info    : 0 bytes gmem",
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90'",
        f"ptxas info    : Function properties for {name}",
        "    64 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads",
        "ptxas info    : Used 168 registers, used 1 barriers, 128 bytes smem",
    ):
        report.read(line)
    [row] = report.rows()
    assert "kern" in row["case"]
    resources = {"target": "sm_90", "stack_bytes": 64, "spills": 20, "registers": 168}
    assert row == {"suite": "build", "case": row["case"], **resources, "shared": 128}


def test_a_test_that_fails_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_b(): assert 1 == 2\ndef test_c(): pass\n")
    (tmp_path / "test_d.py").write_text("import a_package_that_is_not_here\n")
    options = ["-q", "-o", "addopts=", "-p", "benchmarks.gpu.pytest_rows", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=results.ROOT, capture_output=True, text=True
    )
    rows = [row for line in run.stdout.splitlines() if (row := processes.as_row(line))]
    assert [row["case"] for row in rows] == ["test_d.py", "test_a.py::test_b", "all"]
    assert "a_package_that_is_not_here" in rows[0]["failed"]
    assert "assert 1 == 2" in rows[1]["failed"]
    assert rows[2]["counts"] == {"failed": 1, "passed": 1}


# --- the command --------------------------------------------------------------------------------


def test_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_writes_where_out_says_and_goes_on_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"models": 0, "profile": 0}

    def count(name: str, status: str) -> Callable[[Session, float], Outcome]:
        def stage(session: Session, seconds: float) -> Outcome:
            counts[name] += 1
            return Outcome(status)

        return stage

    monkeypatch.setitem(stages.RUN, "models", count("models", "passed"))
    monkeypatch.setitem(stages.RUN, "profile", count("profile", "failed"))
    monkeypatch.setenv("OUT", str(tmp_path / "first"))
    arguments = ["--device", "cpu", "--stages", "models,profile"]
    assert command.main(arguments) == 1
    [first] = (tmp_path / "first").glob("*.jsonl")
    assert first.with_suffix(".log").exists()
    second = ["--out", str(tmp_path / "second"), "--resume", str(first)]
    assert command.main([*arguments, *second]) == 1
    assert counts == {"models": 1, "profile": 2}
    run = results.read(tmp_path / "second" / first.name)
    assert run.machine["torch"] == torch.__version__
    statuses = {row["stage"]: row["status"] for row in run.suite("stage")}
    assert statuses == {"models": "passed", "profile": "failed"}
    assert "1 stages passed, 1 not" in capsys.readouterr().out


def test_does_not_go_on_from_another_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**MACHINE, "commit": "another"}) + "\n")
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--resume", str(tmp_path / "a.jsonl")])
    assert "is of commit another" in capsys.readouterr().err


def test_refuses_a_stage_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--stages", "build,fly"])
    assert "expected some of build, validate" in capsys.readouterr().err


def test_the_worker_measures_a_case(new_session: NewSession, tmp_path: Path) -> None:
    session = new_session(op=["recurrent_cell"])
    timing = timed.Timing(session, stages.worker_command("cpu"), 3)
    session.add(ROOF_ROW)
    [task] = [
        task
        for task in timed.operator_tasks(session)
        if task["case"] == OPERATORS_ROW["case"] and task["direction"] == "forward"
    ]
    task = {**timing._before(task), "without": ["compile"]}
    assert timing.pool.work([task], 1, time.monotonic() + 60) == 0
    rows = {row["provider"]: row for row in rows_of(tmp_path) if row["suite"] == "operators"}
    assert set(rows) == {"fused_attn", "eager", "copy"}
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert 0 < rows["fused_attn"]["budget"] <= 1


# --- what a worker measures ---------------------------------------------------------------------


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    install(monkeypatch, lambda op, device: {"wrong": "wrong", "fused_attn": None})
    operators.forget()
    return THOUSAND


def measured(**options: Any) -> dict[str, Row]:
    rows = operators.measure(THOUSAND, torch.float32, "forward", "cpu", ROOF, 3, **options)
    return {row["provider"]: row for row in json.loads(json.dumps(rows))}


def test_a_verdict_that_is_known_is_not_asked_for_again(
    doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> None:
        raise RuntimeError("checked again")

    monkeypatch.setattr(operators, "require_correct", ask)
    monkeypatch.setattr(operators, "require_same_function", ask)
    known = {"fused_attn": {"error": 0.25, "budget": 0.5}, "wrong": {"failed": "is not so"}}
    known |= {"eager": {"error": 0.125}, "tripling": {"failed": "computes something else"}}
    told: list[str] = []
    rows = measured(only=list(known), checked=known, announce=told.append)
    assert told == ["wrong", "fused_attn", "eager", "tripling", ""]
    assert (rows["fused_attn"]["error"], rows["fused_attn"]["budget"]) == (0.25, 0.5)
    assert rows["eager"]["error"] == 0.125
    assert "is not so" in rows["wrong"]["failed"]
    assert "computes something else" in rows["tripling"]["failed"]
    assert "p50_ms" in rows["eager"]


def test_checks_every_provider_of_a_case(doubling: Doubling) -> None:
    rows: list[Row] = []
    operators.check(doubling, torch.float32, "cpu", lambda name: None, rows.append)
    found = {(row["provider"], row["direction"]): row for row in rows}
    # Who cannot be asked is told of when it is timed.
    assert {"refusing", "raising", "not_installed"}.isdisjoint(row["provider"] for row in rows)
    assert ("forward_only", "forward+backward") not in found
    assert found["fused_attn", "forward"]["budget"] == 0.0
    assert found["eager", "forward+backward"]["error"] == 0.0
    assert "is wrong" in found["wrong", "forward"]["failed"]
    assert "failed" not in found["wrong_gradient", "forward"]
    assert "something else" in found["wrong_gradient", "forward+backward"]["failed"]
    assert all(row["suite"] == "agreement" for row in rows)


def test_a_process_that_has_lost_the_gpu_says_so(
    doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "is_lost", lambda device: True)
    with pytest.raises(operators.LostProcessError, match="raising has left") as caught:
        measured(only=["fused_attn", "raising"])
    [row] = caught.value.rows
    assert (row["provider"], "out of order" in row["failed"]) == ("raising", True)
    with pytest.raises(operators.LostProcessError, match="raising has left"):
        operators.check(doubling, torch.float32, "cpu", lambda name: None, lambda row: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("direction", operators.DIRECTIONS)
def test_times_on_a_gpu_and_in_a_graph(doubling: Doubling, direction: Any) -> None:
    rows = operators.measure(
        doubling, torch.float32, direction, "cuda", ROOF, 5, only=["fused_attn", "eager"]
    )
    by_provider = {row["provider"]: row for row in rows}
    # A thousand numbers take the host longer than the GPU, so there are graphs.
    for name in ("fused_attn", "eager"):
        row = by_provider[name]
        assert "graph_error" not in row
        assert 0 < row["graph_ms"] < 1
        assert 0 < row["p50_ms"] < 1
        assert row["launch_ms"] > 0
