"""``python -m benchmarks.operators``: every op beside its peers, interleaved in one process.

The cases are those of kind ``benchmark`` in each op's ``cases.py``. Ours is checked against the
fp64 oracle before it is timed, a wrong kernel gets no time, and neither does a peer that computes
something else. Rows go to the results (`benchmarks.results`), and a line each to the screen: a
ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops._cases import Case, Direction, Roof
from fused_attn.validation import OPS, fused_backends, op_cases

from . import checks
from .checks import inputs_of, require_correct, require_same_function
from .peers import IncomparableError, Run, peers_of
from .results import Row, Writer, describe, dtype_name, problem, writer
from .roofs import copy_of, measure_roof, to_row
from .timing import (
    Call,
    Times,
    interleaved,
    on_side_stream,
    peak_bytes,
    ratio,
    summary,
    times_row,
)

OURS = ("fused_attn", "triton", "cuda", "cpu")
"""Providers that are this library: its own choice, or a backend by name."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "forward+backward")
# On a GPU, inputs that take turns: another call's lines in the cache are then no help.
_INPUT_SETS = 2


class LostProcessError(RuntimeError):
    """The GPU refuses this process any further work: another one must go on."""

    def __init__(self, provider: str, rows: list[Row]) -> None:
        super().__init__(f"{provider} has left the GPU unusable for this process")
        self.rows = rows
        """Those of the providers that failed."""


def benchmark_cases(op: str, device: str = "cpu", quick: bool = False) -> list[Case]:
    """The op's cases of kind ``benchmark`` for a device.

    On a GPU, whose time is lent by the minute, those of its size alone, where the op has any.
    """
    cases = [case for case in op_cases(op) if case.kind == "benchmark"]
    large = [case for case in cases if case.gpu_only]
    if not (device == "cuda" and large):
        large = [case for case in cases if not case.gpu_only]
    return [case for case in large if not quick or is_quick(case, device)]


def is_quick(case: Case, device: str = "cpu") -> bool:
    """Whether the quick setting has the case: the first and the last of its op, which differ."""
    cases = benchmark_cases(case.op, device)
    return case in (cases[0], cases[-1])


def directions(case: Case) -> tuple[Direction, ...]:
    """``forward``, and where the case has gradients ``backward`` and both together."""
    return DIRECTIONS if case.differentiable else ("forward",)


def timed_dtypes(case: Case, device: str) -> list[torch.dtype]:
    """The case's first dtype, and bf16 as well on a GPU."""
    wanted = [case.dtypes[0], *([torch.bfloat16] if device == "cuda" else [])]
    return list(dict.fromkeys(wanted))


def our_providers(op: str, device: str) -> dict[str, str | None]:
    """By the provider's name, the backend: on a CPU the library's choice, on a GPU each of them.

    Where a GPU has none of them, the library's choice too, which is then the reference.
    """
    backends: dict[str, str | None] = (
        {} if device == "cpu" else {name: name for name in fused_backends(op, device)}
    )
    return backends or {"fused_attn": None}


@functools.lru_cache(maxsize=1)
def _input_sets(case: Case, dtype: torch.dtype, device: str) -> list[Mapping[str, Any]]:
    """The case's inputs, as often as they take turns; the directions of a case share them."""
    first = inputs_of(case, dtype, device)
    others = range(1, _INPUT_SETS if device == "cuda" else 1)
    return [first, *(copy.deepcopy(first) for _ in others)]


def forget() -> None:
    """Give up what is kept for a case's other directions."""
    _input_sets.cache_clear()
    _made.cache_clear()
    checks.forget()


def bind(case: Case, run: Run, inputs: Mapping[str, Any], direction: Direction) -> Call:
    """A call without arguments, to be timed."""
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return run(inputs)

        return forward
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in case.differentiable
        if isinstance(inputs.get(name), Tensor)
    }
    call = {**inputs, **leaves}
    roots = [o for o in run(call) if o.requires_grad]
    cotangents = [torch.randn_like(o) for o in roots]

    def backward(outputs: Sequence[Tensor], retain_graph: bool) -> object:
        return torch.autograd.grad(
            outputs, list(leaves.values()), cotangents, retain_graph=retain_graph, allow_unused=True
        )

    if direction == "backward":
        return lambda: backward(roots, retain_graph=True)
    return lambda: backward([o for o in run(call) if o.requires_grad], retain_graph=False)


