"""A training step of the RNN beside plain PyTorch: the same loss, fewer launches, less memory."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from benchmarks import rnn_training_step

SMALL = ["--hidden=32", "--layers=1", "--vocab-size=50", "--batch=4", "--length=12", "--rounds=2"]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_launches_and_allocates_less_than_torchs(
    cell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", *SMALL, f"--cell={cell}"])
    assert rnn_training_step.main() == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| [\d.]+ \| [\d,]+ \|$", printed, re.MULTILINE)
    (_, *theirs), (_, *ours) = rows
    launches, megabytes = zip(map(int, theirs), map(int, ours), strict=True)
    assert 0 < launches[1] < 0.7 * launches[0]
    assert megabytes[1] <= megabytes[0]


def test_different_losses_are_refused() -> None:
    losses = {"torch.nn": lambda: torch.tensor(2.0), "fused_attn": lambda: torch.tensor(2.1)}
    with pytest.raises(RuntimeError, match="the models find different losses"):
        rnn_training_step.check_same_loss(losses)
