"""``pytest benchmarks`` as someone meets it who knows pytest-benchmark: on one small op."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import ROOT, read

# What a bench_<op>.py and its conftest are, in a folder of their own.
CONFTEST = """
import sys, types
from tests.benchmarks import doubling
from benchmarks import operators, suite

sys.modules["benchmarks.bench_doubling"] = doubling
sys.modules["fused_attn.ops.doubling.cases"] = doubling
suite.DEVICE = "cpu"
suite.measure_roof = lambda device: doubling.ROOF
operators.our_providers = lambda op, device: {OURS}
operators.OURS += ("wrong",)

from benchmarks.conftest import *
"""
BENCH = """
from benchmarks.suite import parametrize

@parametrize("doubling")
def test_doubling(measured, case, dtype, direction, provider):
    measured(case, dtype, direction, provider)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "conftest.py").write_text(
        CONFTEST.replace("{OURS}", '{"fused_attn": None}')
    )
    (tmp_path / "bench" / "bench_doubling.py").write_text(BENCH)
    options = (ROOT / "benchmarks" / "pytest.ini").read_text()
    (tmp_path / "bench" / "pytest.ini").write_text(options)
    return tmp_path


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench", "--turns", "2", "--out", "out", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # It is no worker of this run's, in which pytest-benchmark would measure nothing.
    outer = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        command,
        cwd=folder,
        env={**outer, "PYTHONPATH": path, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_strangers_run(folder: Path) -> None:
    plain = ("-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-only")
    result = run(folder, "--quick", *plain, "-k", "forward", "--benchmark-autosave", "-v")
    assert result.returncode == 0, result.stdout + result.stderr
    out = result.stdout
    assert "test_doubling[thousand-float32-forward-fused_attn] PASSED" in out
    assert "test_doubling[thousand-float32-forward-refusing] SKIPPED" in out
    assert "again" not in out  # left out by --quick
    assert "benchmark 'doubling rarely float32 forward+backward'" in out
    # Each reason once, with the number of rows that it is for.
    assert out.count("absent: not_installed") == 1
    assert "absent: not_installed (6 rows): no-such-package is not installed" in out
    assert "failed: wrong_gradient (4 rows): AssertionError: computes something else: grad_x" in out
    assert "unchecked: unchecked (6 rows): doubles another tensor" in out

    # pytest-benchmark has the very times of the rows.
    (path,) = (folder / "out").glob("*.jsonl")
    rows = {(r["case"], r["direction"], r["provider"]): r for r in read(path).suite("operators")}
    (saved,) = (folder / ".benchmarks").rglob("*.json")
    benchmarks = json.loads(saved.read_text())["benchmarks"]
    assert len(benchmarks) == 16
    for benchmark in benchmarks:
        more = benchmark["extra_info"]
        row = rows[more["case"], more["direction"], more["provider"]]
        assert benchmark["stats"]["median"] * 1e3 == pytest.approx(row["p50_ms"])
        assert benchmark["stats"]["rounds"] == 2

    again = run(
        folder, "--quick", *plain, "-k", "thousand and forward-eager", "--benchmark-compare"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "(0001_" in again.stdout  # the saved run beside this one


def test_a_wrong_kernel_of_ours_is_red(folder: Path) -> None:
    conftest = folder / "bench" / "conftest.py"
    conftest.write_text(conftest.read_text().replace('{"fused_attn": None}', '{"wrong": "wrong"}'))
    result = run(folder, "-k", "thousand and forward-wrong")
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    assert "is wrong, so it is not timed: output_0: max error" in result.stdout
