"""Experiments run, from generated data to a table and a picture; what they find takes minutes."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.experiments import alignment, by_length, copy_words, monotonic
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


def test_scores_are_of_the_sentences_of_a_length(tmp_path, capsys) -> None:
    texts = {
        "src": ["a b c d e f g h", "a b c d", "a b c d e f g", "a b c d e"],
        "ref": [
            "one two three four",
            "five six seven eight",
            "nine ten six two",
            "one six ten two",
        ],
        "short": ["no", "five six seven eight", "no", "one six ten two"],
    }
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    words = [f"--{name}={tmp_path / name}" for name in ("src", "ref")]
    words += ["--groups=2", f"--hypotheses={tmp_path / 'short'}"]
    assert by_length.main(words) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows[0] == ["| 4–5", "2", "100.0 |"]
    assert rows[1][:2] == ["| 7–8", "2"]
    assert float(rows[1][2].split()[0]) < 1.0
    (tmp_path / "short").write_text("no\n")
    with pytest.raises(SystemExit):
        by_length.main(words)
    assert "must have 4 lines, as the sources, got 1" in capsys.readouterr().err
