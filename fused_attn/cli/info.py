"""``fused-attn info``: what is installed here, and which kernels can run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused_attn import __version__, _extension
from fused_attn.ops._backend import BACKENDS, unavailable_reason
from fused_attn.validation import OPS, op_backends

_LIBRARIES = ("triton", "sentencepiece", "sacrebleu", "safetensors", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found."""
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else _as_text(found))
    return 0


def collect() -> dict[str, Any]:
    """Versions, hardware, and for each op the state of each backend and device."""
    missing = _extension.load()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {
            "fused_attn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in _LIBRARIES},
            "C++ compiler": _first_line([os.environ.get("CXX", "c++"), "--version"]),
            "nvcc": _last_line(["nvcc", "--version"]),
        },
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "extension": {
            "loaded": missing is None,
            "missing": missing,
            "instruction_set": None if missing else _extension.cpu_instruction_set(),
            "compiled_for": [] if missing else _extension.compiled_instruction_sets(),
            "cuda": None if missing else _cuda_kernels(),
        },
        "backends": {
            device: {name: unavailable_reason(name, device) for name in BACKENDS}
            for device in devices
        },
        "ops": {op: {name: name in op_backends(op) for name in BACKENDS} for op in OPS},
    }


def _cuda_kernels() -> str:
    """Architectures that they were compiled for, or why there are none."""
    reason = _extension.cuda_unavailable_reason()
    return reason or f"built for {torch.ops.fused_attn_C.cuda_architectures()}"


def _as_text(found: dict[str, Any]) -> str:
    lines = [f"{name:16}{value or 'not found'}" for name, value in found["versions"].items()]
    machine, extension = found["machine"], found["extension"]
    lines.append(
        f"{'machine':16}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    )
    lines.append(f"{'GPUs':16}{', '.join(machine['gpus']) or 'none'}")
    if extension["loaded"]:
        sets = ", ".join(extension["compiled_for"])
        lines.append(f"{'C++ kernels':16}use {extension['instruction_set']} (compiled for {sets})")
    else:
        lines.append(f"{'C++ kernels':16}absent: {extension['missing']}")
    lines.append("")
    lines.append(f"{'kernels of':16}{'op':25}" + "".join(f"{name:12}" for name in BACKENDS))
    notes = []
    for device, reasons in found["backends"].items():
        for op, has in found["ops"].items():
            states = [
                "-" if not has[name] else ("no" if reasons[name] else "yes") for name in BACKENDS
            ]
            lines.append(f"{device:16}{op:25}" + "".join(f"{state:12}" for state in states))
        notes += [
            f"  {name} on {device} tensors: {reason}" for name, reason in reasons.items() if reason
        ]
    lines.append("yes: can run here; no: see below; -: this op has no such kernel")
    return "\n".join(lines + notes)


def _version(library: str) -> str | None:
    if importlib.util.find_spec(library) is None:
        return None
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _command(words: list[str]) -> list[str]:
    if shutil.which(words[0]) is None:
        return []
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    return [line for line in result.stdout.splitlines() if line.strip()]


def _first_line(words: list[str]) -> str | None:
    return next(iter(_command(words)), None)


def _last_line(words: list[str]) -> str | None:
    return next(iter(reversed(_command(words))), None)


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