def measure(
    case: Case,
    dtype: torch.dtype,
    direction: Direction,
    device: str,
    roof: Roof,
    rounds: int,
    only: Sequence[str] = (),
    seconds: float = 0.02,
    samples: dict[str, Times] | None = None,
    checked: Mapping[str, Row] | None = None,
    announce: Callable[[str], None] = lambda provider: None,
) -> list[Row]:
    """One row a provider; one that is absent, refuses or fails is a row that says so.

    Args:
        case: What is measured.
        dtype: Of its inputs.
        direction: Of :data:`DIRECTIONS`.
        device: ``cpu`` or ``cuda``.
        roof: For the floor.
        rounds: Turns of each provider.
        only: Peers and backends by name; empty: all.
        seconds: On a CPU, how long a turn is.
        samples: Receives the times of each provider, if given.
        checked: By provider, what :func:`check` has found, which then is not asked again.
        announce: Is told the name of a provider before that does anything, and the empty string
            when all take turns.

    Raises:
        LostProcessError: A provider failed in a way that ends the use of the GPU.
    """
    head = {"suite": "operators", **_head(case, dtype, direction)}
    rows: list[Row] = []
    calls: dict[str, list[Call]] = {}
    beside: dict[str, Row] = {}
    moved, flops = case.work(dtype, direction)
    peers = peers_of(case.op, device)
    with on_side_stream(device):
        inputs = _input_sets(case, dtype, device)
        for name, prepare in _providers(case, dtype, device, direction, only).items():
            announce(name)
            try:
                run, find = prepare()
                found = checked[name] if checked and name in checked else find()
                if "failed" in found:
                    raise AssertionError(found["failed"])
                bound = [bind(case, run, one, direction) for one in inputs]
                bound[0]()
                beside[name] = dict(found)
                if name not in peers or peers[name].uses_torch_memory:
                    beside[name]["peak_bytes"] = peak_bytes(bound[0], device)
                calls[name] = bound
            except NotImplementedError as error:
                rows.append({**head, "provider": name, "absent": str(error)})
            except Exception:  # a row of the report, so that the other providers are still timed
                rows.append({**head, "provider": name, "failed": traceback.format_exc(limit=-4)})
                if is_lost(device):
                    raise LostProcessError(name, rows) from None
                if device == "cuda":
                    torch.cuda.empty_cache()  # where memory was short, the others need it
        announce("")
        if moved and calls:
            calls["copy"] = [copy_of(moved, device)]
        times = interleaved(calls, rounds, seconds, device)
    if samples is not None:
        samples.update(times)
    first = next((name for name in OURS if name in times), None)
    copy, product = case.floor_parts(roof, dtype, direction)
    for name, taken in times.items():
        s = summary(taken.seconds)
        row: Row = {
            **head,
            "provider": name,
            **times_row(taken.seconds),
        }
        if first is not None and name != first:
            r = ratio(taken.seconds, times[first].seconds)
            row["ratio"] = [r.q25, r.median, r.q75]
        if taken.launch:
            row["launch_ms"] = summary(taken.launch).median * 1e3
        if taken.graph:
            row["graph_ms"] = summary(taken.graph).median * 1e3
        if taken.graph_error:
            row["graph_error"] = taken.graph_error
        if moved:
            row |= {"bytes": moved, "gb_per_s": moved / s.median / 1e9}
        if name != "copy":
            if flops:
                row |= {"flop": flops, "tflop_per_s": flops / s.median / 1e12}
            row |= {
                "floor_ms": max(copy, product) * 1e3,
                "bound": "operations" if product > copy else "memory",
                "share_of_roof": max(copy, product) / s.median,
                **beside[name],
            }
        rows.append(row)
    return rows


def check(
    case: Case,
    dtype: torch.dtype,
    device: str,
    announce: Callable[[str], None],
    emit: Callable[[Row], None],
    only: Sequence[str] = (),
) -> None:
    """Check every provider of a case, and leave in the caches on disk what it compiles.

    A row of suite ``agreement`` says how near the oracle a provider came, or that it ``failed`` to.
    One that cannot be asked has none: what is in its way is told when it is timed.

    Args:
        case: Of kind ``benchmark``.
        dtype: Of its inputs.
        device: ``cpu`` or ``cuda``.
        announce: Is told the name of a provider before that does anything.
        emit: Receives the rows.
        only: Peers and backends by name; empty: all.

    Raises:
        LostProcessError: A provider failed in a way that ends the use of the GPU.
    """
    with on_side_stream(device):
        inputs = inputs_of(case, dtype, device)
        for direction in directions(case):
            if direction == "backward":
                continue  # is checked with both together
            head = {"suite": "agreement", **_head(case, dtype, direction)}
            for name, prepare in _providers(case, dtype, device, direction, only).items():
                announce(name)
                try:
                    run, find = prepare()
                    emit({**head, "provider": name, **find()})
                    bind(case, run, inputs, direction)()
                except AssertionError as error:
                    emit({**head, "provider": name, "failed": str(error)})
                except NotImplementedError:
                    continue
                except Exception:
                    if is_lost(device):
                        raise LostProcessError(name, []) from None


