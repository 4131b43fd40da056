"""``python -m benchmarks.floors``: the least time that each benchmark case can take.

A case must do its operations and move its bytes (`Case.flops`, `Case.bytes_moved`): the floor is
the longer of the two at the machine's rates. These are given, or measured on the CPU: an fp32
matrix product and a copy.
"""

from __future__ import annotations

import argparse
import sys

import torch

from fused_attn.validation import OPS

from .measured import benchmark_cases, copy_of, directions, total
from .timing import interleaved, machine, summary

_SIDE = 2048
_COPY = 1 << 28


def measured_rates() -> tuple[float, float]:
    """TFLOP/s of a product of 2048 x 2048 matrices in fp32, TB/s of a copy of 256 MB."""
    a, b = torch.randn(2, _SIDE, _SIDE)
    times = interleaved({"product": lambda: a @ b, "copy": copy_of(_COPY, "cpu")}, 7)
    product, copy = (summary(times[name]).median for name in ("product", "copy"))
    return 2 * _SIDE**3 / product / 1e12, _COPY / copy / 1e12


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="whose cases")
    parser.add_argument("--tflops", type=float, help="rate of operations; default: measured")
    parser.add_argument("--tbps", type=float, help="rate of memory; default: measured")
    arguments = parser.parse_args()
    if arguments.tflops is None or arguments.tbps is None:
        tflops, tbps = measured_rates()
        print(f"{machine()}\n")
    tflops = arguments.tflops or tflops
    tbps = arguments.tbps or tbps
    print(f"{tflops:.3g} TFLOP/s, {tbps:.3g} TB/s\n")
    print("| case | direction | GFLOP | MB | FLOP a byte | floor ms | bound by |")
    print("|---|---|---|---|---|---|---|")
    for op in arguments.op or OPS:
        for case in benchmark_cases(op, arguments.device):
            for direction in directions(case):
                operations = total(case.flops, direction=direction)
                moved = total(case.bytes_moved, case.dtypes[0].itemsize, direction=direction)
                seconds = operations / tflops / 1e12, moved / tbps / 1e12
                bound = "operations" if seconds[0] > seconds[1] else "memory"
                print(
                    f"| {op} {case.name} | {direction} | {operations / 1e9:.2f} | "
                    f"{moved / 1e6:.1f} | {operations / max(moved, 1):.0f} | "
                    f"{max(seconds) * 1e3:.3g} | {bound} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
