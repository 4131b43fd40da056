from __future__ import annotations

import pytest

from fused_attn.cli import demo, main


def test_demo_translates_draws_and_fails_below_the_bar(tmp_path, monkeypatch, capsys) -> None:
    """Twenty updates teach too little, and the exit status says so; the picture is drawn."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "_TRAINING_PAIRS", 2_000)
    monkeypatch.setattr(demo, "_TEST_PAIRS", 12)
    assert main(["demo", f"--out={tmp_path}", "--updates=20"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n  source     ") == 10
    assert captured.out.count("\n  reference  ") == 10
    assert "exact match: 0.0% of 12 held-out sentences" in captured.out
    assert "fewer than 95% are exactly right" in captured.err
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_demo_tests_on_what_it_did_not_train_on(monkeypatch, tmp_path) -> None:
    seen: list[list[tuple[str, str]]] = []

    class StoppedError(Exception):
        pass

    def keep(model, pairs, *rest):
        seen.append(pairs)
        raise StoppedError

    monkeypatch.setattr(demo, "_train", keep)
    monkeypatch.setattr(demo, "_TRAINING_PAIRS", 3_000)
    with pytest.raises(StoppedError):
        main(["demo", f"--out={tmp_path}"])
    pairs = demo.generate_pairs(3_000 + demo._TEST_PAIRS, seed=1)
    assert seen[0] == pairs[:3_000]
    trained = {source for source, _ in pairs[:3_000]}
    assert all(source not in trained for source, _ in pairs[3_000:])
