"""``python -m benchmarks.run``: our kernels beside plain PyTorch, interleaved, as a table.

A row is one case in one direction: the median time of each, and the median of the ratios with
its quartiles. A ratio above 1 means that ours is faster. The last column is a copy that moves as
many bytes as the case must: what memory alone would take.
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
from tqdm import tqdm

from fused_attn.validation import OPS, case_inputs

from .measured import (
    benchmark_cases,
    bind,
    copy_of,
    directions,
    ours,
    require_correct,
    total,
)
from .timing import interleaved, machine, ratio, summary


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each provider (15)")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--quick", action="store_true", help="the first two cases of each op")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{machine()}\n")
    print("| op | case | direction | PyTorch ms | ours ms | PyTorch / ours (quartiles) | copy ms |")
    print("|---|---|---|---|---|---|---|")
    rows = [
        (op, case, direction)
        for op in arguments.op or OPS
        for case in benchmark_cases(op)[: 2 if arguments.quick else None]
        if (arguments.case or "") in case.name
        for direction in directions(case)
    ]
    for op, case, direction in tqdm(rows, unit="row", leave=False, disable=None):
        module = importlib.import_module(f"benchmarks.bench_{op}")
        if direction == "forward":
            require_correct(case, case.dtypes[0])
        inputs = case_inputs(case, case.dtypes[0], "cpu")
        moved = total(case.bytes_moved, case.dtypes[0].itemsize, direction=direction)
        times = interleaved(
            {
                "peer": bind(case, module.peer(case), inputs, direction),
                "ours": bind(case, ours(case), inputs, direction),
                "copy": copy_of(moved, "cpu"),
            },
            arguments.rounds,
        )
        r = ratio(times["peer"], times["ours"])
        line = (
            f"| {op} | {case.name} | {direction} | {summary(times['peer']).median * 1e3:.3f} | "
            f"{summary(times['ours']).median * 1e3:.3f} | "
            f"**{r.median:.2f}** ({r.q25:.2f}–{r.q75:.2f}) | "
            f"{summary(times['copy']).median * 1e3:.3f} |"
        )
        tqdm.write(line, file=sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
