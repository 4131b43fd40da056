"""Generated tasks have exactly one right answer each."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fused_attn.training.metrics import error_rate
from fused_attn.training.synthetic_copy import copy_words, generate_copy_pairs
from fused_attn.training.synthetic_speech import SyntheticSpeech
from fused_attn.training.text import UNK, Vocabulary


def test_names_are_the_words_that_both_sides_share() -> None:
    pairs = generate_copy_pairs(600)
    assert len(set(pairs)) == 600
    assert pairs == generate_copy_pairs(600)
    assert pairs != generate_copy_pairs(600, seed=2)
    words = set(copy_words())
    frames: dict[str, set[str]] = {}
    for english, german in pairs:
        names = [word for word in english.split() if word not in words]
        assert 2 <= len(names) == len(set(names)) <= 4
        assert set(names) == {word for word in german.split() if word not in words}
        sides = []
        for side in (english, german):
            for number, name in enumerate(names):
                side = re.sub(rf"\b{name}\b", f"<{number}>", side)
            sides.append(side)
        frames.setdefault(sides[0], set()).add(sides[1])
    assert len(frames) == 12
    # Which name goes where depends on the sentence around it alone.
    assert all(len(translations) == 1 for translations in frames.values())


def test_a_vocabulary_of_words_has_the_templates_and_no_name() -> None:
    pairs = generate_copy_pairs(3000)
    text = [side for pair in pairs for side in pair]
    words = copy_words()
    vocabulary = Vocabulary.train(text, len(words) + 4, model_type="word")
    assert all(UNK not in ids for ids in vocabulary.encode(words))
    assert all(UNK in ids for ids in vocabulary.encode([source for source, _ in pairs]))


def test_recordings_are_their_letters_for_a_while_each() -> None:
    speech = SyntheticSpeech(noise=0.0)
    source, texts = speech.generate(50, seed=3)
    assert len(source) == len(texts) == 50
    sounds = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    for frames, text in zip(source, texts, strict=True):
        assert 20 <= len(text) <= 40
        heard = np.abs(frames[:, None] - sounds).sum(axis=2)
        assert heard.min(axis=1).max() < 1e-5
        letters = heard.argmin(axis=1)
        starts = np.flatnonzero(np.diff(letters, prepend=-1))
        assert "".join(chr(97 + letter) for letter in letters[starts]) == text
        lasted = np.diff(starts, append=len(letters))
        assert lasted.min() >= 2
        assert lasted.max() <= 5
    noisy, same = SyntheticSpeech(noise=0.5).generate(50, seed=3)
    assert same[0] == texts[0]
    first = noisy[0] - source[0]
    assert first.std() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"letters": 1}, r"letters must be in 2\.\.26, got 1"),
        ({"shortest": 50}, r"shortest must be in 1\.\.40 \(longest\), got 50"),
        ({"fewest_frames": 0}, r"fewest_frames must be in 1\.\.5"),
        ({"noise": -1}, r"noise must be at least 0, got -1"),
        ({"features": 0}, r"features must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticSpeech(**fields)


def test_the_error_rate_is_levenshteins() -> None:
    assert error_rate(["kitten"], ["sitting"]) == 3 / 7
    assert error_rate(["abc", ""], ["abc", "de"]) == 2 / 5
    assert error_rate([["a", "bc"]], [["bc"]]) == 1
    with pytest.raises(ValueError, match="one sentence for each reference, at least one"):
        error_rate(["a"], [])
