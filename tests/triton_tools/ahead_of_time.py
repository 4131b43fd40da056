"""Compiles the launches of a Triton backend for GPUs that are not there, and reads the result.

    python -m tests.triton_tools.ahead_of_time sm_90 attention [kernels to read] < calls.json

A stand-in driver names the target, and every launch is turned into a compilation, so the
project's own launchers decide signatures, specialisation and launch parameters. Prints one JSON
object a compiled kernel: registers, spills, shared memory, instructions that matter; if asked, for
NVIDIA GPUs, those of the machine code too, as triton's own disassembler lists it. It must be a
process without TRITON_INTERPRET, in which the kernels would be interpreted functions.
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
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes that one block may have.
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}

# Of 16 bytes, in PTX: to registers, or asynchronously to shared memory.
_WIDE_LOAD = (
    r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\S* \[[^]]*\], \[[^]]*\], 0x10\b"
)


def compile_in_subprocess(
    target: str, op: str, calls: list[dict[str, Any]], disassemble: str = ""
) -> list[dict[str, Any]]:
    """Resource reports of the different kernels that calls of an op launch.

    Args:
        target: One of :data:`TARGETS`.
        op: One of :data:`LAUNCHERS`.
        calls: Keyword arguments of the op's launcher.
        disassemble: Count what accesses global memory in the machine code of the kernels whose
            names begin so, for NVIDIA GPUs: ``loads`` and ``stores``, by bits a thread. Reading
            takes longer than compiling. Empty: of none.
    """
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_tools.ahead_of_time", target, op]
    result = subprocess.run(
        [*command, disassemble],
        input=json.dumps(calls),
        # A cache hit would skip the assembler, whose log has the registers and spills.
        env={**clean, "TRITON_ALWAYS_COMPILE": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"compiling for {target} failed:\n{result.stderr[-4000:]}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


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


def _compile(target: str, op: str, calls: list[dict[str, Any]], disassemble: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    driver.set_active(_StandInDriver(gpu))
    launch = JITFunction.run
    reports: list[dict[str, Any]] = []
    seen: set[str] = set()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        log = io.StringIO()
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        # A kernel launched before with the same specialisation is not compiled again.
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            reports.append(_report(kernel.__name__, compiled, log.getvalue()))
            is_read = bool(disassemble) and kernel.__name__.startswith(disassemble)
            if is_read and "cubin" in compiled.asm:
                reports[-1] |= _accesses(compiled.asm["cubin"])

    JITFunction.run = compile_only
    try:
        for call in calls:
            count = len(reports)
            LAUNCHERS[op](**call)
            for report in reports[count:]:
                report["call"] = call
    finally:
        JITFunction.run = launch
    for report in reports:
        print(json.dumps(report))


def _launch_add_layer_norm(
    dtype: str,
    width: int,
    rows: int = 16384,
    dropout_p: float = 0.0,
    is_rms: bool = False,
    x_bias: bool = False,
    residual: bool = True,
    fp32_residual: bool = False,
    fp32_parameters: bool = False,
    return_sum: bool = False,
    fp32_sum: bool = False,
    backward: bool = True,
) -> None:
    """Forward and backward of ``add_layer_norm`` on a GPU of 132 multiprocessors.

    RMSNorm has no bias. Every parameter needs a gradient.
    """
    import torch

    from fused_attn.ops.add_layer_norm import triton as backend

    kind = getattr(torch, dtype)
    parameter_kind = torch.float32 if fp32_parameters else kind
    residual_kind = torch.float32 if fp32_residual else kind
    sum_kind = torch.float32 if fp32_sum else residual_kind

    def of_rows(kind: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, width, dtype=kind, device="meta")

    def parameter() -> torch.Tensor:
        return torch.empty(width, dtype=parameter_kind, device="meta")

    x, grad_output = of_rows(kind), of_rows(kind)
    branch_bias = parameter() if x_bias else None
    stream = of_rows(residual_kind) if residual else None
    weight, bias = parameter(), None if is_rms else parameter()
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p > 0.0 else None
    sum_dtype = sum_kind if return_sum else None
    backend.multiprocessor_count = lambda _: 132
    _, total, mean, rstd = backend.forward(
        x, branch_bias, stream, weight, bias, seed, 1e-5, dropout_p, is_rms, sum_dtype
    )
    if not backward:
        return
    separate = residual and (dropout_p > 0.0 or residual_kind != kind)
    sources = (total, None, None) if return_sum else (x, branch_bias, stream)
    backend.backward(
        grad_output,
        total if return_sum else None,
        *sources,
        mean,
        rstd,
        weight,
        seed,
        dropout_p,
        is_rms,
        return_sum,
        residual_kind if separate else None,
        x_bias,
        True,
        not is_rms,
    )


def _launch_bias_activation_dropout(
    dtype: str,
    width: int,
    activation: str = "gelu",
    gated: bool = False,
    dropout_p: float = 0.1,
    fp32_parameters: bool = False,
    residual: bool = True,
    rows: int = 4096,
) -> None:
    """Forward and backward of ``bias_activation_dropout`` on tensors without memory."""
    import torch

    from fused_attn.ops.bias_activation_dropout import triton as backend

    kind = getattr(torch, dtype)
    columns = 2 * width if gated else width
    x = torch.empty(rows, columns, dtype=kind, device="meta")
    branch, grad = (torch.empty(rows, width, dtype=kind, device="meta") for _ in range(2))
    bias = torch.empty(columns, dtype=torch.float32 if fp32_parameters else kind, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    kinds = (activation, gated, dropout_p)
    backend.multiprocessor_count = lambda _: 128
    backend.forward(x, bias, branch if residual else None, seed, *kinds)
    passes = activation == "identity" and not gated
    backend.backward(
        grad, None if passes else x, None if passes else bias, seed, *kinds, True, True
    )


def _launch_copy_distribution(
    dtype: str,
    V: int = 32000,
    S: int = 64,
    gate: bool = True,
    fp32_copy: bool = False,
    lengths: bool = True,
) -> None:
    """``copy_nll`` and ``copy_distribution``, forward and backward, on tensors without memory."""
    import torch

    from fused_attn.ops.copy_distribution import triton as backend

    def empty(*shape: int, kind: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    B, T = 16, 64
    kind = getattr(torch, dtype)
    beside = torch.float32 if fp32_copy else kind
    logits = empty(B, T, V, kind=kind)
    source = (
        empty(B, T, S, kind=beside),
        empty(B, 1, S),
        empty(B, T, kind=beside) if gate else None,
        empty(B) if lengths else None,
    )
    for targets in (empty(B, T), None):
        output, lse = backend.forward(logits, *source, targets, V + 16, -100)
        backend.backward(output, logits, *source, targets, lse, -100)


def _launch_decode_attention(
    dtype: str,
    form: str,
    D: int = 64,
    T: int = 1,
    group: int = 1,
    everything: bool = False,
) -> None:
    """``decode_attention`` in splits, as on a GPU of 128 multiprocessors."""
    import torch

    from fused_attn.ops.decode_attention import triton as backend

    kind = getattr(torch, dtype)
    B, K, Hk, S = 4, 4, 8, 4096
    R = B if form == "plain" else B * K
    C = R if form == "ancestry" else B
    query = torch.empty(R, Hk * group, T, D, dtype=kind, device="meta")
    key, value = (torch.empty(C, Hk, S, D, dtype=kind, device="meta") for _ in range(2))
    integers = {"dtype": torch.int32, "device": "meta"}
    ancestry = torch.empty(B, K, S, **integers) if form == "ancestry" else None
    mask = torch.empty(R, 1, T, S, dtype=torch.bool, device="meta") if everything else None
    backend.multiprocessor_count = lambda _: 128
    backend.forward(
        query,
        key,
        value,
        torch.empty(R, dtype=torch.int64, device="meta"),
        ancestry,
        mask,
        torch.empty(Hk * group, device="meta") if everything else None,
        form != "shared",
        100 if everything else -1,
        0.1,
        20.0 if everything else 0.0,
    )


def _launch_beam_search(
    dtype: str, B: int = 16, K: int = 4, V: int = 32000, options: str = "plain"
) -> None:
    """``beam_search_step`` on tensors without memory.

    Args:
        dtype: Of the logits.
        B: Sentences.
        K: Beams.
        V: Tokens.
        options: ``plain`` has none, ``edited`` edits, ``everything`` all of them.
    """
    import torch

    from fused_attn.ops.beam_search import triton as backend

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    everything = options == "everything"
    edits = [empty(B, K, 200, kind=k) for k in (torch.int64, torch.float32, torch.float32)]
    backend.step(
        empty(B, K, V, kind=getattr(torch, dtype)),
        empty(B, K),
        2,
        empty(B) if everything else None,
        *(edits if options != "plain" else (None, None, None)),
        empty(B, kind=torch.int64) if everything else None,
        empty(B, V // 4, kind=torch.int64) if everything else None,
    )


def _launch_additive_attention(
    dtype: str,
    E: int = 512,
    D: int = 512,
    F: int = 0,
    B: int = 8,
    T: int = 64,
    S: int = 96,
    fp32_parameters: bool = True,
    masked: bool = True,
    scores: bool = False,
) -> None:
    """Forward and backward of ``additive_attention`` on a GPU of 132 multiprocessors.

    Every differentiable tensor needs a gradient; ``scores`` is ``additive_scores``.
    """
    import torch

    from fused_attn.ops.additive_attention import triton as backend
    from fused_attn.ops.additive_attention.contract import AdditiveInputs

    floating = getattr(torch, dtype)
    parameters = torch.float32 if fp32_parameters else floating

    def empty(*shape: int, kind: torch.dtype = floating) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    H = 1
    inputs = AdditiveInputs(
        query=empty(B, H, T, E),
        key=empty(B, H, S, E),
        value=None if scores else empty(B, H, S, D),
        score_weight=empty(H, E, kind=parameters),
        features=empty(B, H, T, S, F) if F > 0 else None,
        feature_weight=empty(H, F, E, kind=parameters) if F > 0 else None,
        mask=empty(B, 1, 1, S, kind=torch.bool) if masked else None,
        key_lengths=empty(B, kind=torch.int64) if masked else None,
    )
    backend.multiprocessor_count = lambda _: 132
    context, weights = backend.forward(inputs)
    backend.backward(
        None if scores else context,
        weights,
        inputs,
        None if scores else weights,
        [True, True, not scores, True, F > 0, F > 0],
    )


def _launch_attention(
    dtype: str,
    head_size: int,
    features: str = "plain",
    rows: int = 4096,
    key_heads: int = 4,
    forward_launch: str | None = None,
) -> None:
    """Forward and backward of ``attention`` on tensors without memory.

    Args:
        dtype: Of everything in floating point.
        head_size: D, and Dv.
        features: ``plain`` is causal; ``masked`` adds lengths, a mask, a bias and ALiBi;
            ``everything`` adds a window, a block mask, dropout and a softcap.
        rows: T, and S.
        key_heads: Hk, of 8 heads.
        forward_launch: Run the forward alone, as this entry of the table says.
    """
    import torch

    from fused_attn.ops.attention import triton as backend
    from fused_attn.ops.attention import triton_launches
    from fused_attn.ops.attention.contract import AttentionInputs

    floating = getattr(torch, dtype)

    def empty(*shape: int, kind: torch.dtype = floating) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    B, H, tiles = 2, 8, rows // 128
    masked = features != "plain"
    everything = features == "everything"
    lengths = empty(B, kind=torch.int64) if masked else None
    lists, counts = empty(1, 1, tiles, tiles, kind=torch.int32), empty(1, 1, tiles, 2)
    counts = counts.to(torch.int32)
    inputs = AttentionInputs(
        query=empty(B, H, rows, head_size),
        key=empty(B, key_heads, rows, head_size),
        value=empty(B, key_heads, rows, head_size),
        mask=empty(B, 1, rows, rows, kind=torch.bool) if masked else None,
        bias=empty(1, H, rows, rows) if masked else None,
        alibi_slopes=empty(H, kind=torch.float32) if masked else None,
        query_lengths=lengths,
        key_lengths=lengths,
        query_offsets=None,
        key_offsets=None,
        block_mask=(
            [lists, empty(9, 128, 4, kind=torch.int32), lists, counts, lists, counts]
            if everything
            else []
        ),
        seed=empty(1, kind=torch.int64) if everything else None,
        left=500 if everything else -1,
        right=0,
        align_lower_right=everything,
        scale=0.1,
        softcap=30.0 if everything else 0.0,
        activation=0,
        dropout_p=0.1 if everything else 0.0,
        max_queries=rows,
        max_keys=rows,
    )
    output = empty(B, H, rows, head_size)
    lse = empty(B, H, rows, kind=torch.float32)
    if forward_launch is not None:
        launch = triton_launches._parsed(forward_launch)
        backend.launches_for = lambda *_: (launch,)
        try:
            backend.forward(inputs)
        finally:
            backend.launches_for = triton_launches.launches_for
        return
    backend.forward(inputs)
    backend.backward(output, lse if everything else None, inputs, output, lse, masked)


def _launch_recurrent_cell(
    dtype: str, kind: str, size: int, fp32_state: bool = False, rows: int = 4096
) -> None:
    """Forward and backward of ``recurrent_cell`` on tensors without memory."""
    import torch

    from fused_attn.ops.recurrent_cell import triton as backend
    from fused_attn.ops.recurrent_cell.contract import GATES

    floating = getattr(torch, dtype)

    def empty(columns: int, kind: torch.dtype = floating) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=kind, device="meta")

    gates = empty(GATES[kind] * size), empty(GATES[kind] * size)
    state = empty(size, torch.float32 if fp32_state else floating)
    has_state = kind in ("lstm", "gru")
    new_hidden, new_cell = backend.forward(*gates, state if has_state else None, kind)
    backend.backward(
        new_hidden,
        new_cell if kind == "lstm" else None,
        *gates,
        state if has_state else None,
        kind,
        has_state,
    )


LAUNCHERS = {
    "additive_attention": _launch_additive_attention,
    "add_layer_norm": _launch_add_layer_norm,
    "attention": _launch_attention,
    "beam_search": _launch_beam_search,
    "bias_activation_dropout": _launch_bias_activation_dropout,
    "copy_distribution": _launch_copy_distribution,
    "decode_attention": _launch_decode_attention,
    "recurrent_cell": _launch_recurrent_cell,
}


def _accesses(cubin: bytes) -> dict[str, dict[str, int]]:
    """How many instructions access global memory, copies to shared memory among the loads."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--no-dataflow", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, int]] = {"loads": {}, "stores": {}}
    for instruction, modifiers in re.findall(r"\b(LDG|LDGSTS|STG)\b((?:\.\w+)*)", code):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        counts = found["stores" if instruction == "STG" else "loads"]
        bits = width[1] if width else "32"
        counts[bits] = counts.get(bits, 0) + 1
    return found


