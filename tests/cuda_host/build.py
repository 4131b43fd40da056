"""Builds the CUDA kernels for execution on this CPU.

    python -m tests.cuda_host.build [--flavour plain|asan|tsan] [--op add_layer_norm]

prints the library's path, for ``FUSED_ATTN_CUDA_HOST``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.static.cuda import units_module

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HOST = ROOT / "tests" / "cuda_host"
BUILD = ROOT / "build" / "cuda_host"

FLAVOURS = {
    "plain": ["-O2"],
    "asan": [
        *["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        # Together these take more time to compile than all that is left, and say little of
        # kernels.
        "-fno-sanitize=null,vptr,object-size,return,nonnull-attribute,returns-nonnull-attribute,"
        "pointer-overflow,builtin",
        # Calls instead of code in line, for the same reason.
        *["--param", "asan-instrumentation-with-call-threshold=0"],
    ],
    "tsan": ["-O1", "-fsanitize=thread"],
}
# What the sanitizers' libraries have of the units, so that they compile in a minute: the kernels
# of other types are instances of the same templates.
SANITIZED = {
    "add_layer_norm": ("bfloat16",),
    "attention": ("bfloat16",),
    "beam_search": ("bfloat16",),
    "decode_attention": ("bfloat16", "float32"),  # only 16-bit types have matrix products
}
_UNIT_OF_DTYPE = {"bfloat16": "nv_bfloat16", "float16": "half", "float32": "float"}
# A fiber switch is a call that the compiler cannot see through, and every value in memory may
# have changed after it; products and sums round one by one, as written.
KERNEL_FLAGS = [
    *["-std=c++20", "-x", "c++", "-g1", "-fPIC", "-march=native", "-DFUSED_ATTN_CUDA_HOST"],
    *["-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Werror"],
    *["-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-maybe-uninitialized"],
    *["-Wno-unused-but-set-variable", "-Wno-unused-variable", "-Wno-class-memaccess"],
]
# The bindings take no part in what is checked: one build of them serves every flavour.
BINDING_FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-DFUSED_ATTN_CUDA_HOST", "-Wall"]


def cuda_headers() -> Path | None:
    """The folder of CUDA's headers: a toolkit's, or those that the Triton package has."""
    candidates = [Path(home, "include") for home in (os.environ.get("CUDA_HOME"),) if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    return next((path for path in candidates if (path / "cuda_fp16.h").is_file()), None)


def missing() -> str:
    """What execution on the CPU lacks here; empty when it has everything."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if shutil.which("ninja", path=_path()) is None:
        return "ninja is not installed"
    if cuda_headers() is None:
        return "there are no CUDA headers (Triton's package has them)"
    if os.uname().machine != "x86_64":
        return "fibers are written for x86-64"
    return ""


def header_flags() -> list[str]:
    """Where CUDA's headers are."""
    return [f"-isystem{HOST / 'headers'}", f"-isystem{cuda_headers()}"]


def include_flags() -> list[str]:
    """Folders of what kernels and tests of the rig include."""
    return [f"-I{CSRC}", f"-I{HOST}", *header_flags()]


def build(flavour: str = "plain", ops: Sequence[str] = ()) -> Path:
    """Compile what has changed and return the library's path; one process at a time.

    Args:
        flavour: A key of :data:`FLAVOURS`.
        ops: Only these, for a quick try; default: all.
    """
    reason = missing()
    if reason != "":
        raise RuntimeError(f"the CUDA kernels cannot be executed here: {reason}")
    name = "_".join(["fused_attn_cuda_host", flavour, *ops])
    library = BUILD / f"lib{name}.so"
    with _locked():
        _run_ninja("bindings", _binding_lines(), _bindings(ops))
        _run_ninja(name, _library_lines(flavour, ops, BUILD / name, library))
    return library


def build_program(name: str, flavour: str) -> Path:
    """Compile ``tests/cuda_host/<name>.cpp``, a program by itself, and return its path."""
    program = BUILD / f"{name}_{flavour}"
    with _locked():
        flags = [*FLAVOURS[flavour], *KERNEL_FLAGS, *include_flags()]
        lines = [*_RULES, f"build {program}: program {HOST / f'{name}.cpp'}"]
        _run_ninja(program.name, [*lines, f"  flags = {' '.join(flags)}"])
    return program


