"""Sweeps over one dimension, and the laws that they show."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import exponents, scaling
from benchmarks.results import Row, read
from benchmarks.scaling import SWEEPS, Limits, Sweep
from fused_attn.ops._cases import Case, Direction, Roof
from fused_attn.ops.attention.cases import AttentionCase
from fused_attn.ops.beam_search.cases import BeamSearchCase
from fused_attn.validation import OPS, case_inputs, fused_backends

ROOF = Roof(((1 << 20, 1e-4),), {torch.float32: 1e11})
LIMITS = Limits(rounds=3, call_seconds=60.0, point_seconds=0.01, check_seconds=60.0, bytes=1e9)
BUILT = pytest.mark.skipif(
    "cpu" not in fused_backends("attention", "cpu"), reason="the C++ extension is not built"
)
ATTENTION = next(s for s in SWEEPS if (s.op, s.dimension) == ("attention", "T"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Beam search over V, from a small case."""
    base = BeamSearchCase(name="small", kind="benchmark", B=2, K=2, V=100)
    monkeypatch.setattr(scaling, "op_cases", lambda op: (base,))
    return Sweep("beam_search", "V", "small", "small", (50, 100), lambda base, V: {"V": V})


def peak_and_held(case: Case, direction: Direction) -> tuple[int, int]:
    """Of our call."""
    inputs = case_inputs(case, torch.float32, "cpu")
    outputs: Any = scaling.bind(case, lambda given: case.run(given, None), inputs, "forward")()
    call = scaling.bind(case, lambda given: case.run(given, None), inputs, direction)
    gradients: Any = call() if direction != "forward" else ()
    held = scaling.held_bytes((*outputs, *gradients))
    del outputs, gradients
    return scaling.peak_bytes(call), held


def rows_of(sweep: Sweep, limits: Limits = LIMITS) -> list[Row]:
    directions = ("forward",)
    return list(scaling.measure(sweep, "cpu", ROOF, limits, sweep.values, directions, quick=True))


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: f"{sweep.op}-{sweep.dimension}")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_doubles_and_costs_more_or_as_much(sweep: Sweep, device: str) -> None:
    cases = [sweep.case(value, device) for value in sweep.values]
    assert all(b == 2 * a for a, b in itertools.pairwise(sweep.values))
    work = [case.work(torch.float32, "forward") for case in cases]
    assert all(a <= b for a, b in itertools.pairwise(work))
    assert work[0] < work[-1]
    assert len({case.name for case in cases}) == len(cases)


def test_every_op_is_swept() -> None:
    assert {sweep.op for sweep in SWEEPS} == set(OPS)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: f"{sweep.op}-{sweep.dimension}")
def test_every_provider_of_a_sweep_can_be_made(sweep: Sweep) -> None:
    scaling._compiled.cache_clear()
    found = scaling.providers(sweep, "cpu", quick=False)
    assert len(found) > 1
    for provider in found.values():
        provider.make(sweep.case(sweep.values[0], "cpu"))
    scaling._compiled.cache_clear()


def test_a_point_has_a_row_a_provider(small: Sweep) -> None:
    rows = rows_of(small)
    assert [(row["value"], row["provider"]) for row in rows] == [
        (value, provider) for value in (50, 100) for provider in ("fused_attn", "eager")
    ]
    for row in rows:
        assert row["suite"] == "scaling"
        assert row["case"] == "small"
        assert 0.0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        # 400 bytes or 800 take the time of the smallest copy.
        assert row["floor_ms"] == pytest.approx(0.1)
        # Per sentence two tokens, parents and ended parents of 8 bytes, two scores each of 4, and
        # the mark of an invalid row.
        assert row["held_bytes"] == 2 * (2 * (8 + 8 + 4 + 4 + 8) + 1)
        if row["provider"] == "fused_attn":
            assert row["checked"] == row["value"]
            assert row["peak_bytes"] >= row["held_bytes"]


