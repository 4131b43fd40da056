"""``python -m benchmarks.roofs``: what this machine does at best, and the floor of every case.

A roof is measured: copies of many sizes and large matrix products. A case must move its bytes and
do its operations (`Case.bytes_moved`, `Case.flops`, `Case.vector_flops`); its floor is the longest
of these under the roof (`Case.floor_seconds`).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from fused_attn.ops._cases import Roof
from fused_attn.validation import OPS

from .results import clocks, cpu_name, dtype_name
from .timing import Call, interleaved, summary

SIZES = tuple(1 << bits for bits in range(14, 31, 2))
"""Bytes that the copies move: 16 KiB to 1 GiB."""
_CPU_SIDE, _GPU_SIDE = 2048, 8192


def copy_of(moved: int, device: torch.device | str) -> Call:
    """A copy that reads half of the bytes and writes half."""
    source = torch.randint(256, (max(1, moved // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def read_of(moved: int, device: torch.device | str) -> Call:
    """A sum, which reads all of the bytes."""
    source = torch.ones(max(1, moved // 4), device=device)
    return source.sum


def measure_roof(device: str, rounds: int = 7) -> Roof:
    """Copies and products, on this machine now.

    Of each size the better of a copy and of a sum, which only reads: a kernel may do mostly that.
    On a CPU the rate of fp32 products is the better of PyTorch's own and of oneDNN's with a packed
    weight, and the same units do everything else, so it is the rate of that too. On an NVIDIA GPU
    the latter is counted: a multiprocessor starts 128 multiply-adds a cycle, at the highest clock.
    """
    copies = []
    for size in SIZES[: -1 if device == "cpu" else None]:
        movers = {"copy": copy_of(size, device), "read": read_of(size, device)}
        times = interleaved(movers, rounds, device=device)
        copies.append((size, min(summary(t.seconds).median for t in times.values())))
    products = {}
    side = _CPU_SIDE if device == "cpu" else _GPU_SIDE
    for dtype in (torch.float32, torch.bfloat16):
        if device == "cpu" and dtype != torch.float32:
            continue  # of no use where kernels compute in fp32
        times = interleaved(_products(side, dtype, device), rounds, device=device)
        best = min(summary(t.seconds).median for t in times.values())
        products[dtype] = 2 * side**3 / best
    return Roof(_ascending(copies), products, _vector_rate(device))


def _vector_rate(device: str) -> float | None:
    """FLOP/s of an NVIDIA GPU outside of its matrix units; None where there are none or unknown."""
    if device == "cpu" or torch.version.hip:
        return None
    told = clocks()
    if told is None:
        return None
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return multiprocessors * 128 * 2 * float(told["clocks.max.sm"]) * 1e6


def _products(side: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    calls: dict[str, Call] = {"torch": lambda: a @ b}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(b, side)
        calls["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(
            a, packed, None, "none", [], ""
        )
    return calls


def _ascending(copies: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    # Noise may make a small copy slower than a larger one: a roof is the best that was seen.
    best = float("inf")
    result = []
    for size, seconds in reversed(copies):
        best = min(best, seconds)
        result.append((size, best))
    return tuple(reversed(result))


def to_row(roof: Roof) -> dict[str, Any]:
    """As a row of results."""
    products = {dtype_name(dtype): rate for dtype, rate in roof.products.items()}
    row = {"suite": "roof", "copies": roof.copies, "products": products}
    return row if roof.vector is None else row | {"vector": roof.vector}


def from_row(row: dict[str, Any]) -> Roof:
    """From a row of results."""
    products = {getattr(torch, dtype): rate for dtype, rate in row["products"].items()}
    copies = tuple((size, seconds) for size, seconds in row["copies"])
    return Roof(copies, products, row.get("vector"))


def main() -> int:
    """Print the roof, and the table of floors."""
    from .operators import benchmark_cases, directions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="whose cases")
    parser.add_argument("--tflops", type=float, help="rate of operations; default: measured")
    parser.add_argument("--tbps", type=float, help="rate of memory; default: measured")
    arguments = parser.parse_args()
    if arguments.tflops and arguments.tbps:
        copies = tuple((size, size / arguments.tbps / 1e12) for size in (1, SIZES[-1]))
        roof = Roof(copies, {torch.float32: arguments.tflops * 1e12})
        print("rates as given\n")
    else:
        roof = measure_roof(arguments.device)
        print(f"{cpu_name() if arguments.device == 'cpu' else torch.cuda.get_device_name()}\n")
        print("| copy or read of | µs | GB/s |\n|---|---|---|")
        for size, seconds in roof.copies:
            print(f"| {size / 1e6:.3g} MB | {seconds * 1e6:.1f} | {size / seconds / 1e9:.0f} |")
        for dtype, rate in roof.products.items():
            print(f"\nproduct in {dtype}: {rate / 1e12:.3g} TFLOP/s")
        if roof.vector is not None:
            print(f"\noutside of products, counted: {roof.vector / 1e12:.3g} TFLOP/s in fp32")
    print("\n| case | direction | GFLOP | MB | FLOP a byte | floor ms | bound by |")
    print("|---|---|---|---|---|---|---|")
    for op in arguments.op or OPS:
        for case in benchmark_cases(op, arguments.device):
            dtype = case.dtypes[0]
            for direction in directions(case):
                moved, flops = case.work(dtype, direction)
                copy, product = case.floor_parts(roof, dtype, direction)
                print(
                    f"| {op} {case.name} | {direction} | {flops / 1e9:.2f} | {moved / 1e6:.1f} | "
                    f"{flops / max(moved, 1):.0f} | {max(copy, product) * 1e3:.3g} | "
                    f"{'operations' if product > copy else 'memory'} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
