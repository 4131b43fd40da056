"""The table of floors."""

from __future__ import annotations

import pytest

from benchmarks import floors
from fused_attn.validation import op_cases


def test_the_floor_is_the_longer_of_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["floors", "--op", "attention", "--device", "cuda", "--tflops", "989"]
    monkeypatch.setattr("sys.argv", [*arguments, "--tbps", "4.3"])
    assert floors.main() == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    table = {(row[0], row[1]): row[2:] for row in rows if len(row) == 7}
    (case,) = (c for c in op_cases("attention") if c.name == "full_8192_D128")
    forward = table["attention full_8192_D128", "forward"]
    assert float(forward[0]) == pytest.approx(4 * 2 * 16 * 8192**2 * 128 / 1e9, rel=1e-3)
    assert float(forward[0]) == pytest.approx(case.flops() / 1e9, rel=1e-3)
    assert float(forward[3]) == pytest.approx(case.flops() / 989e12 * 1e3, rel=1e-2)
    assert forward[4] == "operations"
    assert not any("decoding_512" in name for name, _ in table)


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_SIDE", 64)
    monkeypatch.setattr(floors, "_COPY", 1 << 20)
    assert min(floors.measured_rates()) > 0.0
