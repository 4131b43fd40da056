"""``python -m benchmarks.profile``: where the time of ours goes, in a model and in a kernel.

PyTorch's profiler records a training step of the Transformer, a translation by beam search and a
training step of the RNN: a trace each, for chrome://tracing or Perfetto, and in ``profile.txt``
their operators by time. Of an operators run (``--results``) the kernel that is slowest beside its
roof is run once more under Nsight Compute, where that is installed and permitted; its output is in
``profile.txt``, too.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .models import rnn, transformer_step, translation
from .models.comparison import NO_TIME, OURS, ModelCase, is_ready, synchronized
from .models.sizes import SIZES, Size
from .operators import OURS as OUR_PROVIDERS
from .results import FOLDER, ROOT, Row, Writer, describe, problem, read, writer

LARGEST_TRACE = 4 << 20
"""Bytes: a machine that is lent gives back no large files."""
OPERATORS_SHOWN = 20
# A kernel below is bound by its launch, whatever it does with its bytes.
SHORTEST_MS = 0.02
METRICS = {
    "gpu__time_duration.sum": "duration_ns",
    "dram__bytes_read.sum": "dram_read_bytes",
    "dram__bytes_write.sum": "dram_written_bytes",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
"""What Nsight Compute is asked for, and what a row calls it."""


def traced_cases(size: Size, device: str) -> dict[str, ModelCase]:
    """By the name of its trace, what is recorded."""
    step = transformer_step.cases(size, device)[0]
    recurrent = rnn.cases(size, device)[0]
    search = next(c for c in translation.cases(size, device) if c.task != "greedy")
    return {"transformer_step": step, "beam_search": search, "rnn_step": recurrent}


def trace(name: str, case: ModelCase, device: str, folder: Path) -> Row:
    """Record ours once; the row says where the trace is and what takes the time."""
    call = synchronized(case.prepare(OURS).call, device)
    call()
    started = time.perf_counter()
    call()
    wall = time.perf_counter() - started
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    path = folder / f"trace_{name}.json.gz"
    profile.export_chrome_trace(str(path))
    row = _head(case) | {"wall_ms": wall * 1e3, "trace": path.name}
    row["trace_bytes"] = path.stat().st_size
    if row["trace_bytes"] > LARGEST_TRACE:
        path.unlink()
        row["trace_left_out"] = f"more than {LARGEST_TRACE} bytes"
    averages = profile.key_averages()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    kinds = torch.autograd.DeviceType
    kind = kinds.CUDA if device == "cuda" else kinds.CPU
    own = sorted(
        (
            (getattr(e, field) * 1e-3, e.count, e.key)
            for e in averages
            # Annotations stand around kernels that are counted themselves.
            if e.device_type == kind and not (device == "cuda" and e.is_user_annotation)
        ),
        reverse=True,
    )
    total = sum(milliseconds for milliseconds, _, _ in own)
    row["operators"] = [
        {"operator": key, "calls": count, "self_ms": ms, "share": ms / total if total else 0.0}
        for ms, count, key in own[:OPERATORS_SHOWN]
    ]
    table = averages.table(sort_by=field, row_limit=OPERATORS_SHOWN, max_name_column_width=80)
    _append(folder, f"{case.label}, {case.shape}", table)
    return row


def slowest_kernel(rows: Sequence[Row]) -> Row | None:
    """Of an operators run, the row of ours that is slowest beside its roof; None without any."""
    ours = [
        row
        for row in rows
        if row.get("suite") == "operators"
        and row["provider"] in OUR_PROVIDERS
        and row.get("p50_ms", 0.0) > SHORTEST_MS
        and row.get("share_of_roof", 0.0) > 0.0
    ]
    return min(ours, key=lambda row: row["share_of_roof"], default=None)


def count_in_kernel(results: Path | None, device: str, folder: Path, seconds: float) -> Row:
    """The row of Nsight Compute, or of why there is none."""
    row: Row = {"suite": "profile", "task": "ncu"}
    if results is None:
        return row | {"absent": "no --results of an operators run were given"}
    chosen = slowest_kernel(read(results).rows)
    if chosen is None:
        return row | {"absent": f"{results.name} has no times of our kernels beside their roof"}
    names = ("op", "case", "dtype", "direction", "provider", "p50_ms", "share_of_roof")
    row |= {name: chosen[name] for name in names}
    if device != "cuda":
        return row | {"absent": "Nsight Compute needs a CUDA GPU"}
    ncu = shutil.which("ncu")
    if ncu is None:
        return row | {"absent": "ncu is not installed"}
    if seconds < 1:
        return row | {"absent": NO_TIME}
    command = ncu_command(ncu, chosen)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        said = said if isinstance(said, str) else said.decode(errors="replace")
        _append(folder, "ncu", said)
        return row | {"failed": f"timed out after {seconds:.0f} s: {said[-1000:]}"}
    _append(folder, " ".join(command), done.stdout)
    kernels = parse(done.stdout)
    if not kernels:
        return row | {"failed": f"exit code {done.returncode}: {done.stdout[-1000:]}"}
    return row | {"kernels": kernels}


def ncu_command(ncu: str, row: Row) -> list[str]:
    """Runs a case of an operators row once under Nsight Compute, at the clocks as they are."""
    options = ("--profile-from-start", "off", "--clock-control", "none", "--csv")
    options += ("--target-processes", "all", "--print-units", "base")
    return [
        *(ncu, *options, "--metrics", ",".join(METRICS)),
        *(sys.executable, "-m", "benchmarks.profiled_case", row["op"], row["case"]),
        *("--dtype", row["dtype"], "--direction", row["direction"], "--backend", row["provider"]),
    ]


def parse(output: str) -> list[Row]:
    """Each kernel's metrics, in the order of their launches, of Nsight Compute's CSV."""
    lines = output.splitlines()
    first = next((i for i, text in enumerate(lines) if text.startswith('"ID"')), None)
    if first is None:
        return []
    kernels: dict[str, Row] = {}
    for values in csv.DictReader(lines[first:]):
        name = METRICS.get(values.get("Metric Name") or "")
        if name is None:
            continue
        kernel = kernels.setdefault(values["ID"], {"kernel": values["Kernel Name"]})
        with contextlib.suppress(ValueError):  # "n/a"
            kernel[name] = float(values["Metric Value"].replace(",", ""))
    return list(kernels.values())


def rows_of(
    size: Size, device: str, folder: Path, results: Path | None, seconds: float
) -> Iterator[Row]:
    """All rows, each as soon as it exists; what would begin after ``seconds`` says so."""
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.txt").unlink(missing_ok=True)  # of an earlier run into this folder
    for name, case in traced_cases(size, device).items():
        if time.monotonic() >= deadline:
            yield _head(case) | {"absent": NO_TIME}
            continue
        try:
            yield trace(name, case, device, folder)
        except Exception:
            yield _head(case) | {"failed": traceback.format_exc(limit=-4)}
    yield count_in_kernel(results, device, folder, deadline - time.monotonic())


def line(row: Row) -> str:
    """A row, for the screen."""
    names = ("task", "model", "op", "case", "dtype", "direction", "provider")
    head = " ".join(row[name] for name in names if name in row) + ": "
    if why := problem(row):
        return f"{head}{why}"
    if "kernels" in row:
        return f"{head}{json.dumps(row['kernels'])}"
    most = ", ".join(f"{o['operator']} {o['share']:.0%}" for o in row["operators"][:3])
    return f"{head}{row['wall_ms']:.1f} ms; {most}"


def main(argv: Sequence[str] | None = None) -> int:
    """Record, print and write.

    Returns:
        1 where something failed; else 3 where something was left out for want of time; else 0. (2
        is for options that are wrong, or a GPU that is not here.)
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="--size small")
    parser.add_argument("--size", choices=SIZES, help="of the models (base)")
    parser.add_argument("--results", type=Path, help="of an operators run: a .jsonl file")
    parser.add_argument("--out", type=Path, help="folder; default: results/<device>/profile/")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing later (600)")
    parser.add_argument("--json", action="store_true", help="rows to the screen, and to no file")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if not is_ready(device):
        print("no CUDA GPU here", file=sys.stderr)
        return 2
    size = SIZES[arguments.size or ("small" if arguments.quick else "base")]
    folder = arguments.out or FOLDER / describe(device)["folder"] / "profile"
    screen = sys.stdout
    into: Writer | None = None
    if not arguments.json:
        into = writer(device, folder)
    emit: Callable[[Row], Any] = into.add if into else lambda row: None
    failures = left_out = 0
    with contextlib.redirect_stdout(sys.stderr):
        for row in rows_of(size, device, folder, arguments.results, arguments.seconds):
            emit(row)
            text = json.dumps(row) if into is None else line(row)
            print(text, file=screen, flush=True)
            failures += "failed" in row
            left_out += row.get("absent") == NO_TIME
    if into is not None:
        into.close()
        print(f"{folder}")
    return 1 if failures else 3 if left_out else 0


def _head(case: ModelCase) -> Row:
    row = case.row(OURS)
    return row | {"suite": "profile", "case": f"{case.task}_{case.name}", "task": "trace"}


def _append(folder: Path, title: str, text: str) -> None:
    with (folder / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(f"{title}\n\n{text}\n\n")


if __name__ == "__main__":
    sys.exit(main())
