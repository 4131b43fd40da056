"""Compiles the CUDA kernels with nvcc, and reads the assembler's report and the machine code."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from .triton import ROOT, sass_accesses

CSRC = ROOT / "csrc"
# Other types' kernels are instances of the same templates.
QUICK_TYPE = "nv_bfloat16"
QUICK_TARGETS = ("sm_90a",)

_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", re.M)


@dataclass
class Kernel:
    """What became of one kernel."""

    symbol: str
    name: str = ""
    """``attention_forward_kernel<__nv_bfloat16, 64, true>``."""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    """Static and dynamic."""
    threads: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    accesses: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode begins so."""
        return sum(n for op, n in self.instructions.items() if re.match(pattern, op))

    def report(self) -> dict[str, Any]:
        """What a row says of it."""
        products = {kind: self.count(kind) for kind in ("HMMA", "HGMMA")}
        return {
            "kernel": self.name,
            "registers": self.registers,
            "spills": self.spills,
            "shared": self.shared,
            "threads": self.threads,
            "tensor_core": {kind: n for kind, n in products.items() if n > 0},
            "async_copies": self.count("LDGSTS"),
            "bulk_copies": self.count("UTMALDG|UTMASTG|UBLKCP"),
            **self.accesses,
        }


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


def absent() -> str:
    """What is missing to compile CUDA kernels; empty if nothing is."""
    if nvcc() is None:
        return "nvcc is not installed"
    if disassembler() is None:
        return "there is no cuobjdump (Triton's package has it)"
    if shutil.which("c++filt") is None:
        return "there is no c++filt (binutils has it)"
    return ""


def version() -> str:
    """The compiler's, such as ``13.0.88``."""
    compiler = nvcc()
    assert compiler is not None
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text.stdout)
    assert match is not None, text.stdout
    return match[1]


def units_module() -> ModuleType:
    """csrc/cuda_units.py, which setup.py shares: translation units, nvcc's flags."""
    sys.path.insert(0, str(CSRC))
    try:
        return importlib.import_module("cuda_units")
    finally:
        sys.path.remove(str(CSRC))


@functools.cache
def _units() -> dict[str, str]:
    """The translation units' names and sources."""
    with tempfile.TemporaryDirectory() as folder:
        units = units_module().write_units(Path(folder))
        return {path.stem: path.read_text() for path in units}


def unit_names(is_quick: bool = False) -> list[str]:
    """Names of the translation units, such as ``attention_cuda_half_64``."""
    return [name for name in _units() if not is_quick or QUICK_TYPE in name]


def compile_unit(unit: str, target: str) -> Compiled:
    """Compile a unit as setup.py does.

    Args:
        unit: One of :func:`unit_names`.
        target: ``sm_80``, ``sm_90a``.

    Raises:
        RuntimeError: It does not compile.
    """
    compiler, reader = nvcc(), disassembler()
    assert compiler is not None
    assert reader is not None
    code = target.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, f"{unit}.cu"), Path(folder, "unit.cubin")
        shared = _shared_sizes(unit)
        source.write_text(_with_sizes(unit, list(shared.values())))
        command = [
            *[compiler, *units_module().NVCC_FLAGS, *COMMON_NVCC_FLAGS],
            *["-Xptxas", "-v", f"-I{CSRC}", "-cubin", "--keep", f"--keep-dir={folder}"],
            *[f"-gencode=arch=compute_{code},code=sm_{code}", "-o", str(cubin), str(source)],
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        report = result.stdout + result.stderr
        if result.returncode != 0:
            raise RuntimeError(f"{unit} for {target} does not compile: {report}")
        (assembly,) = (path.read_text() for path in Path(folder).glob("*.ptx"))
        machine_code = _output([str(reader), "-sass", str(cubin)])
    kernels = _read_report(report)
    for symbol, text in _functions(machine_code):
        kernels[symbol].instructions.update(_OPCODE.findall(text))
        kernels[symbol].accesses = sass_accesses(text)
    for symbol, threads in re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", assembly, re.DOTALL):
        kernels[symbol].threads = int(threads)
    sizes = dict(re.findall(rf"{_SIZE}(\d+) = (\d+);", assembly))
    names = _output(["c++filt"], "\n".join(kernels)).splitlines()
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel.name = _short(name)
        for index, instance in enumerate(shared):
            if kernel.name.startswith(instance):
                kernel.shared += int(sizes[str(index)])
    found = sorted(kernels.values(), key=lambda kernel: kernel.name)
    return Compiled(found, [line for line in report.splitlines() if "warning" in line.lower()])


# Variables that the compiler writes into the PTX with their values.
_SIZE = "fused_attn_static_size_"


def _shared_sizes(unit: str) -> dict[str, str]:
    """What a unit's instances begin with, and C++ for their dynamic shared memory."""
    op, _, kind = unit.partition("_cuda_")
    match = re.fullmatch(r"(\w+?)(?:_(\d+))?", kind)
    assert match is not None
    words = {"T": match[1] if match[1] == "float" else f"__{match[1]}", "D": match[2] or ""}
    sizes = getattr(importlib.import_module(f"{__package__}.launches.{op}"), "CUDA_SHARED", {})
    return {name.format(**words): size.format(**words) for name, size in sizes.items()}


def _with_sizes(unit: str, sizes: Sequence[str]) -> str:
    lines = [_units()[unit], "namespace fused_attn {"]
    for index, size in enumerate(sizes):
        lines.append(f'extern "C" __device__ int {_SIZE}{index} = {size};')
    return "\n".join([*lines, "}", ""])


def _read_report(report: str) -> dict[str, Kernel]:
    """The assembler's report, by the kernel's symbol."""
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernels.setdefault(match[1], Kernel(match[1]))
        elif kernel is not None and (
            match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            kernel.spills = int(match[1]) + int(match[2])
        elif kernel is not None and (match := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(match[1])
            static = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(static[1]) if static else 0
    return kernels


def _functions(dump: str) -> list[tuple[str, str]]:
    """Symbol and machine code of each kernel."""
    parts = re.split(r"^\s*Function : (\w+)$", dump, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _short(name: str) -> str:
    """``void fused_attn::a::kernel<float, 4>(Params)`` without all but the kernel's instance."""
    name = name.removeprefix("void ").replace("fused_attn::", "")
    name = name[: name.rindex("(")]
    head, bracket, arguments = name.partition("<")
    return head.rpartition("::")[2] + bracket + arguments


def _output(command: Sequence[str], text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
