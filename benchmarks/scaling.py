"""``python -m benchmarks.scaling``: time and memory of every op over one dimension at a time.

From a benchmark case of the op one dimension is doubled again and again. Ours, what a user has in
plain PyTorch, and ``torch.compile`` or SDPA take turns, as in `benchmarks.operators`; beside each
time stands the floor of the cost model at the roof measured in the same run, beside each peak of
memory what a call must hold: its outputs and gradients. A provider that gets too slow or too large
is left out of what follows, and its row says what the next point would need.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops._cases import Case, Direction, Roof
from fused_attn.validation import OPS, case_inputs, op_cases

from . import bench_attention
from .operators import OURS, bind, our_providers, require_correct, timed_dtypes
from .peers import Run, peers_of
from .results import Row, describe, dtype_name, problem, writer
from .roofs import measure_roof, to_row
from .timing import interleaved, peak_bytes, summary, times_row

DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
PEERS = ("eager", "sdpa", "compile")
"""Beside ours, of those that an op has."""
_GIB = float(1 << 30)


@dataclass(frozen=True)
class Sweep:
    """One dimension of an op."""

    op: str
    dimension: str
    base: str
    """The benchmark case of which the rest is."""
    gpu_base: str
    values: tuple[int, ...]
    change: Callable[[Any, int], dict[str, Any]]
    """From the base and a value, the fields that are others."""
    note: str = ""
    """What the figure must say: which fields move together."""

    def base_case(self, device: str) -> Case:
        """The benchmark case for a device."""
        name = self.gpu_base if device == "cuda" else self.base
        return next(case for case in op_cases(self.op) if case.name == name)

    def case(self, value: int, device: str) -> Case:
        """The case with another value."""
        base: Any = self.base_case(device)
        name = f"{base.name} {self.dimension}={value}"
        return dataclasses.replace(base, name=name, **self.change(base, value))


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(1 << bits for bits in range(first.bit_length() - 1, last.bit_length()))


def _rows(base: Any, rows: int) -> dict[str, Any]:
    return {"leading": (rows,)}


SWEEPS = (
    Sweep(
        "attention",
        "T",
        "full_512",
        "full_2048_D64",
        _powers(64, 8192),
        lambda base, T: {"B": 1, "T": T, "S": T},
        "T = S, one sentence",
    ),
    Sweep(
        "attention",
        "S",
        "decoding_512",
        "decoding_512",
        _powers(64, 8192),
        lambda base, S: {"S": S},
        "one query",
    ),
    Sweep(
        "attention",
        "B",
        "full_256",
        "full_512_D64",
        _powers(1, 64),
        lambda base, B: {"B": B},
    ),
    Sweep(
        "decode_attention",
        "S",
        "self_512",
        "self_4096_gpu",
        _powers(64, 8192),
        lambda base, S: {"B": 16, "S": S},
    ),
    Sweep(
        "decode_attention",
        "B",
        "self_512",
        "self_4096_gpu",
        _powers(1, 64),
        lambda base, B: {"B": B},
    ),
    Sweep(
        "decode_attention",
        "K",
        "cross_512_4_beams",
        "cross_1024_4_beams_gpu",
        _powers(1, 32),
        lambda base, K: {"K": K},
        "beams of one source",
    ),
    Sweep(
        "beam_search",
        "V",
        "B16_K4_V32000",
        "B64_K8_V32000_gpu",
        _powers(1024, 262144),
        lambda base, V: {"V": V},
    ),
    Sweep(
        "beam_search",
        "K",
        "B4_K16_V32000",
        "B16_K64_V32000_gpu",
        _powers(1, 64),
        lambda base, K: {"K": K},
    ),
    Sweep(
        "beam_search",
        "B",
        "B16_K4_V32000",
        "B16_K4_V32000_gpu",
        _powers(1, 64),
        lambda base, B: {"B": B},
    ),
    Sweep(
        "copy_distribution",
        "V",
        "nll_1024x32000_gate",
        "nll_1024x32000_gate",
        _powers(1024, 131072),
        lambda base, V: {"leading": (16, 16), "vocabulary": V},
        "256 rows",
    ),
    Sweep(
        "copy_distribution",
        "S",
        "nll_1024x32000_gate",
        "nll_1024x32000_gate",
        _powers(16, 4096),
        lambda base, S: {"leading": (16, 16), "vocabulary": 4096, "positions": S},
        "256 rows of 4096 words",
    ),
    Sweep(
        "copy_distribution",
        "T",
        "nll_1024x32000_gate",
        "nll_1024x32000_gate",
        _powers(4, 512),
        lambda base, T: {"leading": (16, T), "vocabulary": 4096},
        "4096 words",
    ),
    Sweep(
        "additive_attention",
        "S",
        "translation",
        "translation_large",
        _powers(8, 1024),
        lambda base, S: {"B": 8, "S": S},
        "8 sentences",
    ),
    Sweep(
        "additive_attention",
        "T",
        "translation",
        "translation_large",
        _powers(1, 256),
        lambda base, T: {"B": 8, "T": T},
        "8 sentences",
    ),
    Sweep("add_layer_norm", "rows", "4096x1024", "16384x4096_gpu", _powers(64, 16384), _rows),
    Sweep(
        "add_layer_norm",
        "width",
        "1024x4096",
        "16384x4096_gpu",
        _powers(64, 16384),
        lambda base, width: {"width": width},
    ),
    Sweep(
        "bias_activation_dropout",
        "rows",
        "4096x2048_gelu_dropout",
        "16384x4096_gelu_dropout",
        _powers(64, 8192),
        _rows,
    ),
    Sweep(
        "bias_activation_dropout",
        "width",
        "4096x2048_gelu_dropout",
        "16384x4096_gelu_dropout",
        _powers(64, 8192),
        lambda base, width: {"width": width, "leading": (2048,)},
        "2048 rows",
    ),
    Sweep("recurrent_cell", "B", "lstm_4096x512", "lstm_16384x1024", _powers(16, 8192), _rows),
    Sweep(
        "recurrent_cell",
        "width",
        "lstm_4096x512",
        "lstm_16384x1024",
        _powers(32, 4096),
        lambda base, width: {"hidden_size": width, "leading": (512,)},
        "512 rows",
    ),
)


@dataclass(frozen=True)
class Limits:
    """What a point may take."""

    rounds: int
    call_seconds: float
    """A provider whose call took longer is not asked for the next point."""
    point_seconds: float
    """Fewer rounds where these would take longer, but at least 3."""
    check_seconds: float
    """Of a comparison with the fp64 oracle; larger points are not compared."""
    bytes: float
    """The largest peak."""


FULL = Limits(rounds=7, call_seconds=0.6, point_seconds=1.5, check_seconds=1.0, bytes=4 * _GIB)
QUICK = Limits(rounds=3, call_seconds=0.05, point_seconds=0.3, check_seconds=0.2, bytes=_GIB)


@dataclass
class _Provider:
    """What is known of one along a sweep."""

    make: Callable[[Case], Run]
    """Prepares it for a point."""
    checks: str | None = None
    """The backend that is compared with the oracle; None for peers."""
    checked: list[tuple[int, float]] = field(default_factory=list)
    """Values that were compared, and the seconds that it took."""
    past: dict[Direction, list[tuple[float, float]]] = field(default_factory=dict)
    """Seconds of a call and its peak, point by point."""

    def would_need(self, direction: Direction, limits: Limits) -> str:
        """Why the next point is left out, by what the last two took; empty if it is not."""
        past = self.past.get(direction, [])
        if not past:
            return ""
        (seconds, peak), (before, less) = past[-1], past[-2] if len(past) > 1 else (0.0, 0.0)
        if seconds > limits.call_seconds:
            return f"would need {_next(seconds, before):.2g} s a call"
        if _next(peak, less) > limits.bytes:
            return f"would need {_next(peak, less) / _GIB:.2g} GiB"
        return ""


def _next(last: float, before: float) -> float:
    """The next of a geometric series; one of squares where only one is known."""
    return last * (last / before if before else 4.0)


def held_bytes(tensors: Iterable[object]) -> int:
    """Bytes of tensors' memory, where several are of the same once."""
    storages = (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def providers(sweep: Sweep, device: str, quick: bool) -> dict[str, _Provider]:
    """Ours by name, and the peers of the sweep; quick: nothing that must be compiled."""
    base = sweep.base_case(device)
    found = {
        name: _Provider(functools.partial(_ours, backend), checks=name)
        for name, backend in our_providers(sweep.op, device).items()
    }
    peers = peers_of(sweep.op, device)
    for name in PEERS:
        if name == "eager" and sweep.op == "attention":
            found[name] = _Provider(bench_attention.forced("MATH"))
        elif name in peers and name != "compile":
            found[name] = _Provider(peers[name].make)
        elif name in peers and "eager" in peers and not quick:
            found[name] = _Provider(lambda case: _compiled(sweep.op, base))
    return found


def _ours(backend: str | None, case: Case) -> Run:
    return lambda inputs: case.run(inputs, backend)


@functools.lru_cache
def _compiled(op: str, base: Case) -> Run:
    """The eager peer through ``torch.compile``, once for all sizes."""
    torch._dynamo.config.recompile_limit = 64
    function = torch.compile(peers_of(op, "cpu")["eager"].make(base), dynamic=True)
    return lambda inputs: function(inputs)


def measure(
    sweep: Sweep,
    device: str,
    roof: Roof,
    limits: Limits,
    values: Sequence[int],
    directions: Sequence[Direction],
    quick: bool = False,
) -> Iterator[Row]:
    """Rows of a sweep, point by point."""
    known = providers(sweep, device, quick)
    for value in values:
        case = sweep.case(value, device)
        dtype = timed_dtypes(case, device)[-1]
        inputs = case_inputs(case, dtype, device)
        bad = {name: _check(p, case, dtype, device, value, limits) for name, p in known.items()}
        for direction in directions if case.differentiable else ("forward",):
            head: Row = {
                "suite": "scaling",
                "op": sweep.op,
                "case": sweep.base_case(device).name,
                "dimension": sweep.dimension,
                "value": value,
                "dtype": dtype_name(dtype),
                "direction": direction,
            }
            for name, row in _point(case, inputs, direction, device, known, bad, limits):
                floor = case.floor_seconds(roof, dtype, direction)
                yield {**head, "provider": name, **row, "floor_ms": floor * 1e3}


def _check(
    provider: _Provider, case: Case, dtype: torch.dtype, device: str, value: int, limits: Limits
) -> Row:
    """Compare ours with the oracle, unless that would take too long; why it is not timed."""
    if provider.checks is None:
        return {}
    if provider.checked:
        seconds = [s for _, s in provider.checked[-2:]]
        before = seconds[0] if len(seconds) > 1 else 0.0
        if _next(seconds[-1], before) > limits.check_seconds or provider.checked[-1][0] * 4 < value:
            return {}
    started = time.perf_counter()
    try:
        require_correct(case, our_providers(case.op, device)[provider.checks], dtype, device)
    except NotImplementedError as error:
        return {"absent": str(error)}
    except Exception:  # a row of the report, so that the other providers are still timed
        return {"failed": traceback.format_exc(limit=-4)}
    provider.checked.append((value, time.perf_counter() - started))
    return {}


def _point(
    case: Case,
    inputs: Mapping[str, Any],
    direction: Direction,
    device: str,
    known: Mapping[str, _Provider],
    bad: Mapping[str, Row],
    limits: Limits,
) -> Iterator[tuple[str, Row]]:
    """One row a provider."""
    calls: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int] = {}
    held: int | None = None
    for name, provider in known.items():
        past = provider.past.setdefault(direction, [])
        if reason := provider.would_need(direction, limits):
            yield name, {"absent": reason}
            continue
        if bad[name]:
            yield name, bad[name]
            continue
        try:
            run = provider.make(case)
            call = bind(case, run, inputs, direction)
            if held is None and provider.checks is not None:
                outputs: Any = bind(case, run, inputs, "forward")()
                gradients: Any = call() if direction != "forward" else ()
                held = held_bytes((*outputs, *gradients))
                del outputs, gradients
            else:
                call()
            started = time.perf_counter()
            peak = peak_bytes(call, device)
            seconds = time.perf_counter() - started
        except torch.OutOfMemoryError as error:
            yield name, {"absent": f"out of memory: {error}"}
            past.append((math.inf, math.inf))
        except Exception:  # likewise
            yield name, {"failed": traceback.format_exc(limit=-4)}
        else:
            calls[name], peaks[name] = call, peak
            past.append((seconds, peak))
    together = sum(known[name].past[direction][-1][0] for name in calls)
    rounds = max(3, min(limits.rounds, int(limits.point_seconds / max(together, 1e-9))))
    times = interleaved(calls, rounds, limits.point_seconds / 75, device)
    for name, taken in times.items():
        past = known[name].past[direction]
        past[-1] = (summary(taken.seconds).median, past[-1][1])
        row: Row = {
            **times_row(taken.seconds),
            "peak_bytes": peaks[name],
            "held_bytes": held,
        }
        if known[name].checks is not None:
            checked = known[name].checked
            row["checked"] = checked[-1][0] if checked else 0
        for more in ("launch", "graph"):
            if getattr(taken, more):
                row[f"{more}_ms"] = summary(getattr(taken, more)).median * 1e3
        yield name, row


