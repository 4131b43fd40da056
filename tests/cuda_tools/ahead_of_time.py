"""Compiles the CUDA kernels and reads what the compiler made of them; needs nvcc and no GPU.

    python -m tests.cuda_tools.ahead_of_time [--architecture sm_90a] [--unit attention_cuda_half_64]

prints a line a kernel: registers, spilled bytes, static shared memory and instructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from tests.cuda_host.build import BUILD, CSRC, header_flags, units_module

ARCHITECTURES = ("sm_80", "sm_90a")
# Shared memory that a block may have, of which these kernels' static part is at most 48 KiB.
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", re.M)


@dataclass
class Kernel:
    """What became of one kernel."""

    name: str
    registers: int = 0
    spilled_bytes: int = 0
    instructions: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Compiled:
    """What became of one unit on one architecture."""

    kernels: list[Kernel]
    warnings: list[str]


def nvcc() -> str | None:
    """The compiler, if it is here."""
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin", "nvcc").is_file():
        return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def disassembler() -> Path | None:
    """cuobjdump, which Triton's package has."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() else None


def unit_names(only: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Names of the translation units, such as ``attention_cuda_half_64``."""
    return [path.stem for path in units_module().write_units(BUILD / "units", only)]


def compile_unit(name: str, architecture: str) -> Compiled:
    """Compile a unit as setup.py does, and read the assembler's report and the machine code.

    Raises:
        RuntimeError: It does not compile.
    """
    compiler, reader = nvcc(), disassembler()
    assert compiler is not None
    assert reader is not None
    code = architecture.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "unit.cubin")
        command = [
            *[compiler, *units_module().NVCC_FLAGS, *COMMON_NVCC_FLAGS],
            *["-Xptxas", "-v", f"-I{CSRC}", "-cubin"],
            *[f"-gencode=arch=compute_{code},code=sm_{code}", "-o", str(cubin)],
            str(BUILD / "units" / f"{name}.cu"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{name} for {architecture}:\n{result.stdout}{result.stderr}")
        report = result.stdout + result.stderr
        dump = subprocess.run(
            [str(reader), "-sass", str(cubin)], capture_output=True, text=True, check=True
        )
    kernels = _read_report(report)
    for name_, text in _functions(dump.stdout):
        kernels[name_].instructions.update(_OPCODE.findall(text))
    warnings = [line for line in report.splitlines() if "warning" in line.lower()]
    return Compiled(list(kernels.values()), warnings)


def compile_binding(source: Path) -> str:
    """Compile a binding against the headers of a CUDA build of torch; what the compiler said.

    Those of a CPU build are the same but for one file, which is written here.

    Raises:
        RuntimeError: It does not compile.
    """
    torch_include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        absent = Path(folder, "c10", "cuda", "impl", "cuda_cmake_macros.h")
        absent.parent.mkdir(parents=True)
        absent.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
        command = [
            *["g++", "-std=c++20", "-O0", "-Wall", "-Werror", "-fPIC", "-c", str(source)],
            *["-o", str(Path(folder, "binding.o")), f"-I{CSRC}", f"-isystem{folder}"],
            *[f"-isystem{torch_include}", f"-isystem{torch_include}/torch/csrc/api/include"],
            *header_flags(),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{source.name}:\n{result.stderr}")
    return result.stderr


def _read_report(report: str) -> dict[str, Kernel]:
    """The assembler's report, by the kernel's mangled name."""
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernels.setdefault(match[1], Kernel(match[1]))
        elif kernel is not None and (
            match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            kernel.spilled_bytes = int(match[1]) + int(match[2])
        elif kernel is not None and (match := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(match[1])
    return kernels


def _functions(dump: str) -> list[tuple[str, str]]:
    """Name and machine code of each kernel."""
    parts = re.split(r"^\s*Function : (\w+)$", dump, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def main() -> int:
    """Print what became of each kernel; 1 if one spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", action="append", help="repeatable; default: all")
    parser.add_argument("--unit", action="append", help="repeatable; default: all")
    arguments = parser.parse_args()
    spilling = 0
    for name in arguments.unit or unit_names():
        for architecture in arguments.architecture or ARCHITECTURES:
            for kernel in compile_unit(name, architecture).kernels:
                counts = {
                    kind: sum(n for op, n in kernel.instructions.items() if re.match(kind, op))
                    for kind in ("HMMA", "LDG.*128", "LDGSTS.*128", "STG.*128")
                }
                spilling += kernel.spilled_bytes > 0
                print(
                    f"{architecture:8}{name:42}{kernel.registers:4} registers "
                    f"{kernel.spilled_bytes:5} bytes spilled  {counts}  {kernel.name}",
                    flush=True,
                )
    print(f"{spilling} kernels spill")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
