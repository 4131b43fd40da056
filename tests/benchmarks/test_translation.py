"""The comparison with other libraries, at a size that takes seconds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks import translation

SMALL = ["--d-model=64", "--layers=2", "--heads=4", "--feedforward=128", "--vocab-size=300"]
CALL = ["--sentences=3", "--length=10", "--tokens=5", "--rounds=2", "--threads=1"]
PEERS = ("CTranslate2", "Hugging Face")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_all_find_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("ctranslate2")
    monkeypatch.setattr(sys, "argv", ["", *SMALL, *CALL])
    assert translation.main() == 0  # 1 where tokens in fp32 differ
    row = r"^\| (\S.*?) \| (fp32|int8) \| ([A-Z]\w+ ?\w*) \| \d"
    rows = re.findall(row, capsys.readouterr().out, re.MULTILINE)
    fp32 = [(search, "fp32", peer) for search in ("greedy", "beam 4") for peer in PEERS]
    int8 = [(search, "int8", "CTranslate2") for search in ("greedy", "beam 4")]
    assert rows == [*fp32, *int8]


def test_absent_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["", *SMALL, *CALL, "--beam-size=1", "--dtype=fp32"])
    assert translation.main() == 0
    printed = capsys.readouterr().out
    assert "Hugging Face is absent" in printed
    assert "CTranslate2 is absent" in printed
    assert re.search(r"\| greedy \| fp32 \| absent \|", printed)


def test_agreement() -> None:
    assert translation.agreement([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    assert translation.agreement([[1, 2]], [[2]]) == 0.0
