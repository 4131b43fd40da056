"""A training step of the RNN beside plain PyTorch: the same loss, fewer launches, less memory."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from benchmarks.training_step import launches

from benchmarks import rnn_training_step
from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig, rnn_decoding

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


@pytest.mark.parametrize(("feeds", "most"), [(False, 19), (True, 21)])
def test_a_step_of_decoding_is_few_launches(
    feeds: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of LSTM with additive attention, through the modules, as on a GPU."""
    monkeypatch.setattr(rnn_decoding, "_packs", lambda model: False)
    sizes = {"embedding_size": 16, "hidden_size": 16, "input_feeding": feeds}
    config = RNNSeq2SeqConfig(source_vocab_size=30, target_vocab_size=30, **sizes)
    model = RNNSeq2Seq(config).eval()
    state = model.start(torch.randint(4, 30, (3, 5)), torch.tensor([5, 2, 4]), 4)
    tokens = torch.randint(4, 30, (3, 4))
    assert 0 < launches(lambda: model.step(tokens, state), "cpu") <= most
