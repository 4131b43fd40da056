"""``python -m benchmarks.gpu``: everything that needs a GPU, in ten minutes and without a network.

For a machine that is at hand only for minutes. The stages run in order of value, each in a
process of its own under a limit of time, so a crash or a hanging kernel costs one stage:

1. ``build``: the C++ extension, in place.
2. ``validate``: every kernel against the fp64 oracle, on the GPU.
3. ``tests``: pytest, those that need a GPU.
4. ``sanitizer``: compute-sanitizer's memcheck and racecheck over the CUDA C++ kernels, where it is
   installed.
5. ``operators``: times, one process a benchmark case (`benchmarks.gpu_case`).

Results are JSON lines in ``results.jsonl``, written as they come; what fails or takes too long is
a row with its error. What else a stage prints is in ``<stage>.log``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from fused_attn.validation import OPS, op_backends

from .operators import benchmark_cases
from .results import machine_line

ROOT = Path(__file__).resolve().parents[1]
# Tests first: their processes compile the kernels, which validation finds in Triton's cache.
STAGES = ("build", "tests", "validate", "sanitizer", "operators")
SECONDS = {
    "build": 180.0,
    "tests": 330.0,
    "validate": 120.0,
    "sanitizer": 150.0,
    "operators": 75.0,
}
"""The limit of a stage; of ``sanitizer`` and ``operators``, that of each process."""
SANITIZERS = ("memcheck", "racecheck")
TOTAL_SECONDS = 570.0
# Files outside these folders may need packages (sacreBLEU) that a borrowed machine lacks, and have
# no test that needs a GPU.
GPU_TESTS = (
    "tests/ops",
    "tests/nn",
    "tests/models/test_generation.py",
    "tests/models/test_rnn_gpu.py",
    "tests/benchmarks",
)
# What to ask of an op before the extension is built, when availability cannot be asked yet.
DEVICE_BACKENDS = {"cuda": {"triton", "cuda"}, "cpu": {"cpu"}}
# Enough of a traceback to act on, when the machine is gone.
ERROR_LINES = 40


@dataclass(frozen=True)
class Stage:
    """A command, under a limit of time."""

    name: str
    command: tuple[str, ...]
    seconds: float
    label: str = ""
    """Tells apart several processes of one stage."""


class Results:
    """The folder of a run: ``results.jsonl`` and one log a stage."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for stage in STAGES:  # those of an earlier run into this folder
            (folder / f"{stage}.log").unlink(missing_ok=True)
        self._file = (folder / "results.jsonl").open("w", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Write a row at once: the process, or the machine, may be gone a moment later."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def log(self, stage: str) -> IO[str]:
        """The stage's log, to append to."""
        return (self.folder / f"{stage}.log").open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def run_stage(stage: Stage, results: Results, seconds: float) -> bool:
    """Run a stage's command; whether it succeeded within its time.

    Lines of its standard output that are JSON objects become rows; all else goes to its log.
    """
    head = {"stage": stage.name, **({"label": stage.label} if stage.label else {})}
    started = time.monotonic()
    last: deque[str] = deque(maxlen=ERROR_LINES)
    with results.log(stage.name) as log:
        # Read back for the error of a stage that fails: where this process begins in the log.
        beginning = log.tell()
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def read(lines: IO[str]) -> None:
            for line in lines:
                row = _as_row(line)
                if row is None:
                    log.write(line)
                    log.flush()
                    last.append(line.strip())
                else:
                    results.add({**head, **row})
                    _show(stage, row)

        assert process.stdout is not None
        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # The whole group: a compiler's workers, too, must not slow down the next stage.
            _kill_group(process)
            process.wait()
            reader.join(timeout=5)
    status = "timed out" if code is None else ("passed" if code == 0 else "failed")
    row = {
        **head,
        "status": status,
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": round(seconds, 1),
        "last_line": next((line for line in reversed(last) if line), ""),
    }
    if status != "passed":
        with (results.folder / f"{stage.name}.log").open(encoding="utf-8", errors="replace") as log:
            log.seek(beginning)
            row["error"] = "".join(deque(log, maxlen=ERROR_LINES))
    results.add(row)
    print(f"{' '.join(head.values())}: {status} in {row['seconds']} s  {row['last_line']}")
    if status != "passed":
        print(row["error"].rstrip(), flush=True)
    return status == "passed"


def run_stages(stages: Sequence[Stage], results: Results, total_seconds: float) -> int:
    """Run stages in order, whatever becomes of each, while there is time.

    Returns:
        The number of stages that failed, took too long, or found no time left.
    """
    deadline = time.monotonic() + total_seconds
    failures = 0
    for stage in stages:
        left = deadline - time.monotonic()
        if left < 1:
            results.add({"stage": stage.name, "label": stage.label, "status": "no time left"})
            print(f"{stage.name} {stage.label}: no time left", flush=True)
            failures += 1
            continue
        failures += not run_stage(stage, results, min(stage.seconds, left))
    return failures


def plan(
    names: Sequence[str], device: str, ops: Sequence[str], peers: Sequence[str], rounds: int
) -> list[Stage]:
    """The stages' commands for a device; their order is that of :data:`STAGES`."""
    python = sys.executable
    # The options of pyproject.toml are for plugins that a borrowed machine may lack.
    pytest = (python, "-m", "pytest", "-o", "addopts=", "-ra", "-q", "--strict-markers")
    if importlib.util.find_spec("xdist") is not None:
        pytest = (*pytest, "-n", str(max((os.cpu_count() or 2) - 2, 1)), "--dist", "worksteal")
    marker = "gpu" if device == "cuda" else "not gpu and not slow"
    commands = {
        "build": (python, "setup.py", "build_ext", "--inplace"),
        "tests": (*pytest, "-m", marker, *GPU_TESTS),
        "validate": (python, "-m", "fused_attn", "validate", "--device", device, "--json"),
    }
    stages = [
        Stage(name, command, SECONDS[name]) for name, command in commands.items() if name in names
    ]
    if "sanitizer" in names and device == "cuda" and shutil.which("compute-sanitizer"):
        # A process that finds something ends with another status than one whose cases all pass.
        cases = (python, "-m", "fused_attn", "validate", "--device", device, "--json")
        cases = (*cases, "--backend", "cuda", "--kind", "typical")
        stages += [
            Stage(
                "sanitizer",
                ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *cases),
                SECONDS["sanitizer"],
                tool,
            )
            for tool in SANITIZERS
        ]
    if "operators" not in names:
        return stages
    common = ("--device", device, "--rounds", str(rounds), "--peers", *peers)
    for op in ops:
        if not DEVICE_BACKENDS[device] & set(op_backends(op)):
            print(f"operators {op}: left out, it has no kernel for {device}")
            continue
        for case in benchmark_cases(op, device):
            command = (python, "-m", "benchmarks.gpu_case", op, case.name, *common)
            label = f"{op} {case.name}"
            stages.append(Stage("operators", command, SECONDS["operators"], label))
    return stages


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions: the first row."""
    row: dict[str, Any] = {
        "machine": machine_line(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of_triton(),
        "commit": _output(["git", "rev-parse", "HEAD"]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _output(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            ),
        }
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when all of them passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--op", action="append", choices=OPS, help="operators: only this op")
    parser.add_argument(
        "--peers", nargs="+", choices=("eager", "compile"), default=["eager", "compile"]
    )
    parser.add_argument("--rounds", type=int, default=50, help="operators: turns of each (50)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse without a GPU"
    )
    parser.add_argument("--out", type=Path, help="default: $OUT, or benchmarks/results/<device>/")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all (570)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        print(f"no CUDA GPU here ({why}); --device cpu rehearses the run", file=sys.stderr)
        return 2
    # The children are in sessions of their own and would outlive a plain termination.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    row = describe(arguments.device)
    folder = arguments.out or Path(os.environ.get("OUT") or _results_folder(row))
    results = Results(folder)
    results.add({"stage": "machine", **row})
    print(f"{row.get('gpu', row['machine'])}, torch {row['torch']}, triton {row['triton']}")
    try:
        stages = plan(
            arguments.stages,
            arguments.device,
            arguments.op or OPS,
            arguments.peers,
            arguments.rounds,
        )
        failures = run_stages(stages, results, arguments.seconds)
    finally:
        results.close()
    passed = len(stages) - failures
    print(f"{passed} passed, {failures} not, {time.monotonic() - started:.0f} s: {folder}")
    return 1 if failures or not stages else 0


def _as_row(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _show(stage: Stage, row: dict[str, Any]) -> None:
    if stage.name == "validate" and row.get("verdict") not in ("passed", "refused"):
        print(f"  {row.get('verdict')}: {json.dumps(row)}", flush=True)
    if stage.name != "operators":
        return
    head = f"  {stage.label} {row.get('dtype')} {row.get('direction')} {row.get('provider')}"
    if "error" in row:
        print(f"{head}: {row['error'].strip().splitlines()[-1]}", flush=True)
        return
    line = f"{head}: {row['median_ms']:.4f} ms ({row['p20_ms']:.4f}-{row['p80_ms']:.4f})"
    if row.get("share_of_copy"):
        line += f", {row['gb_per_s']:.0f} GB/s, {row['share_of_copy']:.0%} of a copy"
    if row.get("tflop_per_s"):
        line += f", {row['tflop_per_s']:.1f} TFLOP/s"
    print(line, flush=True)


def _kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _results_folder(row: dict[str, Any]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", row.get("gpu", "cpu-rehearsal").lower()).strip("-")
    return ROOT / "benchmarks" / "results" / name


def _version_of_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