def is_lost(device: str) -> bool:
    """Whether a failure on the GPU has ended what this process can do there."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _providers(
    case: Case, dtype: torch.dtype, device: str, direction: Direction, only: Sequence[str]
) -> dict[str, Callable[[], tuple[Run, Callable[[], Row]]]]:
    """By name, what makes the function to time, and what finds out how right it is."""
    peers = peers_of(case.op, device)

    def ours(backend: str | None) -> tuple[Run, Callable[[], Row]]:
        def find() -> Row:
            error, share = require_correct(case, backend, dtype, device, direction)
            return {"error": error, "budget": share}

        return lambda inputs: case.run(inputs, backend), find

    def theirs(name: str) -> tuple[Run, Callable[[], Row]]:
        peer = peers[name]
        if reason := peer.absent_reason():
            raise NotImplementedError(reason)
        if direction != "forward" and not peer.differentiable:
            raise NotImplementedError("has no gradient")
        made = _made(case, dtype, device)
        if name not in made.runs:
            made.runs[name] = peer.make(case)
        run, passes = made.runs[name], (name, direction == "forward")

        def find() -> Row:
            if passes not in made.agreements:
                try:
                    agreement = require_same_function(case, peer, run, dtype, device, direction)
                    made.agreements[passes] = {"error": agreement.error}
                except IncomparableError as reason:
                    made.agreements[passes] = {"unchecked": str(reason)}
            return made.agreements[passes]

        return run, find

    known: dict[str, Callable[[], tuple[Run, Callable[[], Row]]]] = {
        name: functools.partial(ours, backend)
        for name, backend in our_providers(case.op, device).items()
    }
    known |= {name: functools.partial(theirs, name) for name in peers}
    return {name: prepare for name, prepare in known.items() if not only or name in only}


@dataclass
class _Made:
    """The peers of a case, as far as they are made: what is compiled serves all directions."""

    runs: dict[str, Run] = field(default_factory=dict)
    agreements: dict[tuple[str, bool], Row] = field(default_factory=dict)
    """By name, and whether outputs alone were compared."""


@functools.lru_cache(maxsize=1)
def _made(case: Case, dtype: torch.dtype, device: str) -> _Made:
    torch._dynamo.reset()
    return _Made()


def _head(case: Case, dtype: torch.dtype, direction: Direction) -> Row:
    return {
        "op": case.op,
        "case": case.name,
        "dtype": dtype_name(dtype),
        "direction": direction,
    }


def line(row: Row) -> str:
    """A row of an op, for the screen."""
    head = f"{row['op']} {row['case']} {row['dtype']} {row['direction']} {row['provider']}: "
    if why := problem(row):
        return f"{head}{why}"
    text = f"{head}{row['p50_ms']:.4g} ms ({row['p20_ms']:.4g}–{row['p80_ms']:.4g})"
    if "ratio" in row:
        text += ", {1:.2f} ({0:.2f}–{2:.2f}) times ours".format(*row["ratio"])
    if row.get("share_of_roof"):
        text += f", {row['share_of_roof']:.0%} of the roof ({row['bound']})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0 when nothing of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="repeatable")
    parser.add_argument("--only", nargs="+", default=[], help="only these providers, by name")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, help="turns of each (15; quick: 5)")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--quick", action="store_true", help="two cases of each op, 5 turns")
    parser.add_argument(
        "--out", type=Path, help="folder or .jsonl file; default: results/<device>/"
    )
    parser.add_argument("--json", action="store_true", help="rows to the screen, and to no file")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    failures = 0
    into: Writer | None = None
    if arguments.json:
        emit: Callable[[Row], None] = lambda row: print(json.dumps(row), flush=True)  # noqa: E731
    else:
        machine = describe(device)
        print(f"{machine['name']}, torch {machine['torch']}, {machine['threads']} threads")
        into = writer(device, arguments.out)
        emit = into.add
    roof = measure_roof(device)
    emit(to_row(roof))
    for case, dtype, direction in _plan(arguments):
        for row in measure(case, dtype, direction, device, roof, rounds, arguments.only):
            emit(row)
            if into is not None:
                print(line(row), flush=True)
            failures += "failed" in row and row["provider"] in OURS
    if into is not None:
        into.close()
        print(f"{into.path}")
    return 1 if failures else 0


def _plan(arguments: argparse.Namespace) -> Iterator[tuple[Case, torch.dtype, Direction]]:
    for op in arguments.op or OPS:
        for case in benchmark_cases(op, arguments.device, arguments.quick):
            if arguments.case not in case.name:
                continue
            for dtype in timed_dtypes(case, arguments.device):
                for direction in directions(case):
                    if not arguments.direction or direction in arguments.direction:
                        yield case, dtype, direction


if __name__ == "__main__":
    sys.exit(main())
