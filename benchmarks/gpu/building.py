"""The stage ``build``: the extension, and the assembler's report on each of its kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fused_attn import _extension

from ..results import Row
from .session import ENVIRONMENT, Outcome, Session, of_ending

_ERRORS, _ERROR_CHARACTERS = 20, 300


class ResourceReport:
    """Reads the assembler's report on each kernel, and errors, from the compilers' output."""

    def __init__(self) -> None:
        self.kernels: dict[str, Row] = {}
        """By mangled name."""
        self.errors: list[str] = []
        self._kernel: Row = {}

    def read(self, line: str) -> None:
        """A line of the output."""
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            self._kernel = self.kernels.setdefault(match[1], {"target": match[2]})
        elif match := re.search(r"(\d+) bytes stack\D+(\d+) bytes spill\D+(\d+) bytes spill", line):
            self._kernel |= {"stack_bytes": int(match[1])}
            self._kernel |= {"spills": int(match[2]) + int(match[3])}
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            self._kernel |= {"registers": int(match[1])}
            self._kernel |= {"shared": int(shared[1]) if shared else 0}
            self._kernel = {}
        elif re.search(r"\berror\b", line) and len(self.errors) < _ERRORS:
            self.errors.append(line.strip()[:_ERROR_CHARACTERS])

    def rows(self) -> list[Row]:
        """A row a kernel, by its name in C++."""
        names = list(self.kernels)
        readable = names
        if shutil.which("c++filt"):
            text = subprocess.run(
                ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True
            ).stdout
            lines = text.splitlines()
            readable = lines if len(lines) == len(names) else names
        return [
            {"suite": "build", "case": name.removeprefix("void "), **self.kernels[mangled]}
            for mangled, name in zip(names, readable, strict=True)
        ]


def build(session: Session, seconds: float) -> Outcome:
    """Compile the extension in place."""
    environment = {**ENVIRONMENT, "MAX_JOBS": str(os.cpu_count() or 1), "FUSED_ATTN_CUDA": "0"}
    if session.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas=-v"
        environment |= {
            "FUSED_ATTN_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
            "NVCC_APPEND_FLAGS": flags.strip(),
        }
        toolkit = Path("/usr/local/cuda")
        if shutil.which("nvcc") is None and (toolkit / "bin" / "nvcc").exists():
            environment["CUDA_HOME"] = str(toolkit)
    report = ResourceReport()
    ending = session.run(
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        seconds,
        "build",
        environment=environment,
        on_line=report.read,
    )
    kernels = report.rows()
    for row in kernels:
        session.add(row)
    # What was loaded, or missed, before.
    _extension.load.cache_clear()
    outcome = of_ending(ending)
    if outcome.error:
        # What follows the first of them may fill the end of the output.
        outcome.error = "\n".join([*report.errors, outcome.error])
    outcome.more = {
        "kernels": len(kernels),
        "spilling": sum(row.get("spills", 0) > 0 for row in kernels),
        "most_registers": max((row.get("registers", 0) for row in kernels), default=0),
    }
    return outcome