def _report(name: str, compiled: Any, log: str) -> dict[str, Any]:
    def total(pattern: str, text: str) -> int:
        return sum(int(n) for n in re.findall(pattern, text))

    report = {"kernel": name, "shared": compiled.metadata.shared}
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        if not re.search(r"Used \d+ reg", log):
            raise RuntimeError(f"{name}: the assembler printed no resource report")
        return report | {
            "registers": total(r"Used (\d+) reg", log),
            "spilled_bytes": total(r"(\d+) bytes spill", log),
            "wide_loads": len(re.findall(_WIDE_LOAD, ptx)),
            "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", ptx)),
            "tensor_core": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)),
            "wgmma": ptx.count("wgmma.mma_async"),
            "serialized": "instructions are serialized" in log,
            "bulk_copies": ptx.count("cp.async.bulk.tensor"),
            "specialized": "setmaxnreg" in ptx,
        }
    assembly = compiled.asm["amdgcn"]
    return report | {
        "registers": total(r"\.vgpr_count:\s*(\d+)", assembly),
        "spilled_bytes": 4 * total(r"\.vgpr_spill_count:\s*(\d+)", assembly),
        "wide_loads": assembly.count("load_dwordx4"),
        "wide_stores": assembly.count("store_dwordx4"),
        "tensor_core": assembly.count("v_mfma"),
    }


if __name__ == "__main__":
    _compile(sys.argv[1], sys.argv[2], json.load(sys.stdin), sys.argv[3])
