from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from fused_attn.generation import BeamSearch, Constraints, Greedy, Sampling, beam_search
from fused_attn.models import Transformer
from fused_attn.training.errors import DataError, InputError
from fused_attn.training.text import EOS
from fused_attn.training.translator import Translator

from .tiny_translator import some_lines, tiny_model

LINES = ["", *some_lines(30), ""]


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator(*tiny_model(), batch_size=8)


@pytest.fixture(scope="module")
def alone(translator) -> list[str]:
    """Each line translated by itself, by the public search."""
    texts = []
    for line in LINES:
        (tokens,) = translator.vocabularies.source.encode([line])
        if tokens:
            [[best]] = beam_search(translator.model, torch.tensor([[*tokens, EOS]]), beam_size=2)
            texts += translator.vocabularies.target.decode([best.tokens])
        else:
            texts.append("")
    assert len(set(texts)) > 25
    return texts


def test_the_order_is_that_of_the_lines(translator, alone) -> None:
    strategy = BeamSearch(beam_size=2)
    assert translator.translate(LINES, strategy=strategy) == alone
    assert translator.translate([]) == []
    for lines, read_ahead in ((LINES, 7), (LINES, None), (iter(LINES), 20)):
        found = list(translator.translate_each(lines, strategy=strategy, read_ahead=read_ahead))
        assert [translation.text for translation in found] == alone
    assert list(translator.translate_each([])) == []
    assert list(translator.translate_each(iter(()))) == []


def test_a_model_in_training_stays_there(alone) -> None:
    model, vocabularies = tiny_model()
    translator = Translator(model.train(), vocabularies)
    assert translator.translate(LINES, strategy=BeamSearch(beam_size=2)) == alone
    assert model.training


def test_a_line_is_answered_before_the_next_one_comes(translator, alone) -> None:
    answered = threading.Semaphore(0)

    def lines() -> Iterator[str]:
        for line in LINES[:5]:
            yield line
            assert answered.acquire(timeout=20), "the next line is waited for"

    found = []
    for translation in translator.translate_each(lines(), strategy=BeamSearch(beam_size=2)):
        found.append(translation.text)
        answered.release()
    assert found == alone[:5]


def test_neighbours_are_of_similar_length(translator, monkeypatch) -> None:
    lengths: list[int] = []
    start = Transformer.start

    def watched(model, source, source_lengths, beam_size):
        lengths.extend(source_lengths.tolist())
        return start(model, source, source_lengths, beam_size)

    monkeypatch.setattr(Transformer, "start", watched)
    lines = ["a" * (1 + 5 * i % 12) for i in range(36)]
    list(translator.translate_each(lines, strategy=Greedy(), read_ahead=24))
    expected = sorted(len(line) + 1 for line in lines[:12])  # and the end of the sentence
    assert lengths == [*expected[::-1], *expected, *expected[::-1]]
    lengths.clear()
    translator.translate(lines, strategy=Greedy())
    assert lengths == sorted((len(line) + 1 for line in lines), reverse=True)


class Counted(list[str]):
    read = 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            self.read = max(self.read, index.stop)
        return super().__getitem__(index)


def test_no_more_is_read_ahead_than_is_said() -> None:
    translator = Translator(*tiny_model(), batch_size=4)
    # The first line takes far longer than those that follow.
    lines = Counted(["abcdefghijkl" * 4, *"abcdefghijkl" * 4])
    ahead = []
    for out, _ in enumerate(translator.translate_each(lines, read_ahead=8)):
        ahead.append(min(lines.read, len(lines)) - out)
    assert len(ahead) == len(lines)
    assert max(ahead) == 8


def test_a_line_that_fails_leaves_the_others_alone(alone) -> None:
    model, vocabularies = tiny_model()
    [[poison]] = vocabularies.source.encode(["?"])  # unknown, and in none of the others
    with torch.no_grad():
        model.source_embedding.weight[poison] = torch.nan
    translator = Translator(model, vocabularies)
    strategy = BeamSearch(beam_size=2)
    lines = list(LINES)
    lines[3], lines[5], lines[8], lines[9] = "a?b", "a" * 64, "ab\udcff", "\ud800"
    found = list(translator.translate_each(lines, strategy=strategy, read_ahead=12))
    errors = {i: str(each.error) for i, each in enumerate(found) if each.error is not None}
    assert errors.keys() == {3, 5, 8, 9}
    assert "logits must not hold NaN" in errors[3]
    assert errors[5] == "the sentence has 64 tokens, over the model's limit of 63"
    assert errors[8] == "not UTF-8: byte 0xff at position 3 of the line"
    assert errors[9] == "not UTF-8: surrogate 0xd800 at position 1 of the line"
    expected = ["" if i in errors else text for i, text in enumerate(alone)]
    assert [each.text for each in found] == expected
    for place, message in ((3, "NaN"), (5, "limit of 63")):
        with pytest.raises(InputError, match=rf"^some\.en:2: .*{message}"):
            translator.translate(["a", lines[place]], name="some.en")


def test_what_reading_ends_with_comes_after_what_was_read(translator, alone) -> None:
    def lines() -> Iterator[str]:
        yield from LINES[:20]
        raise DataError("the line is cut")

    translations = translator.translate_each(lines(), strategy=BeamSearch(beam_size=2))
    assert [next(translations).text for _ in range(20)] == alone[:20]
    with pytest.raises(DataError, match="the line is cut"):
        next(translations)


def test_several_translations_with_their_scores(translator, alone) -> None:
    strategy = BeamSearch(beam_size=3, num_hypotheses=3)
    found = list(translator.translate_each(LINES[:10], strategy=strategy))
    for line, translation in zip(LINES, found, strict=False):
        scores = [candidate.score for candidate in translation.candidates]
        assert len(scores) == (3 if line else 0)
        assert scores == sorted(scores, reverse=True)
    once = Constraints(no_repeat_ngram_size=1)
    for translation in translator.translate_each(LINES[:10], constraints=once):
        letters = re.sub("[^a-l]", "", translation.text)
        assert len(set(letters)) == len(letters)


def test_samples_depend_on_the_seed_and_the_number_of_the_line(translator) -> None:
    lines = [*LINES[1:10], "abc", "abc", "abc"]

    def sample(seed: int | None, read_ahead: int) -> list[str]:
        strategy = Sampling(seed=seed)
        found = translator.translate_each(iter(lines), strategy=strategy, read_ahead=read_ahead)
        return [translation.text for translation in found]

    once = sample(7, 100)
    assert sample(7, 6) == once
    assert translator.translate(lines, strategy=Sampling(seed=7)) == once
    assert len(set(once[-3:])) == 3
    assert sample(8, 6) != once
    torch.manual_seed(0)
    drawn = sample(None, 6)
    assert sample(None, 6) != drawn
    torch.manual_seed(0)
    assert sample(None, 100) == drawn


def test_a_stream_that_is_left_is_read_no_further(translator) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "abc"

    translations = translator.translate_each(endless(), strategy=Greedy(), read_ahead=4)
    next(translations)
    assert "lines" in [thread.name for thread in threading.enumerate()]
    translations.close()
    deadline = time.monotonic() + 10
    while "lines" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_read_ahead_must_be_two(translator) -> None:
    with pytest.raises(ValueError, match="read_ahead must be at least 2, got 1"):
        next(translator.translate_each([], read_ahead=1))
