"""Runs an op's cases through the CUDA kernels in this process, which a sanitizer may watch.

    python -m tests.cuda_host.check add_layer_norm --dtype bfloat16

prints the cases that fail, and how many passed, in how many launches.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch

from fused_attn.validation import OPS, op_cases
from fused_attn.validation.runner import check


def main() -> int:
    """0 if some case passed and none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--dtype", action="append", help="repeatable; default: all")
    parser.add_argument("--case", action="append", help="repeatable; default: all")
    arguments = parser.parse_args()
    verdicts: Counter[str] = Counter()
    for case in op_cases(arguments.op):
        if case.kind == "benchmark" or (arguments.case and case.name not in arguments.case):
            continue
        for dtype in case.dtypes:
            if arguments.dtype and str(dtype).removeprefix("torch.") not in arguments.dtype:
                continue
            row = check(arguments.op, "cuda", case, dtype, "cpu")
            verdicts[row.verdict] += 1
            if row.verdict not in ("passed", "refused"):
                print(f"{row.verdict}: {row.case} {row.dtype} {row.detail}", flush=True)
    launches = torch.ops.fused_attn_cuda_host.launches()
    print(f"passed {verdicts['passed']}, refused {verdicts['refused']}, launches {launches}")
    return int(verdicts["passed"] == 0 or set(verdicts) > {"passed", "refused"})


if __name__ == "__main__":
    sys.exit(main())
