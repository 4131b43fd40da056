"""Compiles launches of Triton kernels for GPUs that are not there, and reads the result.

A stand-in driver names the target, and every launch is turned into a compilation. That happens in a
process of its own, :class:`Compiler`'s: where ``TRITON_INTERPRET`` is set, as in the tests, kernels
would be interpreted functions.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Of these the machine code is read, as triton's own disassembler lists it, instead of the PTX: the
# tests count their accesses. It takes as long as compiling.
DISASSEMBLED = ("add_layer_norm",)

Report = dict[str, Any]


class Compiler:
    """A process that compiles; a context manager."""

    def __init__(self) -> None:
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            # A cache hit would skip the assembler, whose log has the registers and spills.
            env={**clean, "TRITON_ALWAYS_COMPILE": "1", "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def compile(self, target: str, op: str, arguments: dict[str, Any]) -> list[Report]:
        """Reports of the kernels that a call of an op launches, in order.

        Args:
            target: One of ``TRITON_TARGETS``.
            op: One of :data:`fused_attn.validation.OPS`.
            arguments: Of the op's ``launch``.

        Raises:
            RuntimeError: It does not compile.
        """
        job = {"target": target, "op": op, "arguments": arguments}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if reply == "":
            self._errors.seek(0)
            raise RuntimeError(f"{op} for {target} ended the compiler:\n{self._errors.read()}")
        answer = json.loads(reply)
        if "failed" in answer:
            raise RuntimeError(f"{op} for {target} does not compile: {answer['failed']}")
        return answer["reports"]


class _StandInDriver:
    """What Triton asks of a driver when it compiles without launching."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend}-{self._target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0


class _Recorder:
    """Takes the place of ``JITFunction.run``."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._known: dict[str, Report] = {}
        self.reports: list[Report] = []
        self.is_disassembled = False

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        import triton

        log = io.StringIO()
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = self._run(kernel, *args, grid=grid, warmup=True, **options)
        # A kernel launched before with the same specialisation is not compiled again.
        if compiled.hash not in self._known:
            report = _report(kernel.__name__, compiled, log.getvalue())
            if self.is_disassembled and "cubin" in compiled.asm:
                report |= sass_accesses(_disassembled(compiled.asm["cubin"]))
            self._known[compiled.hash] = report | {"hash": compiled.hash}
        self.reports.append(self._known[compiled.hash] | {"launch": _launch_words(options)})


def _launch_words(options: dict[str, Any]) -> str:
    """``128x64 8w 2s``: the tile, warps and stages that a launcher chose."""
    blocks = [str(n) for name, n in options.items() if name.startswith("BLOCK")]
    words = ["x".join(blocks)] if blocks else []
    words += [f"{options['num_warps']}w"] if "num_warps" in options else []
    words += [f"{options['num_stages']}s"] if "num_stages" in options else []
    return " ".join(words)


def _report(name: str, compiled: Any, log: str) -> Report:
    def total(pattern: str, text: str) -> int:
        return sum(int(n) for n in re.findall(pattern, text))

    report: Report = {"kernel": name, "shared": compiled.metadata.shared}
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        if not re.search(r"Used \d+ reg", log):
            raise RuntimeError(f"{name}: the assembler printed no resource report")
        report |= {
            "registers": total(r"Used (\d+) reg", log),
            "spills": total(r"(\d+) bytes spill", log),
            "threads": total(r"\.reqntid (\d+)", ptx),
            **_instructions(ptx),
            **_ptx_accesses(ptx),
        }
        if columns := compiled.metadata.tmem_size:
            report["tensor_columns"] = columns
        if "instructions are serialized" in log:
            report["is_serialized"] = True
        if "setmaxnreg" in ptx:
            report["is_specialized"] = True
        return report
    assembly = compiled.asm["amdgcn"]
    return report | {
        "registers": total(r"\.vgpr_count:\s*(\d+)", assembly),
        # Scalar registers are kept in lanes of vector registers, not in memory.
        "spills": 4 * total(r"\.vgpr_spill_count:\s*(\d+)", assembly),
        "threads": total(r"\.max_flat_workgroup_size:\s*(\d+)", assembly),
        "tensor_core": _counts("v_mfma" for _ in re.findall(r"\bv_mfma_", assembly)),
        "async_copies": len(re.findall(r"\b(?:global|buffer)_load_\w+ .*\blds\b", assembly)),
        "bulk_copies": 0,
        "loads": _amd_widths(r"\b(?:global|buffer|flat)_load_(\w+)", assembly),
        "stores": _amd_widths(r"\b(?:global|buffer|flat)_store_(\w+)", assembly),
    }


def _instructions(ptx: str) -> Report:
    return {
        "tensor_core": _counts(
            re.findall(r"\b(wgmma|tcgen05)\.mma(?=[._])|\b(?=mma\.sync)(mma)", ptx)
        ),
        "async_copies": len(re.findall(r"\bcp\.async\.c[ag]\.", ptx)),
        "bulk_copies": len(re.findall(r"\bcp\.async\.bulk\.(?:tensor|shared|global)", ptx)),
    }


def _counts(found: Any) -> dict[str, int]:
    words = ("".join(word) if isinstance(word, tuple) else word for word in found)
    return dict(sorted(Counter(words).items()))


def _ptx_accesses(ptx: str) -> dict[str, dict[str, int]]:
    """Instructions that access global memory, copies to shared memory too, by bits a thread."""
    loads: Counter[str] = Counter()
    for vector, bits in re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        loads[str(int(vector or 1) * int(bits))] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", ptx):
        loads[str(8 * int(size, 0))] += 1
    stores = Counter(
        str(int(vector or 1) * int(bits))
        for vector, bits in re.findall(r"\bst\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", ptx)
    )
    return {"loads": _by_width(loads), "stores": _by_width(stores)}


def _amd_widths(pattern: str, assembly: str) -> dict[str, int]:
    widths = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    found: Counter[str] = Counter()
    for word in re.findall(pattern, assembly):
        # ubyte, sbyte_d16, short_d16_hi, dwordx4
        match = re.match(r"[us]?(byte|short|dword(?:x\d)?)", word)
        if match is None:
            raise RuntimeError(f"an access of unknown width: {word}")
        found[str(widths[match[1]])] += 1
    return _by_width(found)


def _disassembled(cubin: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--no-dataflow", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass_accesses(code: str) -> dict[str, dict[str, int]]:
    """As :func:`_ptx_accesses`, in machine code."""
    found: dict[str, Counter[str]] = {"loads": Counter(), "stores": Counter()}
    for instruction, modifiers in re.findall(r"\b(LDG|LDGSTS|STG)\b((?:\.\w+)*)", code):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        found["stores" if instruction == "STG" else "loads"][width[1] if width else "32"] += 1
    return {kind: _by_width(counts) for kind, counts in found.items()}


def _by_width(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _serve() -> None:
    """Jobs, a line each, from standard input; answers to standard output."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fused_attn.ops import _triton

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    recorder = _Recorder(JITFunction.run)
    JITFunction.run = lambda kernel, *args, **options: recorder(kernel, *args, **options)
    for line in sys.stdin:
        job = json.loads(line)
        target, op = job["target"], job["op"]
        if target.startswith("sm_"):
            gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        else:
            gpu = GPUTarget("hip", target, 64)
        driver.set_active(_StandInDriver(gpu))
        _triton.target.cache_clear()
        recorder.reports = []
        recorder.is_disassembled = op in DISASSEMBLED
        try:
            import_module(f"benchmarks.static.launches.{op}").launch(**job["arguments"])
            answer: dict[str, Any] = {"reports": recorder.reports}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
