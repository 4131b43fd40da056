"""What `benchmarks.operators` measures of an op: who is checked, timed and refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import checks, operators, results
from benchmarks.operators import benchmark_cases, bind, directions, measure
from benchmarks.peers import Peer, compiled
from fused_attn.validation import run_function

from .doubling import CASES, PEERS, ROOF, THOUSAND, Doubling, adding, install


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    install(monkeypatch, lambda op, device: {"wrong": "wrong", "fused_attn": None})
    return THOUSAND


def rows_of(direction: Any, only: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    rows = measure(
        THOUSAND, torch.float32, direction, "cpu", ROOF, rounds=4, only=only, seconds=1e-4
    )
    json.dumps(rows)
    return {row["provider"]: row for row in rows}


def test_only_what_is_right_gets_a_time(doubling: Doubling) -> None:
    rows = rows_of("forward")
    assert set(rows) == {"wrong", "fused_attn", "copy", *PEERS} - {"gpu_only"}
    timed = {name for name, row in rows.items() if "p50_ms" in row}
    assert timed == {"fused_attn", "eager", "wrong_gradient", "forward_only", "unchecked", "copy"}
    assert "is wrong, so it is not timed: output_0: max error" in rows["wrong"]["failed"]
    assert "computes something else: output_0" in rows["tripling"]["failed"]
    assert rows["raising"]["failed"].strip().endswith("RuntimeError: out of order")
    assert rows["refusing"]["absent"] == "cannot double"
    assert rows["not_installed"]["absent"] == "no-such-package is not installed"
    assert rows["unchecked"]["unchecked"] == "doubles another tensor"


def test_a_row_has_times_work_and_floor(doubling: Doubling) -> None:
    rows = rows_of("forward+backward")
    ours, eager, copy = rows["fused_attn"], rows["eager"], rows["copy"]
    for row in (ours, eager, copy):
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert (row["rounds"], row["bytes"]) == (4, 2 * 2 * 1000 * 4)
        assert row["gb_per_s"] == pytest.approx(16000 / row["p50_ms"] / 1e6)
    assert "ratio" not in ours
    low, median, high = eager["ratio"]
    assert 0 < low <= median <= high
    assert ours["flop"] == 2000
    assert "flop" not in copy
    floor = ROOF.copy_seconds(16000)
    assert (ours["floor_ms"], ours["bound"]) == (pytest.approx(floor * 1e3), "memory")
    assert ours["share_of_roof"] == pytest.approx(floor * 1e3 / ours["p50_ms"])
    assert ours["peak_bytes"] >= 1000 * 4
    assert (ours["error"], ours["budget"], eager["error"]) == (0.0, 0.0, 0.0)


def test_gradients_are_compared_where_they_are_timed(doubling: Doubling) -> None:
    assert "p50_ms" in rows_of("forward", ("wrong_gradient",))["wrong_gradient"]
    backward = rows_of("backward", ("wrong_gradient", "forward_only", "eager"))
    assert "computes something else: grad_x" in backward["wrong_gradient"]["failed"]
    assert backward["forward_only"]["absent"] == "has no gradient"
    assert backward["eager"]["error"] == 0.0


def test_the_oracle_is_computed_once_for_all_providers_and_directions(
    doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = checks.oracle_and_reference
    monkeypatch.setattr(
        checks, "oracle_and_reference", lambda *given: calls.append(1) or original(*given)
    )
    checks._expected.cache_clear()
    for direction in directions(THOUSAND):
        rows_of(direction)
    assert len(calls) == 1


def test_a_peer_may_round_more_often_but_not_be_another_function(doubling: Doubling) -> None:
    def off_by(share: float) -> Peer:
        return Peer(lambda case: lambda inputs: (inputs["x"] * (2.0 + share),), "not quite")

    def check(peer: Peer) -> checks.Agreement:
        run = peer.make(THOUSAND)
        return checks.require_same_function(THOUSAND, peer, run, torch.float32, "cpu", "forward")

    assert check(off_by(1e-6)).error == pytest.approx(5e-7, rel=0.2)
    with pytest.raises(AssertionError, match="something else: output_0: max error"):
        check(off_by(1e-4))
    with pytest.raises(AssertionError, match="NaN out of place"):
        check(off_by(float("nan")))
    with pytest.raises(AssertionError, match=r"shape \[1\], expected \[1000\]"):
        check(Peer(lambda case: lambda inputs: (inputs["x"][:1],), "too short"))


def test_the_backward_alone_repeats_on_one_graph(doubling: Doubling) -> None:
    seen: list[bool] = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return x * 2.0

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(False)
            return gradient * 2.0

    inputs = {"x": torch.randn(4)}

    def run(given: Any) -> tuple[Tensor, ...]:
        return (Counted.apply(given["x"]),)

    call = bind(THOUSAND, run, inputs, "backward")
    seen.clear()
    (first,), (second,) = call(), call()
    assert len(seen) == 2  # two backwards
    assert torch.equal(first, second)
    both = bind(THOUSAND, run, inputs, "forward+backward")
    seen.clear()
    both()
    assert len(seen) == 2  # a forward and a backward
    forward = bind(THOUSAND, run, inputs, "forward")
    (output,) = forward()
    assert not output.requires_grad
    assert not inputs["x"].requires_grad


def test_cases_by_device_and_setting(doubling: Doubling) -> None:
    thousand, again, rarely, large = CASES[1:]
    assert benchmark_cases("doubling") == [thousand, again, rarely]
    assert benchmark_cases("doubling", quick=True) == [thousand, rarely]
    assert benchmark_cases("doubling", "cuda") == [large]
    assert operators.timed_dtypes(thousand, "cpu") == [torch.float32]
    assert operators.timed_dtypes(thousand, "cuda") == [torch.float32, torch.bfloat16]


def test_ours_is_the_choice_of_the_library_or_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.our_providers("attention", "cpu") == {"fused_attn": None}
    monkeypatch.setattr(operators, "fused_backends", lambda op, device: ("triton", "cuda"))
    assert operators.our_providers("attention", "cuda") == {"triton": "triton", "cuda": "cuda"}
    monkeypatch.setattr(operators, "fused_backends", lambda op, device: ())
    assert operators.our_providers("attention", "cuda") == {"fused_attn": None}


def test_what_is_compiled_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as ever; generating code takes ten seconds.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    peer = Peer(adding, "a sum")
    inputs = {"x": torch.randn(1000), "dropout_p": 0.0}
    run = compiled(peer).make(THOUSAND)
    eager = run_function(THOUSAND, inputs, adding(THOUSAND))
    (output,), gradients = run_function(THOUSAND, inputs, run)
    assert torch.equal(output, eager[0][0])
    assert torch.equal(gradients["grad_x"], eager[1]["grad_x"])


def test_the_command_writes_rows_and_fails_for_a_wrong_kernel(
    doubling: Doubling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(operators, "OPS", ("doubling",))
    monkeypatch.setattr(operators, "measure_roof", lambda device: ROOF)
    monkeypatch.setattr(operators, "OURS", (*operators.OURS, "wrong"))
    path = tmp_path / "rows.jsonl"
    command = ["--case", "again", "--direction", "forward", "--rounds", "2", "--out", str(path)]
    assert operators.main([*command, "--only", "wrong"]) == 1
    assert operators.main([*command, "--only", "fused_attn", "eager", "tripling"]) == 0
    found = results.read(path)
    assert found.suite("roof")
    providers = [row["provider"] for row in found.suite("operators")]
    assert providers == ["wrong", "tripling", "fused_attn", "eager", "copy"]
    out = capsys.readouterr().out
    assert "doubling again float32 forward wrong: failed, AssertionError: is wrong" in out
    assert "times ours" in out


def test_every_op_of_the_library_has_peers_that_say_what_they_are() -> None:
    for op in operators.OPS:
        for device in ("cpu", "cuda"):
            peers = operators.peers_of(op, device)
            assert peers, op
            assert all(peer.about for peer in peers.values())
            assert not set(peers) & {*operators.OURS, "copy"}
