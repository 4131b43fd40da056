"""Experiments run, from generated data to a table and a picture; what they find takes minutes."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.experiments import alignment, copy_words, monotonic
from fused_attn.training import InputError

TINY = ["--steps=2", "--hidden=8", "--test=3"]


def test_copying_ends_in_a_table_and_a_picture(tmp_path, capsys) -> None:
    words = ["--pairs=60", "--form=generate", "--form=copynet", f"--out={tmp_path}"]
    assert copy_words.main([*TINY, *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("60 pairs, vocabulary of 8")
    rows = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("|")]
    assert rows == ["| output", "| ---", "| generate", "| copynet"]
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    picture = tmp_path / "picture.png"
    words = [f"--model={tmp_path}/copynet", "--sentence=zork met quux in blip ."]
    assert (
        alignment.main([*words, "--sentence=nobody in zork knows blip .", f"--output={picture}"])
        == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_recordings_end_in_a_table_and_a_picture(tmp_path, capsys) -> None:
    words = ["--recordings=20", "--longest=4", "--form=location, guided", "--form=monotonic"]
    assert monotonic.main([*TINY, *words, f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("20 recordings of 2 to 4 letters, ")
    assert "guided attention" in out
    assert [line.split(" | ")[0] for line in out.splitlines()[-2:]] == [
        "| location, guided",
        "| monotonic",
    ]
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    picture = tmp_path / "picture.svg"
    words = [f"--model={tmp_path}/location-guided", f"--frames={tmp_path}/test.npz", "--index=1"]
    assert alignment.main([*words, f"--output={picture}"]) == 0
    assert "<svg" in picture.read_text()
    with pytest.raises(InputError, match=r"absent\.npz: cannot read"):
        alignment.main([words[0], "--frames=absent.npz"])