def line(row: Row) -> str:
    """A row for the screen."""
    head = (
        f"{row['op']} {row['case']} {row['dimension']}={row['value']} {row['direction']} "
        f"{row['provider']}: "
    )
    if why := problem(row):
        return f"{head}{why}"
    return (
        f"{head}{row['p50_ms']:.4g} ms (floor {row['floor_ms']:.3g}), "
        f"{row['peak_bytes'] / 1e6:.4g} MB (must hold {(row['held_bytes'] or 0) / 1e6:.4g})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0 when nothing of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument("--dimension", action="append", help="only this one; repeatable")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--quick", action="store_true", help="forward, every other size, less time; not compiled"
    )
    parser.add_argument(
        "--out", type=Path, help="folder or .jsonl file; default: results/<device>/"
    )
    arguments = parser.parse_args(argv)
    device, quick = arguments.device, arguments.quick
    machine = describe(device)
    print(f"{machine['name']}, torch {machine['torch']}, {machine['threads']} threads")
    limits = QUICK if quick else FULL
    if device == "cuda":
        limits = dataclasses.replace(limits, bytes=torch.cuda.mem_get_info()[0] / 2)
    failures = 0
    with writer(device, arguments.out) as into:
        roof = measure_roof(device, 3 if quick else 7)
        into.add(to_row(roof))
        for sweep in SWEEPS:
            if arguments.op and sweep.op not in arguments.op:
                continue
            if arguments.dimension and sweep.dimension not in arguments.dimension:
                continue
            values = sweep.values[::-2][::-1] if quick else sweep.values
            wanted = DIRECTIONS[:1] if quick else DIRECTIONS
            for row in measure(sweep, device, roof, limits, values, wanted, quick):
                into.add(row)
                print(line(row), flush=True)
                failures += "failed" in row and row["provider"] in OURS
        print(into.path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
