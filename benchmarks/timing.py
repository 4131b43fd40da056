"""How a time is taken: providers interleaved in one process, medians, and their spread.

Machines are noisy, so a time by itself means little. Providers take turns (A B A B), and what is
reported is the median of the ratios of neighbouring turns with its quartiles.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_attn import _extension


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


def interleaved(
    providers: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds a call of each provider, once a round, in turns.

    Args:
        providers: Functions by name.
        rounds: Turns that each provider takes, after one that is thrown away.
        seconds: A turn repeats the call until it has lasted about this long.
    """
    repeats = {}
    for name, function in providers.items():
        function()  # allocations, compilation, page faults
        started = time.perf_counter()
        function()
        repeats[name] = max(1, int(seconds / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(rounds + 1):
        for name, function in providers.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            elapsed = (time.perf_counter() - started) / repeats[name]
            if i > 0:
                times[name].append(elapsed)
    return times


def summary(times: list[float]) -> Timing:
    """Quantiles of the rounds."""
    ordered = sorted(times)
    n = len(ordered)
    return Timing(ordered[n // 5], statistics.median(ordered), ordered[n - 1 - n // 5])


def ratio(peer: list[float], ours: list[float]) -> Ratio:
    """Quartiles of the ratios of neighbouring turns."""
    ratios = [a / b for a, b in zip(peer, ours, strict=True)]
    q25, median, q75 = statistics.quantiles(ratios, n=4)
    return Ratio(q25, median, q75)


def machine() -> str:
    """The machine in a line: CPU, instruction set in use, threads, torch."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    ours = "none" if _extension.load() else _extension.cpu_instruction_set()
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}), our kernels {ours}"
    )
