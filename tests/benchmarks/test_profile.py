"""Traces of three models, and which kernel is looked into: at a size that takes seconds."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import profile, profiled_case
from benchmarks.models import transformer_step
from benchmarks.operators import benchmark_cases, bind
from fused_attn.validation import case_inputs

Row = dict[str, Any]
MACHINE = {"suite": "machine", "started": "2026-01-01T00:00:00Z"}
# What Nsight Compute prints, for two kernels, after a line of the program's own.
OUTPUT = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","step(int)","Command line profiler metrics","gpu__time_duration.sum","ns","1,234,500"
"0","7","step(int)","Command line profiler metrics","launch__registers_per_thread","","128"
"0","7","step(int)","Command line profiler metrics","dram__bytes_read.sum","byte","n/a"
"1","7","merge","Command line profiler metrics","gpu__time_duration.sum","ns","990.5"
"1","7","merge","Command line profiler metrics","another.metric","ns","5"
"""
KERNELS = [
    {"kernel": "step(int)", "duration_ns": 1234500.0, "registers": 128.0},
    {"kernel": "merge", "duration_ns": 990.5},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operator(provider: str, share: float, p50_ms: float = 1.0, **fields: Any) -> Row:
    return {
        "suite": "operators",
        "op": "beam_search",
        "case": "B1_K4_V50257",
        "dtype": "float32",
        "direction": "forward",
        "provider": provider,
        "p50_ms": p50_ms,
        "share_of_roof": share,
        **fields,
    }


ROWS = [
    operator("eager", 0.01),
    operator("triton", 0.4),
    operator("cuda", 0.02, p50_ms=0.015),
    operator("cuda", 0.3, case="B16_K4_V32000"),
    {**operator("triton", 0.0), "failed": "no"},
]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in [MACHINE, *rows]))
    return path


def test_traces_and_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(tmp_path / "operators.jsonl", ROWS)
    options = ["--size=tiny", "--json", f"--results={results}", f"--out={tmp_path}"]
    assert profile.main(options) == 0
    *traces, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["model"] for row in traces] == [
        "transformer_tiny",
        "transformer_tiny",
        "rnn_tiny",
    ]
    assert len({row["case"] for row in traces}) == 3
    tables = (tmp_path / "profile.txt").read_text()
    for row, expected in zip(
        traces,
        (
            "fused_attn_C::attention_backward",
            "fused_attn_C::decode_attention",
            "aten::_fused_adam_",
        ),
        strict=True,
    ):
        assert (row["suite"], row["task"]) == ("profile", "trace")
        assert row["wall_ms"] > 0
        path = tmp_path / row["trace"]
        assert path.stat().st_size == row["trace_bytes"] < profile.LARGEST_TRACE
        with gzip.open(path, "rt") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert expected in names
        shares = [operator["share"] for operator in row["operators"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.0 + 1e-9
        assert row["operators"][0]["operator"][:30] in tables
    assert (last["task"], last["case"], last["provider"]) == ("ncu", "B16_K4_V32000", "cuda")
    assert last["absent"] == "Nsight Compute needs a CUDA GPU"


def test_a_trace_that_is_too_large_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "LARGEST_TRACE", 100)
    step = transformer_step.cases(profile.SIZES["tiny"], "cpu")[0]
    row = profile.trace("step", step, "cpu", tmp_path)
    assert row["trace_left_out"] == "more than 100 bytes"
    assert row["operators"]
    assert not (tmp_path / row["trace"]).exists()


def test_a_trace_that_fails_and_one_without_time_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> Row:
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(profile, "trace", fail)
    assert profile.main(["--size=tiny", f"--out={tmp_path}"]) == 1
    assert capsys.readouterr().out.count("failed, RuntimeError: no profiler here") == 3
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["failed" in row for row in rows] == [False, True, True, True, False]
    assert rows[-1]["absent"] == "no --results of an operators run were given"

    assert profile.main(["--size=tiny", "--json", "--seconds=0", f"--out={tmp_path}"]) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["absent"] for row in rows[:3]] == ["no time left"] * 3


def test_chooses_the_slowest_of_ours_beside_its_roof() -> None:
    chosen = profile.slowest_kernel(ROWS)
    assert chosen is not None
    assert (chosen["provider"], chosen["case"]) == ("cuda", "B16_K4_V32000")
    assert profile.slowest_kernel([ROWS[0], ROWS[2], ROWS[4]]) is None


def test_reads_what_nsight_compute_prints() -> None:
    assert profile.parse(OUTPUT) == KERNELS
    assert profile.parse("==ERROR== ERR_NVGPUCTRPERM") == []


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on the path, whose lines are for the tests to write."""
    path = tmp_path / "bin" / "ncu"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return path


def count(tmp_path: Path, seconds: float = 60.0) -> Row:
    results = write(tmp_path / "operators.jsonl", ROWS)
    return profile.count_in_kernel(results, "cuda", tmp_path, seconds)


def test_kernels_counted_by_nsight_compute(tmp_path: Path, ncu: Path) -> None:
    (tmp_path / "printed").write_text(OUTPUT)
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/printed\n')
    row = count(tmp_path)
    assert row["kernels"] == KERNELS
    asked = (tmp_path / "asked").read_text()
    assert "--clock-control none" in asked
    assert "-m benchmarks.profiled_case beam_search B16_K4_V32000 --dtype float32" in asked
    assert asked.strip().endswith("--direction forward --backend cuda")
    assert OUTPUT in (tmp_path / "profile.txt").read_text()


def test_why_nsight_compute_has_no_kernels(
    tmp_path: Path, ncu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ncu.write_text("#!/bin/sh\necho ==ERROR== ERR_NVGPUCTRPERM\nexit 1\n")
    assert count(tmp_path)["failed"].strip() == "exit code 1: ==ERROR== ERR_NVGPUCTRPERM"
    ncu.write_text("#!/bin/sh\necho begun\nexec sleep 30\n")
    assert count(tmp_path, seconds=1.5)["failed"].startswith("timed out after 2 s: begun")
    assert count(tmp_path, seconds=0.0)["absent"] == "no time left"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert count(tmp_path)["absent"] == "ncu is not installed"


def test_the_profiled_process_runs_just_that_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: there are no marks, but the same calls."""
    case = benchmark_cases("beam_search")[0]
    calls = []

    def counted(given: Any, run: Any, inputs: Any, direction: Any) -> Any:
        call = bind(given, run, inputs, direction)
        return lambda: calls.append((given.name, direction, call()))

    monkeypatch.setattr(profiled_case, "bind", counted)
    assert profiled_case.main(["beam_search", case.name, "--device=cpu", "--backend=cpu"]) == 0
    assert {call[:2] for call in calls} == {(case.name, "forward")}
    expected = case.run(case_inputs(case, torch.float32, "cpu"), "reference")
    torch.testing.assert_close(calls[-1][2][0], expected[0])
