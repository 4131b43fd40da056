"""What a training step launches and allocates, which does not depend on how busy the machine is."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from benchmarks import training_step

SMALL = ["--d-model=64", "--layers=1", "--feedforward=128", "--heads=2", "--vocab-size=100"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_launches_and_allocates_less_than_torchs(
    norm_first: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--batch=32", "--length=32", "--rounds=2"]
    monkeypatch.setattr(sys, "argv", ["", *options, *["--norm-first"] * norm_first])
    assert training_step.main() == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| [\d.]+ \|$", printed, re.MULTILINE)
    (_, *theirs), (_, *ours) = rows
    launches, megabytes = zip(map(int, theirs), map(int, ours), strict=True)
    assert 0 < launches[1] < 0.7 * launches[0]
    assert 0 < megabytes[1] < 0.75 * megabytes[0]


def test_counts_what_computes_and_what_is_allocated() -> None:
    x = torch.randn(1000, 250)

    def step() -> None:
        (x.view(250, 1000).t() + 1.0).relu()

    assert training_step.launches(step, "cpu") == 2
    assert 2_000_000 <= training_step.allocated(step, "cpu") < 2_001_000
