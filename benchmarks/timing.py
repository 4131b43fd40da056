"""How a time is taken: providers interleaved in one process, medians, and their spread.

Machines are noisy, so a time by itself means little. Providers take turns (A B A B), and what is
reported is the median of the ratios of neighbouring turns with its quartiles.

On a CPU a turn repeats a call until it has lasted long enough for the clock. On a GPU a time is
that of the device: CUDA events around one call, the L2 cache flushed before it, and the device kept
busy until the host has queued the call, so that the host's speed is not measured. That is a figure
of its own, `Times.launch`, and a call in a program takes the larger of the two; calls that are
bound so are timed from a CUDA graph as well.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
"""To be timed."""

# Larger than the last-level cache of any GPU known (H200: 60 MB).
FLUSH_BYTES = 256 << 20
_WARM_UP_CALLS = 3
_SLEEP_CYCLES = 10_000_000


@dataclass(frozen=True)
class Timing:
    """Seconds a call."""

    p20: float
    median: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """How many times as long a peer takes as we do: above 1, we are faster."""

    q25: float
    median: float
    q75: float


@dataclass
class Times:
    """Seconds of each turn of a provider."""

    seconds: list[float] = field(default_factory=list)
    launch: list[float] = field(default_factory=list)
    """On a GPU: seconds of the host to queue the call."""
    graph: list[float] = field(default_factory=list)
    """On a GPU: seconds of a replay of the call from a CUDA graph, where it was captured."""
    graph_error: str = ""
    """Why there is no graph."""


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def on_side_stream(device: torch.device | str) -> AbstractContextManager[object]:
    """On a GPU, a stream of its own for what is prepared and timed.

    A backward runs on the stream of its forward, and the default stream cannot be captured.
    """
    if torch.device(device).type != "cuda":
        return contextlib.nullcontext()
    _side_stream().wait_stream(torch.cuda.default_stream())
    return torch.cuda.stream(_side_stream())


def interleaved(
    providers: Mapping[str, Call | Sequence[Call]],
    rounds: int = 15,
    seconds: float = 0.02,
    device: torch.device | str = "cpu",
) -> dict[str, Times]:
    """Times of each provider, once a round, in turns.

    Args:
        providers: By name, a call, or the same call on several inputs, which take turns too.
        rounds: Turns that each provider takes, after those that warm it up.
        seconds: On a CPU, a turn repeats the call until it has lasted about this long.
        device: Where the work is done. Calls that run a backward are prepared, and timed, within
            :func:`on_side_stream`.
    """
    calls = {name: [given] if callable(given) else list(given) for name, given in providers.items()}
    if torch.device(device).type == "cuda":
        with on_side_stream(device):
            return _interleaved_on_gpu(calls, rounds)
    repeats = {}
    for name, several in calls.items():
        for call in several:
            call()  # allocations, compilation, page faults
        started = time.perf_counter()
        several[0]()
        repeats[name] = max(1, int(seconds / (time.perf_counter() - started)))
    times = {name: Times() for name in calls}
    # Long calls are warm by now; short ones get a round that is not counted.
    first = 1 if all(n == 1 for n in repeats.values()) else 0
    for i in range(first, rounds + 1):
        for name, several in calls.items():
            call = several[i % len(several)]
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            elapsed = (time.perf_counter() - started) / repeats[name]
            if i > 0:
                times[name].seconds.append(elapsed)
    return times


def _interleaved_on_gpu(calls: dict[str, list[Call]], rounds: int) -> dict[str, Times]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds_a_cycle = _seconds_a_cycle()
    pauses, times = {}, {name: Times() for name in calls}
    for name, several in calls.items():
        for call in several:
            for _ in range(_WARM_UP_CALLS):
                call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        several[0]()
        pauses[name] = int((3 * (time.perf_counter() - started) + 1e-4) / seconds_a_cycle)
        torch.cuda.synchronize()
    for i in range(rounds):
        for name, several in calls.items():
            seconds, launch = _one_turn(several[i % len(several)], flush, pauses[name])
            times[name].seconds.append(seconds)
            times[name].launch.append(launch)
    graphs = {}
    for name, several in calls.items():
        if statistics.median(times[name].launch) > statistics.median(times[name].seconds):
            try:
                graphs[name] = captured(several[0])
            except Exception as error:  # a peer that synchronises cannot be captured
                times[name].graph_error = f"{type(error).__name__}: {error}"
                torch.cuda.synchronize()
    for _ in range(rounds):
        for name, replay in graphs.items():
            times[name].graph.append(_one_turn(replay, flush, pauses[name])[0])
    return times


def _one_turn(call: Call, flush: torch.Tensor, pause: int) -> tuple[float, float]:
    """Seconds on the device, and of the host to queue the call."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(pause)
    before.record()
    started = time.perf_counter()
    call()
    launch = time.perf_counter() - started
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e-3, launch


def captured(call: Call) -> Call:
    """A replay of the call from a CUDA graph; what it returns is the graph's own memory.

    The call must have run before, so that nothing is compiled or loaded while it is captured, and
    its forward, if it is a backward, on this stream: :func:`on_side_stream`. After an error the
    allocator of the process is in no state to be relied upon.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        outputs = call()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay


@functools.cache
def _seconds_a_cycle() -> float:
    shortest = float("inf")
    for _ in range(5):  # an idle GPU begins at a low clock
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda._sleep(_SLEEP_CYCLES)
        after.record()
        after.synchronize()
        shortest = min(shortest, before.elapsed_time(after) * 1e-3)
    return shortest / _SLEEP_CYCLES


def peak_bytes(call: Call, device: torch.device | str = "cpu") -> int:
    """The most bytes of the device that a call holds at a time, beside what was there before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
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


def times_row(seconds: Sequence[float]) -> dict[str, float]:
    """What a row of results has of the rounds: quantiles in milliseconds, and how many."""
    s = summary(seconds)
    in_ms = {"p20_ms": s.p20 * 1e3, "p50_ms": s.median * 1e3, "p80_ms": s.p80 * 1e3}
    return {**in_ms, "rounds": len(seconds)}


def summary(seconds: Sequence[float]) -> Timing:
    """Quantiles of the rounds."""
    ordered = sorted(seconds)
    n = len(ordered)
    return Timing(ordered[n // 5], statistics.median(ordered), ordered[n - 1 - n // 5])


def ratio(peer: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Quartiles of the ratios of neighbouring turns."""
    ratios = [a / b for a, b in zip(peer, ours, strict=True)]
    q25, median, q75 = statistics.quantiles(ratios, n=4)
    return Ratio(q25, median, q75)
