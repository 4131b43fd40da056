"""``python -m benchmarks.compiled``: ours beside eager PyTorch and ``torch.compile``, with memory.

As ``benchmarks.run``, on a CPU, with the same lines of PyTorch compiled (default mode, static
shapes; compilation is not timed) as a third provider, and for each the most bytes that a call
holds at a time, its inputs not counted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

import torch

from fused_attn.validation import OPS, case_inputs

from .measured import benchmark_cases, bind, directions, ours, require_correct
from .timing import interleaved, machine, ratio, summary


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call holds at a time, on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    del result
    records = [r for r in profile.profiler.kineto_results.events() if r.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, required=True, help="repeatable")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each provider (9)")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    print(
        "| op | case | direction | eager ms | compiled ms | ours ms | eager / ours | "
        "compiled / ours | eager MB | compiled MB | ours MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for op in arguments.op:
        for case in benchmark_cases(op):
            if (arguments.case or "") not in case.name:
                continue
            dtype = case.dtypes[0]
            require_correct(case, dtype)
            for direction in directions(case):
                torch._dynamo.reset()
                peer = importlib.import_module(f"benchmarks.bench_{op}").peer(case)
                inputs = case_inputs(case, dtype, "cpu")
                runs = {
                    "eager": peer,
                    "compiled": torch.compile(peer, dynamic=False),
                    "ours": ours(case),
                }
                calls = {name: bind(case, run, inputs, direction) for name, run in runs.items()}
                times = interleaved(calls, arguments.rounds)
                peaks = [f"{peak_bytes(call) / 1e6:.1f}" for call in calls.values()]
                medians = [f"{summary(seconds).median * 1e3:.2f}" for seconds in times.values()]
                ratios = []
                for name in ("eager", "compiled"):
                    r = ratio(times[name], times["ours"])
                    ratios.append(f"**{r.median:.2f}** ({r.q25:.2f}–{r.q75:.2f})")
                cells = [op, case.name, direction, *medians, *ratios, *peaks]
                print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
