"""``fused-attn validate``, on an op whose kernel is right, wrong, refuses or crashes by case."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import _extension
from fused_attn.cli import main
from fused_attn.cli import validate as command
from fused_attn.ops._cases import Case


@dataclass(frozen=True, kw_only=True)
class Doubling(Case):
    op = "doubling"
    differentiable = ("x",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        return {"x": torch.randn(4, 8, generator=generator).to(device, dtype)}

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        x = inputs["x"]
        if backend != "reference":
            if self.name == "refused":
                raise NotImplementedError("doubling: backend 'cpu' cannot run this call:\n  - no")
            if self.name == "crashes":
                raise ZeroDivisionError("by nought")
            if self.name == "wrong":
                x = x * 1.05
            if self.name == "wrong_gradient":
                return (x * 2 + (x.square() - x.square().detach()),)
            if self.name == "nan":
                x = x / 0.0 * 0.0
        return (x * 2,)


def use(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make an op of these cases the only one."""
    cases, api = ModuleType("cases"), ModuleType("api")
    cases.CASES = tuple(  # type: ignore[attr-defined]
        Doubling(name=name, kind="benchmark" if name == "large" else "edge") for name in names
    )
    api.BACKENDS = {"cpu": None, "reference": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fused_attn.ops.doubling.cases", cases)
    monkeypatch.setitem(sys.modules, "fused_attn.ops.doubling.api", api)
    monkeypatch.setattr(command, "OPS", ("doubling",))


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_passes_with_a_row_for_each_case_and_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "right", "large")
    assert main(["validate", "--json"]) == 0
    found = rows(capsys.readouterr().out)
    assert [(row["case"], row["dtype"]) for row in found] == [
        ("right", "float32"),
        ("right", "bfloat16"),
    ]
    assert {row["backend"] for row in found} == {"cpu"}
    assert {row["verdict"] for row in found} == {"passed"}
    assert [c["name"] for c in found[0]["comparisons"]] == ["output_0", "grad_x"]
    for comparison in found[0]["comparisons"]:
        assert comparison["passed"]
        assert comparison["max_error"] <= comparison["max_budget"]


def test_prints_error_budget_and_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "right")
    assert main(["validate"]) == 0
    first, second, head, summary = capsys.readouterr().out.splitlines()
    assert first.split()[:5] == ["passed", "doubling", "cpu", "float32", "right"]
    assert "error 0, budget" in first
    assert "bfloat16" in second
    assert head.split()[:3] == ["op", "backend", "passed"]
    assert summary.split()[:6] == ["doubling", "cpu", "2", "0", "0", "0"]


@pytest.mark.parametrize("case", ["wrong", "wrong_gradient", "nan", "crashes"])
def test_exits_with_1_when_a_case_fails(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "right", case)
    assert main(["validate", "--json"]) == 1
    verdicts = {row["case"]: row for row in rows(capsys.readouterr().out)}
    assert verdicts["right"]["verdict"] == "passed"
    assert verdicts[case]["verdict"] == ("error" if case == "crashes" else "failed")
    detail = verdicts[case]["detail"]
    expected = {
        "wrong": "output_0: max error",
        "wrong_gradient": "grad_x: max error",
        "nan": "NaN out of place",
        "crashes": "ZeroDivisionError: by nought",
    }[case]
    assert expected in detail
    assert (case == "wrong_gradient") == detail.startswith("grad_x")


def test_quiet_prints_only_what_did_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "right", "wrong")
    assert main(["validate", "--quiet"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["failed", "failed", "op", "doubling"]


def test_a_refusal_is_a_row_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "right", "refused")
    assert main(["validate", "--backend", "cpu", "--json"]) == 0
    refused = [row for row in rows(capsys.readouterr().out) if row["case"] == "refused"]
    assert {row["verdict"] for row in refused} == {"refused"}


@pytest.mark.parametrize("words", [["--backend", "cpu"], []])
def test_exits_with_1_when_nothing_ran(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "refused")
    assert main(["validate", *words]) == 1
    assert "nothing was validated" in capsys.readouterr().err


def test_exits_with_1_when_a_named_backend_ran_no_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "right")
    absent = "runs on cuda tensors only, got cpu"
    monkeypatch.setattr(_extension, "load_cuda_host", lambda: absent)
    assert main(["validate", "--backend", "cpu", "--backend", "cuda"]) == 1
    error = capsys.readouterr().err
    assert "backend cuda ran no case: runs on cuda tensors only, got cpu" in error


def test_kinds_are_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "right", "large")
    assert main(["validate", "--kind", "benchmark", "--json"]) == 0
    assert {row["case"] for row in rows(capsys.readouterr().out)} == {"large"}


def test_an_unknown_op_is_a_mistake_in_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["validate", "--op", "convolution"])
    assert exit_.value.code == 2
    assert "add_layer_norm" in capsys.readouterr().err
