"""Times one benchmark case on a device: a process of ``python -m benchmarks.gpu``.

Every fused backend that can run there, plain PyTorch and ``torch.compile`` of it take turns with
a copy of as many bytes as the case must move: the roof of a kernel that is bound by memory. One
JSON object a line is printed for each dtype, direction and provider.

On a GPU a time is that of the device: CUDA events, the L2 cache flushed before every call, and
the device kept busy until the host has queued the call, so that the host's speed is not measured.
The latter is in ``launch_ms``; a call in a program takes the larger of the two.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fused_attn.ops._cases import Case
from fused_attn.validation import OPS, case_inputs, check_case, fused_backends

from .measured import Call, Run, benchmark_cases, bind, copy_of, directions, total
from .timing import summary

# Larger than the last-level cache of any GPU known (H200: 60 MB).
FLUSH_BYTES = 256 << 20


def main() -> int:
    """Time a case; 0 when nothing went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--peers", nargs="+", choices=("eager", "compile"), default=["eager"])
    arguments = parser.parse_args()
    cases = benchmark_cases(arguments.op, arguments.device)
    (case,) = (case for case in cases if case.name == arguments.case)
    failures = 0
    for dtype in timed_dtypes(case, arguments.device):
        for direction in directions(case):
            rows = time_case(case, dtype, direction, arguments)
            # A peer that refuses is a result; one of ours is a failure.
            ours = fused_backends(case.op, arguments.device)
            failures += sum("error" in row and row["provider"] in ours for row in rows)
            for row in rows:
                print(json.dumps(row), flush=True)
    return 1 if failures else 0


def timed_dtypes(case: Case, device: str) -> list[torch.dtype]:
    """The case's first dtype, and bf16 as well on a GPU."""
    wanted = [case.dtypes[0], *([torch.bfloat16] if device == "cuda" else [])]
    return list(dict.fromkeys(wanted))


def time_case(
    case: Case, dtype: torch.dtype, direction: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a provider; a provider that fails is a row with its error."""
    head = {
        "op": case.op,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
    }
    device = torch.device(arguments.device)
    inputs = case_inputs(case, dtype, device)
    calls: dict[str, Call] = {}
    rows = []
    for name, prepare in providers(case, dtype, device, arguments.peers).items():
        try:
            calls[name] = bind(case, prepare(), inputs, direction)
            calls[name]()
            synchronize(device)
        except Exception:  # a row of the report, so that the other providers are still timed
            calls.pop(name, None)
            rows.append({**head, "provider": name, "error": traceback.format_exc(limit=-4)})
    moved = total(case.bytes_moved, dtype.itemsize, direction=direction)
    if moved:
        calls["copy"] = copy_of(moved, device)
    times, launches = interleaved(calls, device, arguments.rounds)
    copy = summary(times["copy"]).median if moved else None
    operations = total(case.flops, direction=direction)
    for name, seconds in times.items():
        s = summary(seconds)
        row: dict[str, Any] = {
            **head,
            "provider": name,
            "median_ms": s.median * 1e3,
            "p20_ms": s.p20 * 1e3,
            "p80_ms": s.p80 * 1e3,
            "rounds": len(seconds),
        }
        if launches:
            row["launch_ms"] = summary(launches[name]).median * 1e3
        if copy is not None:
            row |= {
                "bytes": moved,
                "gb_per_s": moved / s.median / 1e9,
                "share_of_copy": copy / s.median,
            }
        if operations and name != "copy":
            row |= {"flop": operations, "tflop_per_s": operations / s.median / 1e12}
        rows.append(row)
    return rows


def providers(
    case: Case, dtype: torch.dtype, device: torch.device, peers: list[str]
) -> dict[str, Callable[[], Run]]:
    """By name, what makes the function to time; ours is checked first, and no wrong one timed.

    On a GPU also what the op's benchmark names in ``GPU_PEERS``.
    """

    def checked(backend: str) -> Callable[[], Run]:
        def prepare() -> Run:
            failed = [str(c) for c in check_case(case, backend, dtype, device) if not c.passed]
            if failed:
                raise RuntimeError(f"is wrong, so it is not timed: {'; '.join(failed)}")
            return lambda inputs: case.run(inputs, backend)

        return prepare

    module = importlib.import_module(f"benchmarks.bench_{case.op}")

    def eager() -> Run:
        return module.peer(case)

    def compiled() -> Run:
        torch._dynamo.reset()
        function = torch.compile(eager(), dynamic=False)

        def run(inputs: Mapping[str, Any]) -> Any:
            return function(inputs)

        return run

    known = {"eager": eager, "compile": compiled}
    others = getattr(module, "GPU_PEERS", {}) if device.type == "cuda" else {}
    return {
        **{name: checked(name) for name in fused_backends(case.op, str(device))},
        **{name: known[name] for name in peers},
        **{name: functools.partial(make, case) for name, make in others.items()},
    }


def interleaved(
    calls: dict[str, Call], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds on the device, and to launch, of each call, once a round, in turns."""
    if device.type != "cuda":
        return _interleaved_on_cpu(calls, rounds), {}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    seconds_a_cycle = _seconds_a_cycle()
    pauses, events, launches = {}, {}, {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        synchronize(device)
        started = time.perf_counter()
        call()
        pauses[name] = int((3 * (time.perf_counter() - started) + 1e-4) / seconds_a_cycle)
        events[name], launches[name] = [], []
    for _ in range(rounds):
        for name, call in calls.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(pauses[name])
            before.record()
            started = time.perf_counter()
            call()
            launches[name].append(time.perf_counter() - started)
            after.record()
            events[name].append((before, after))
            after.synchronize()
    times = {
        name: [before.elapsed_time(after) * 1e-3 for before, after in pairs]
        for name, pairs in events.items()
    }
    return times, launches


def _interleaved_on_cpu(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return times


def _seconds_a_cycle() -> float:
    cycles = 10_000_000
    for _ in range(2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        after.synchronize()
    return before.elapsed_time(after) * 1e-3 / cycles


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