def environment(flavour: str, schedule: str = "", preload: bool = True) -> dict[str, str]:
    """Variables for a process that runs kernels in this flavour.

    Args:
        flavour: A key of :data:`FLAVOURS`.
        schedule: Words such as ``random seed=3 early``: tests/cuda_host/block.h.
        preload: The process is not compiled with the sanitizer itself: Python.
    """
    variables = {"CUDA_HOST_SCHEDULE": schedule}
    runtimes = {"asan": ["libasan.so", "libubsan.so"], "tsan": ["libtsan.so"]}.get(flavour, [])
    if runtimes and preload:
        variables["LD_PRELOAD"] = " ".join(_runtime(name) for name in runtimes)
    if flavour == "asan":
        variables["ASAN_OPTIONS"] = "detect_leaks=0"
        variables["UBSAN_OPTIONS"] = "print_stacktrace=1"
    if flavour == "tsan":
        # Python and torch are not compiled for it; OpenMP's barriers would look like races.
        variables["TSAN_OPTIONS"] = "ignore_noninstrumented_modules=1 halt_on_error=1"
        variables["OMP_NUM_THREADS"] = "1"
    return variables


def _runtime(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


_RULES = (
    "rule compile",
    "  command = g++ $flags -MMD -MF $out.d -c $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
    "rule program",
    "  command = g++ $flags -MMD -MF $out.d $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
    "rule weaken",
    "  command = objcopy --weaken $in $out",
    "rule link",
    "  command = g++ -shared $flags $in -o $out $libraries",
)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One build at a time, whoever asks for it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_ninja(name: str, lines: Sequence[str], targets: Sequence[Path] = ()) -> None:
    file = BUILD / f"{name}.ninja"
    file.write_text("\n".join([f"builddir = {BUILD / name}.log", *lines]) + "\n")
    command = ["ninja", "-f", str(file), *(str(target) for target in targets)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": _path()},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"building {name} failed:\n{result.stdout}{result.stderr}")


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include"]


def _bindings(ops: Sequence[str]) -> list[Path]:
    """The bindings' object files."""
    sources = [s for s in CSRC.glob("*/*_cuda.cpp") if not ops or s.parent.name in ops]
    return [BUILD / "bindings" / f"{source.stem}.o" for source in sorted(sources)]


def _binding_lines() -> list[str]:
    lines = list(_RULES)
    flags = " ".join([*BINDING_FLAGS, *include_flags(), *_torch_flags()])
    for source in sorted(CSRC.glob("*/*_cuda.cpp")):
        out = BUILD / "bindings" / f"{source.stem}.o"
        lines.extend([f"build {out}: compile {source}", f"  flags = {flags}"])
    return lines


def _library_lines(flavour: str, ops: Sequence[str], folder: Path, library: Path) -> list[str]:
    lines = list(_RULES)
    objects = []

    def compile(source: Path, out: Path, flags: Sequence[str]) -> None:
        objects.append(out)
        lines.extend([f"build {out}: compile {source}", f"  flags = {' '.join(flags)}"])

    kernel_flags = [*FLAVOURS[flavour], *KERNEL_FLAGS, *include_flags()]
    for unit in units_module().write_units(BUILD / "units"):
        op, kind = unit.stem.split("_cuda_")
        wanted = [_UNIT_OF_DTYPE[dtype] for dtype in SANITIZED[op]]
        if (not ops or op in ops) and (
            flavour == "plain" or any(kind.startswith(name) for name in wanted)
        ):
            compile(unit, folder / f"{unit.stem}.o", kernel_flags)
    compile(HOST / "library.cpp", folder / "library.o", [*kernel_flags, *_torch_flags()])
    for binding in _bindings(ops):
        objects.append(binding)
        if flavour != "plain":
            # Calls of a kernel that this library lacks need not be resolved to load it.
            objects[-1] = folder / f"{binding.stem}.weak.o"
            lines.append(f"build {objects[-1]}: weaken {binding}")
    libraries = Path(torch.__file__).parent / "lib"
    return [
        *lines,
        f"build {library}: link {' '.join(str(o) for o in objects)}",
        f"  flags = {' '.join(FLAVOURS[flavour])}",
        f"  libraries = -L{libraries} -Wl,-rpath,{libraries} -ltorch -ltorch_cpu -lc10",
    ]


def main() -> None:
    """Build, and print the path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flavour", choices=FLAVOURS, default="plain")
    parser.add_argument("--op", action="append", default=[], help="only this op; repeatable")
    arguments = parser.parse_args()
    print(build(arguments.flavour, arguments.op))


if __name__ == "__main__":
    main()
