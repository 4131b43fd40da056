"""``python -m benchmarks.tune_attention``: the launches of attention's Triton kernels, measured.

Prints this GPU's rows for the table in ``fused_attn/ops/attention/triton_launches.py``, the
fastest candidate in each place, and the times of all candidates as JSON lines on standard error.
A candidate whose results are not those of the table's launch, within the budget of
``validation/tolerance.py``, counts as failed, as does one that does not fit. Candidates with
descriptors stand before the fastest without, which serves rows that are not aligned.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from fused_attn.ops._triton import target
from fused_attn.ops.attention import triton as backend
from fused_attn.ops.attention.contract import AttentionInputs
from fused_attn.ops.attention.triton_launches import HEAD_SIZES, Launch, launches_for
from fused_attn.validation import compare

LOADS = ("plain", "masked", "heavy")
KERNELS = ("forward", "query_gradient", "key_gradient", "bias_gradient")


def candidates(kernel: str, load: str, itemsize: int) -> Iterator[Launch]:
    """What is tried in a place of the table."""
    sizes = (16, 32, 64, 128)
    for m, n, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3)):
        if not 1024 <= m * n <= 128 * 128 or (itemsize == 4 and m * n > 64 * 64):
            continue
        for registers in (0, 255):
            yield Launch(m, n, warps, stages, registers=registers)
        if load == "plain" and itemsize == 2 and kernel != "bias_gradient" and stages > 1:
            yield Launch(m, n, warps, stages, True)
            if kernel == "forward" and m == 128 and warps == 4:
                yield Launch(m, n, warps, stages, True, True)


def example(load: str, dtype: torch.dtype, D: int, rows: int, device: str) -> AttentionInputs:
    """A call: 16 heads of 2 sequences, causal."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    B, H = 2, 16
    return AttentionInputs(
        query=normal(B, H, rows, D),
        key=normal(B, H, rows, D),
        value=normal(B, H, rows, D),
        mask=None,
        bias=normal(1, H, rows, rows) if load != "plain" else None,
        alibi_slopes=None,
        query_lengths=None,
        key_lengths=None,
        query_offsets=None,
        key_offsets=None,
        block_mask=[],
        seed=torch.tensor([7], device=device) if load == "heavy" else None,
        left=-1,
        right=0,
        align_lower_right=False,
        scale=1.0 / math.sqrt(D),
        softcap=0.0,
        activation=0,
        dropout_p=0.1 if load == "heavy" else 0.0,
        max_queries=rows,
        max_keys=rows,
    )


def run(kernel: str, launch: Launch | None, inputs: AttentionInputs, saved: Sequence[Tensor]):
    """The call's results, with one kernel's launch replaced."""

    def chosen(architecture: str, name: str, *rest: int) -> tuple[Launch, ...]:
        if launch is not None and name == kernel:
            return (launch,)
        return launches_for(architecture, name, *rest)

    with mock.patch.object(backend, "launches_for", chosen):
        if kernel == "forward":
            return backend.forward(inputs)
        output, lse, gradient = saved
        return backend.backward(gradient, None, inputs, output, lse, kernel == "bias_gradient")


def seconds(call, device: str, rounds: int) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(rounds):
        if device == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) * 1e-3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def text(launch: Launch) -> str:
    """As the table has it."""
    words = [f"{launch.BLOCK_M}x{launch.BLOCK_N}", f"{launch.num_warps}w", f"{launch.num_stages}s"]
    words += ["tma"] * launch.DESCRIPTORS + ["specialize"] * launch.SPECIALIZE
    words += [f"{launch.registers}r"] if launch.registers else []
    return " ".join(words)


def best(kernel: str, load: str, dtype: torch.dtype, D: int, arguments: argparse.Namespace) -> str:
    """The table's entry: the fastest launch, after one with descriptors that is faster."""
    inputs = example(load, dtype, D, arguments.rows, arguments.device)
    output, lse = backend.forward(inputs)
    saved = (output, lse, torch.randn(output.shape, device=output.device).to(dtype))
    expected = run(kernel, None, inputs, saved)
    fastest: dict[bool, tuple[float, Launch]] = {}
    tried = list(candidates(kernel, load, dtype.itemsize))[: arguments.limit]
    for launch in tried:
        row = {"kernel": kernel, "load": load, "dtype": str(dtype), "D": D, "launch": text(launch)}
        try:
            results = run(kernel, launch, inputs, saved)
            pairs = zip(results, expected, strict=True)
            checks = [compare("result", a, b.double(), b) for a, b in pairs if a.numel() > 0]
            if not all(check.passed for check in checks):
                raise RuntimeError("; ".join(map(str, checks)))
            # All kernels of a backward run, of which one differs.
            taken = seconds(
                lambda launch=launch: run(kernel, launch, inputs, saved),
                arguments.device,
                arguments.rounds,
            )
        except Exception as error:  # too many registers, too much shared memory, a wrong result
            row["error"] = str(error).strip().splitlines()[-1][:200]
        else:
            row["seconds"] = taken
            uses = launch.DESCRIPTORS
            if uses not in fastest or taken < fastest[uses][0]:
                fastest[uses] = (taken, launch)
        print(json.dumps(row), file=sys.stderr, flush=True)
    if False not in fastest:
        raise RuntimeError(f"{kernel} {load} {dtype} {D}: nothing runs")
    chosen = [fastest[False]]
    if True in fastest and fastest[True][0] < fastest[False][0]:
        chosen.insert(0, fastest[True])
    return " | ".join(text(launch) for _, launch in chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--head-size", nargs="+", type=int, default=list(HEAD_SIZES))
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=int, help="try only so many candidates")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args(argv)
    architecture = target().architecture
    for name, kernel in itertools.product(arguments.dtype, arguments.kernel):
        dtype = getattr(torch, name)
        print(f'    ("{architecture}", "{kernel}", {dtype.itemsize}): (')
        for D in arguments.head_size:
            loads = LOADS if kernel != "bias_gradient" else LOADS[1:]
            cells = [best(kernel, load, dtype, D, arguments) for load in loads]
            cells = cells if len(cells) == 3 else [cells[0], *cells]
            print("        (" + ", ".join(f'"{cell}"' for cell in cells) + "),", flush=True)
        print("    ),", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