def test_what_is_wrong_is_not_timed(small: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("is wrong, so it is not timed: scores")

    monkeypatch.setattr(scaling, "require_correct", refuse)
    rows = rows_of(small)
    ours = [row for row in rows if row["provider"] == "fused_attn"]
    assert all("is wrong" in row["failed"] and "p50_ms" not in row for row in ours)
    assert all("p50_ms" in row for row in rows if row["provider"] == "eager")


def test_beyond_what_a_comparison_may_take_nothing_is_compared(small: Sweep) -> None:
    rows = rows_of(small, dataclasses.replace(LIMITS, check_seconds=0.0))
    # The first is compared always.
    assert [row["checked"] for row in rows if row["provider"] == "fused_attn"] == [50, 50]


def test_a_provider_that_is_too_slow_or_too_large_is_left_out(small: Sweep) -> None:
    slow = rows_of(small, dataclasses.replace(LIMITS, call_seconds=0.0))
    assert all("p50_ms" in row for row in slow[:2])
    assert all(row["absent"].startswith("would need") for row in slow[2:])
    assert all(row["absent"].endswith("s a call") for row in slow[2:])
    large = rows_of(small, dataclasses.replace(LIMITS, bytes=2000.0))
    second = {row["provider"]: row for row in large[2:]}
    assert "p50_ms" in second["fused_attn"]
    assert second["eager"]["absent"].endswith("GiB")


def test_the_command_writes_what_it_measures(
    small: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scaling, "SWEEPS", (small,))
    monkeypatch.setattr(scaling, "measure_roof", lambda *_: ROOF)
    out = tmp_path / "rows.jsonl"
    assert scaling.main(["--quick", "--out", str(out)]) == 0
    suites = [json.loads(line)["suite"] for line in out.read_text().splitlines()]
    assert suites == ["machine", "roof", "scaling", "scaling"]
    [ours, eager] = read(out).suite("scaling")
    assert ours["value"] == eager["value"] == 100


# --- laws ---------------------------------------------------------------------------------------


def rows_like(exponent: float, provider: str = "fused_attn", **more: Any) -> list[Row]:
    """A constant, and from 16 on a power."""
    return [
        {
            "op": "attention",
            "dimension": "T",
            "value": value,
            "dtype": "float32",
            "direction": "forward",
            "provider": provider,
            "p50_ms": 3.0 * max(value, 16) ** exponent,
            "floor_ms": 1.5 * value**exponent,
            "peak_bytes": 100,
            "held_bytes": 0,
            **more,
        }
        for value in (4, 8, 16, 32, 64, 128)
    ]


def test_the_exponent_of_a_power_is_found() -> None:
    upper = exponents.upper_half(rows_like(1.5))
    assert [row["value"] for row in upper] == [32, 64, 128]
    found = exponents.exponent([r["value"] for r in upper], [r["p50_ms"] for r in upper])
    assert found == pytest.approx(1.5)
    assert exponents.exponent([1, 2], [0.0, 1.0]) is None
    assert exponents.exponent([1], [1.0]) is None


def test_the_table_has_ours_beside_the_others_and_the_model() -> None:
    absent = {**rows_like(2.0, "eager")[-1], "value": 256, "absent": "would need 9 s a call"}
    del absent["p50_ms"]
    lines = exponents.table([*rows_like(1.0), *rows_like(2.0, "eager"), absent])
    assert lines[2:] == [
        "| attention | T | forward | 1.00 | eager 2.00 | 1.00 | 2.0 | 0.00 | eager 0.00 | – |",
        "",
    ]


@BUILT
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_memory_of_attention_grows_with_the_length_and_of_the_peer_with_its_square(
    direction: Any,
) -> None:
    # With 16 heads or more no sums of keys' gradients are split into chunks.
    lengths = (128, 256, 512)
    peaks: dict[str, list[int]] = {"fused_attn": [], "eager": []}
    known = scaling.providers(ATTENTION, "cpu", quick=True)
    for length in lengths:
        case = AttentionCase(name="law", kind="typical", B=1, H=16, T=length, S=length, D=8)
        inputs = case_inputs(case, torch.float32, "cpu")
        for name, of_provider in peaks.items():
            call = scaling.bind(case, known[name].make(case), inputs, direction)
            call()
            of_provider.append(scaling.peak_bytes(call))
    ours, eager = (exponents.exponent(lengths, some) for some in peaks.values())
    assert ours == pytest.approx(1.0, abs=0.05), peaks
    assert eager == pytest.approx(2.0, abs=0.1), peaks


@BUILT
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: f"{sweep.op}-{sweep.dimension}")
def test_ours_holds_little_beside_outputs_and_gradients(sweep: Sweep) -> None:
    case = sweep.case(sweep.values[len(sweep.values) // 2 - 1], "cpu")
    if sweep is ATTENTION:  # whose 8 heads have two sums each of the gradients of keys and values
        case = dataclasses.replace(case, B=2)  # type: ignore[call-arg]
    for direction in scaling.DIRECTIONS if case.differentiable else ("forward",):
        peak, held = peak_and_held(case, direction)
        # Statistics of rows, and sums of parameters' gradients in chunks.
        assert held <= peak <= 1.1 * held + 64 * 1024
