"""How times are taken, and the roof beside them: turns, repeats, ratios, interpolation."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import roofs, timing
from benchmarks.timing import Ratio, interleaved, peak_bytes, ratio, summary
from fused_attn.ops._cases import Roof

from .doubling import THOUSAND


class Clock:
    """Stands still but for the calls that take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float) -> timing.Call:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def test_providers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", 1.0), "b": [clock.call("b", 2.0), clock.call("c", 4.0)]}
    times = interleaved(calls, rounds=3)
    # A call to warm each input up and one to see how long it takes; then the rounds.
    assert clock.log == [*"aa", *"bcb", *"ac", *"ab", *"ac"]
    assert times["a"].seconds == [1.0, 1.0, 1.0]
    assert times["b"].seconds == [4.0, 2.0, 4.0]


def test_a_turn_lasts_long_enough_for_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"short": clock.call("s", 0.001), "long": clock.call("l", 1.0)}
    times = interleaved(calls, rounds=2, seconds=0.0105)
    # Short calls have one round more, which is not counted.
    assert clock.log.count("s") == 2 + 3 * 10
    assert clock.log.count("l") == 2 + 3
    assert times["short"].seconds == pytest.approx([0.001, 0.001])


def test_a_ratio_is_of_neighbouring_turns() -> None:
    # The machine is twice as slow in every other turn: the times overlap, the ratios do not.
    ours = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    assert ratio([1.5 * x for x in ours], ours) == Ratio(1.5, 1.5, 1.5)
    assert ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == Ratio(1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_summary_is_of_quantiles() -> None:
    s = summary([5.0, 1.0, 2.0, 4.0, 3.0, 9.0, 7.0, 8.0, 6.0, 10.0])
    assert (s.p20, s.median, s.p80) == (3.0, 5.5, 8.0)
    assert summary([2.0]) == timing.Timing(2.0, 2.0, 2.0)


def test_the_most_memory_held_at_a_time() -> None:
    x = torch.randn(1 << 16)

    def two_at_a_time() -> torch.Tensor:
        y = x * 2
        return y * 2

    assert 2 * (1 << 18) <= peak_bytes(two_at_a_time) < 2 * (1 << 18) + (1 << 16)
    assert peak_bytes(lambda: x.mul_(1.0)) < 1 << 10


def test_a_roof_between_beside_and_beyond_what_was_measured() -> None:
    roof = Roof(((100, 1e-6), (10_000, 1e-4), (20_000, 4e-4)), {torch.bfloat16: 1e12})
    assert roof.copy_seconds(1) == roof.copy_seconds(100) == 1e-6
    assert roof.copy_seconds(1_000) == pytest.approx(1e-5)  # a straight line on both logarithms
    assert roof.copy_seconds(10_000) == pytest.approx(1e-4)
    assert roof.copy_seconds(40_000) == pytest.approx(8e-4)
    assert roof.product_seconds(10**9, torch.bfloat16) == 1e-3
    assert roof.product_seconds(10**9, torch.float32) == 1e-3  # not measured: the best rate


def test_a_floor_is_the_longer_part_of_its_passes() -> None:
    memory = Roof(((1, 1e-9), (10**9, 1.0)), {torch.float32: 1e15})
    operations = Roof(((1, 1e-18), (10**9, 1e-9)), {torch.float32: 1e6})
    for direction, passes in (("forward", 1), ("backward", 1), ("forward+backward", 2)):
        moved = passes * 2 * 1000 * 4 * 1e-9
        assert THOUSAND.floor_seconds(memory, torch.float32, direction) == pytest.approx(moved)
        counted = passes * 1000 / 1e6
        found = THOUSAND.floor_seconds(operations, torch.float32, direction)
        assert found == pytest.approx(counted)


def test_a_roof_is_measured_and_survives_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "SIZES", (1 << 12, 1 << 14, 1 << 16))
    monkeypatch.setattr(roofs, "_CPU_SIDE", 64)
    roof = roofs.measure_roof("cpu", rounds=2)
    assert [size for size, _ in roof.copies] == [1 << 12, 1 << 14]
    seconds = [s for _, s in roof.copies]
    assert 0 < seconds[0] <= seconds[1]
    assert roof.products[torch.float32] > 0
    row = json.loads(json.dumps(roofs.to_row(roof)))
    assert row["suite"] == "roof"
    assert roofs.from_row(row) == roof


def test_a_small_copy_is_no_slower_than_a_large_one() -> None:
    copies = [(1, 3.0), (2, 1.0), (4, 2.0), (8, 5.0)]
    assert roofs._ascending(copies) == ((1, 1.0), (2, 1.0), (4, 2.0), (8, 5.0))


def test_floors_at_given_rates(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    command = ["roofs", "--op", "add_layer_norm", "--tflops", "1", "--tbps", "0.01"]
    monkeypatch.setattr(sys, "argv", command)
    assert roofs.main() == 0
    line = next(
        x
        for x in capsys.readouterr().out.splitlines()  # type: ignore[attr-defined]
        if x.startswith("| add_layer_norm 4096x512 | forward |")
    )
    moved = 3 * 4096 * 512 * 4
    assert line.split(" | ")[-2:] == [f"{moved / 1e10 * 1e3:.3g}", "memory |"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_times_on_the_gpu() -> None:
    x, y = torch.randn(1 << 24, device="cuda"), torch.randn(8, device="cuda")
    calls = {"large": lambda: x * 2, "small": lambda: (y * 2 + 1).sqrt().exp()}
    times = interleaved(calls, rounds=5, device="cuda")
    for taken in times.values():
        assert len(taken.seconds) == len(taken.launch) == 5
        assert all(0 < t < 1 for t in taken.seconds)
    assert len(times["small"].graph) == 5, times["small"].graph_error
    assert peak_bytes(calls["large"], "cuda") == x.nbytes
