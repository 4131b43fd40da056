"""The runner of GPU stages, rehearsed with stages that take too long, fail and crash."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_case
from fused_attn.ops._cases import Case


def python(name: str, code: str, seconds: float = 60.0) -> gpu.Stage:
    return gpu.Stage(name, (sys.executable, "-c", code), seconds)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_goes_on_after_a_failure_and_a_timeout_and_keeps_what_they_wrote(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path)
    hangs = 'import time; print(\'{"part": 1}\', flush=True); print("deep", flush=True)\n'
    stages = [
        python("build", hangs + "time.sleep(60)", seconds=1.0),
        python("validate", 'print("note"); raise SystemExit("no such kernel")'),
        python("tests", "import os; os.abort()"),
        python("operators", 'print("all well")'),
    ]
    started = time.monotonic()
    assert gpu.run_stages(stages, results, 60.0) == 3
    assert time.monotonic() - started < 30
    results.close()

    part, *rows = rows_of(tmp_path)
    assert part == {"stage": "build", "part": 1}
    assert [(row["stage"], row["status"]) for row in rows] == [
        ("build", "timed out"),
        ("validate", "failed"),
        ("tests", "failed"),
        ("operators", "passed"),
    ]
    assert rows[0]["exit_code"] is None
    assert "deep" in rows[0]["error"]
    assert rows[1]["exit_code"] == 1
    assert "note" in rows[1]["error"]
    assert "no such kernel" in rows[1]["error"]
    assert rows[2]["exit_code"] < 0
    assert "error" not in rows[3]
    assert rows[3]["last_line"] == "all well"
    assert "no such kernel" in (tmp_path / "validate.log").read_text()


def test_an_error_is_that_of_its_own_process(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path)
    stages = [
        python("operators", 'raise SystemExit("first")'),
        python("operators", 'raise SystemExit("second")'),
    ]
    assert gpu.run_stages(stages, results, 60.0) == 2
    results.close()
    assert [row["error"].strip() for row in rows_of(tmp_path)] == ["first", "second"]


def test_a_timeout_ends_the_children_of_a_stage(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path)
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    gpu.run_stages([python("tests", code, seconds=2.0)], results, 60.0)
    results.close()
    pid = int(pid_file.read_text())
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.05)
    pytest.fail("the child of a stage that timed out is still running")


def _alive(pid: int) -> bool:
    try:
        # A process that has ended but was not collected by its parent is a zombie.
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_stages_without_time_are_rows(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path)
    assert gpu.run_stages([python("build", ""), python("tests", "")], results, 0.0) == 2
    results.close()
    assert [row["status"] for row in rows_of(tmp_path)] == ["no time left"] * 2


def test_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plans_every_stage_for_the_gpu_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu, "benchmark_cases", lambda op, device: [Doubling(name="a", kind="benchmark")]
    )
    backends = {"attention": ("triton", "reference"), "beam_search": ("cpu", "reference")}
    monkeypatch.setattr(gpu, "op_backends", lambda op: backends[op])
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    stages = gpu.plan(gpu.STAGES, "cuda", ["attention", "beam_search"], ["eager"], 7)
    assert list(dict.fromkeys(stage.name for stage in stages)) == list(gpu.STAGES)
    assert stages[1].command[stages[1].command.index("-m", 3) + 1] == "gpu"
    assert "cuda" in stages[2].command
    assert [stage.label for stage in stages if stage.name == "sanitizer"] == list(gpu.SANITIZERS)
    assert stages[3].command[0] == "compute-sanitizer"
    assert stages[-1].command[3:5] == ("attention", "a")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "sanitizer" not in [s.name for s in gpu.plan(gpu.STAGES, "cuda", [], [], 1)]
    assert [s.name for s in gpu.plan(["tests"], "cpu", [], [], 1)] == ["tests"]


def test_writes_where_out_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "plan", lambda *_: [python("build", "print('done')")])
    assert gpu.main(["--device", "cpu"]) == 0
    machine, build = rows_of(tmp_path)
    assert machine["torch"] == torch.__version__
    assert build["status"] == "passed"
    assert "1 passed, 0 not" in capsys.readouterr().out


class Doubling(Case):
    op = "doubling"
    differentiable = ("x",)

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        return {"x": torch.randn(1000, generator=generator).to(device, dtype)}

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        return (inputs["x"] * (3.0 if backend == "wrong" else 2.0),)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        return 2 * 1000 * itemsize

    def flops(self, backward: bool = False) -> int:
        return 1000


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    bench = ModuleType("benchmarks.bench_doubling")
    bench.peer = lambda case: lambda inputs: (inputs["x"] + inputs["x"],)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.bench_doubling", bench)
    monkeypatch.setattr(gpu_case, "fused_backends", lambda op, device: ("right", "wrong"))
    return Doubling(name="thousand", kind="benchmark")


def test_times_a_case_beside_its_peer_and_a_copy_but_not_what_is_wrong(doubling: Doubling) -> None:
    arguments = argparse.Namespace(device="cpu", rounds=5, peers=["eager"])
    rows = gpu_case.time_case(doubling, torch.float32, "forward+backward", arguments)
    by_provider = {row["provider"]: row for row in rows}
    assert set(by_provider) == {"wrong", "right", "eager", "copy"}
    assert "is wrong, so it is not timed" in by_provider["wrong"]["error"]
    assert "median_ms" not in by_provider["wrong"]
    for provider in ("right", "eager", "copy"):
        row = by_provider[provider]
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["bytes"] == 2 * 2 * 1000 * 4
        assert row["rounds"] == 5
    assert by_provider["copy"]["share_of_copy"] == 1.0
    assert "flop" not in by_provider["copy"]
    assert by_provider["right"]["flop"] == 2000
    json.dumps(rows)


def test_times_bf16_on_a_gpu_as_well(doubling: Doubling) -> None:
    assert gpu_case.timed_dtypes(doubling, "cpu") == [torch.float32]
    assert gpu_case.timed_dtypes(doubling, "cuda") == [torch.float32, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_times_on_the_gpu() -> None:
    x = torch.randn(1 << 24, device="cuda")
    times, launches = gpu_case.interleaved({"double": lambda: x * 2}, torch.device("cuda"), 5)
    assert len(times["double"]) == len(launches["double"]) == 5
    assert all(0 < t < 1 for t in times["double"])


def test_runs_from_the_command_line_and_is_quick_to_refuse(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    import subprocess

    environment = {**os.environ, "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    result = subprocess.run(
        command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
