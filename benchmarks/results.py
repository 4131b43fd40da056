"""Where results are kept: JSON lines in ``benchmarks/results/<device>/<date>-<commit>.jsonl``.

A file begins with the machine, and says it again where something of it has changed; every other
row has a ``suite`` and what identifies it. A row replaces an earlier one of the same
identity, so a suite can be repeated, or a run resumed, into the same file.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused_attn import _extension

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
IDENTITY = (
    "suite", "stage", "label", "op", "backend", "model", "task", "case", "dimension", "value",
    "dtype", "direction", "provider",
)  # fmt: skip
"""What tells rows apart, of any suite."""
PACKAGES = ("triton", "transformers", "ctranslate2", "onnxruntime", "liger-kernel", "numpy")
# Of the machine's row, what may change without its being another machine.
_VOLATILE = ("started", "clocks")

Row = dict[str, Any]


@dataclass
class Run:
    """A file of results."""

    path: Path
    machine: Row
    rows: list[Row] = field(default_factory=list)
    """The last of each identity, in the order in which they first came."""

    def suite(self, name: str) -> list[Row]:
        """The rows of a suite."""
        return [row for row in self.rows if row["suite"] == name]


class Writer:
    """Appends rows to a file, each at once: the process may be gone a moment later."""

    def __init__(self, path: Path, machine: Row) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._machine: Row | None = None
        if path.exists():
            machines = (r for r in reversed(_lines(path)) if r.get("suite") == "machine")
            self._machine = next(machines, None)
        self._file = path.open("a", encoding="utf-8")
        self.restate(machine)

    def restate(self, machine: Row) -> None:
        """Write the machine again where something of it has changed."""
        if self._machine is None or _lasting(self._machine) != _lasting(machine):
            self.add(machine)
            self._machine = machine

    def add(self, row: Row) -> None:
        """Write a row; paths in its errors are the repository's own.

        Raises:
            ValueError: It has no suite.
        """
        if "suite" not in row:
            raise ValueError(f"a row of results must have a suite: {row}")
        self._file.write(json.dumps(row).replace(f"{ROOT}/", "") + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> Run:
    """A file of results; a line that was cut off is left out.

    Raises:
        ValueError: The first row is not a machine.
    """
    rows = _lines(path)
    if not rows or rows[0].get("suite") != "machine":
        raise ValueError(f"{path}:1: results begin with a row of suite 'machine'")
    last: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.get("suite") not in (None, "machine"):
            last[identity(row)] = row
    machine = [row for row in rows if row.get("suite") == "machine"][-1]
    return Run(path, machine, list(last.values()))


def identity(row: Row) -> tuple[Any, ...]:
    """What tells a row from others: of two with the same, the later counts."""
    return tuple(row.get(name) for name in IDENTITY)


def newest(folder: Path = FOLDER) -> dict[str, list[Run]]:
    """By device, its runs from the newest back, by the time at which they started."""
    found: dict[str, list[Run]] = {}
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        runs = [read(path) for path in device.glob("*.jsonl")]
        if runs:
            runs.sort(key=lambda run: (run.machine["started"], run.path.name), reverse=True)
            found[device.name] = runs
    return found


def writer(device: str, out: Path | None = None) -> Writer:
    """Of this machine and commit, today: in its folder, or in ``out``.

    Args:
        device: ``cpu`` or ``cuda``.
        out: A folder, or a file whose name ends in ``.jsonl``. Default: under :data:`FOLDER`.
    """
    machine = describe(device)
    if out is not None and out.suffix == ".jsonl":
        return Writer(out, machine)
    return Writer((out or FOLDER / machine["folder"]) / file_name(machine), machine)


def file_name(machine: Row) -> str:
    """``<date>-<commit>.jsonl``; of a tree with changes, ``<date>-<commit>-changed.jsonl``."""
    commit = machine["commit"] or "unknown"
    changed = "-changed" if machine["changed"] else ""
    return f"{machine['started'][:10]}-{commit[:7]}{changed}.jsonl"


def describe(device: str) -> Row:
    """The machine and the versions, as a row.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    # Of a copy of the tree, git may know nothing, or something else.
    named = os.environ.get("FUSED_ATTN_COMMIT")
    status = None if named else _output(["git", "status", "--porcelain", "--untracked-files=no"])
    row: Row = {
        "suite": "machine",
        "device": device,
        "name": cpu_name(),
        "cpu": _cpu_kind(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "our_instructions": "none" if _extension.load() else _extension.cpu_instruction_set(),
        **{package: version(package) for package in PACKAGES},
        "commit": named or _output(["git", "rev-parse", "HEAD"]),
        "changed": bool(status),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version"),
            "clocks": clocks(),
        }
    row["folder"] = device_folder(row)
    return row


def device_folder(machine: Row) -> str:
    """``nvidia-h200``; of a CPU with the instruction set that ours uses: ``amd-epyc-avx512``."""
    name = machine["name"]
    if machine["device"] == "cpu":
        name = re.sub(r"\(.*?\)|\b(cpu|processor)\b|@.*", " ", name, flags=re.IGNORECASE)
        name = f"{name} {machine['our_instructions']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def clocks() -> Row | None:
    """Clocks in MHz, temperature and power of the GPU now; None where nothing tells them."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    values = _nvidia_smi(",".join(names))
    if values is None:
        return None
    return dict(zip(names, (value.strip() for value in values.split(",")), strict=True))


def cpu_name() -> str:
    """The processor, as the system calls it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cpu_kind() -> str | None:
    """Family and model, which tell processors apart that a hypervisor gives one name."""
    path = Path("/proc/cpuinfo")
    fields = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    known = [
        f"{name.split()[-1]} {fields[name]}" for name in ("cpu family", "model") if name in fields
    ]
    return ", ".join(known) or None


def version(package: str) -> str | None:
    """Of an installed package; None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """As rows have it."""
    return str(dtype).removeprefix("torch.")


def last_line(text: str) -> str:
    """The line that says most of an error."""
    return (text.strip().splitlines() or [""])[-1]


def problem(row: Row) -> str:
    """Why a row has no times, in a line: ``absent, ...`` or ``failed, ...``; empty if it has."""
    found = (f"{kind}, {last_line(row[kind])}" for kind in ("absent", "failed") if kind in row)
    return next(found, "")


def _lasting(machine: Row) -> Row:
    return {name: value for name, value in machine.items() if name not in _VOLATILE}


def _lines(path: Path) -> list[Row]:
    return list(_parsed(path.read_text(encoding="utf-8").splitlines()))


def _parsed(lines: list[str]) -> Iterator[Row]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # cut off when the process was killed
            continue


def _nvidia_smi(query: str) -> str | None:
    query = f"--query-gpu={query}"
    return _output(["nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits"])


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
