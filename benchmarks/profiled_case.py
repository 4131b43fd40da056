"""Runs a benchmark case of an op once, between the marks that a profiler of kernels waits for.

``python -m benchmarks.profile`` starts it under Nsight Compute: what compiles and warms up is
outside the marks, and nothing is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fused_attn.validation import OPS, case_inputs

from .operators import DIRECTIONS, benchmark_cases, bind

_WARM_UP_CALLS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("case")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--direction", default="forward", choices=DIRECTIONS)
    parser.add_argument("--backend", help="default: the library's choice")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    arguments = parser.parse_args(argv)
    device = arguments.device
    (case,) = (c for c in benchmark_cases(arguments.op, device) if c.name == arguments.case)
    inputs = case_inputs(case, getattr(torch, arguments.dtype), device)
    call = bind(case, lambda given: case.run(given, arguments.backend), inputs, arguments.direction)
    for _ in range(_WARM_UP_CALLS):
        call()
    if device == "cpu":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
