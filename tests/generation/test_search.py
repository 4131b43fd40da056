"""Laws of greedy and beam search, on a decoder written in plain Python."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from fused_attn.generation import (
    GenerationError,
    Hypothesis,
    _engine,
    beam_search,
    greedy_search,
)

from .toy import EOS, Plain, Prefix, PrefixDecoder, every_target, plain_beam_search, score_of


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, list[Prefix]]:
    """Random sources, padded with junk."""
    generator = random.Random(seed)
    sources = [tuple(generator.randrange(3, 50) for _ in range(length)) for length in lengths]
    width = max(lengths)
    rows = [
        list(source) + [generator.randrange(50) for _ in range(width - len(source))]
        for source in sources
    ]
    return torch.tensor(rows), torch.tensor(lengths), sources


def check(found: list[Hypothesis], expected: list[tuple[float, Prefix, bool]]) -> None:
    assert [(tuple(h.tokens), h.complete) for h in found] == [entry[1:] for entry in expected]
    for hypothesis, (score, _, _) in zip(found, expected, strict=True):
        assert hypothesis.score == pytest.approx(score, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("stopping", ["heuristic", "first", "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_equals_the_documented_algorithm(
    beam_size: int, length_penalty: float, stopping: str
) -> None:
    lengths = [1, 4, 2, 7, 3, 3, 5, 1, 2]
    source, source_lengths, sources = batch(lengths)
    for min_length, end_bonus in ((0, 3.0), (3, 5.0), (0, -2.0)):
        model = PrefixDecoder(end_bonus=end_bonus)
        found = beam_search(
            model,
            source,
            source_lengths,
            beam_size=beam_size,
            max_length=9,
            min_length=min_length,
            length_penalty=length_penalty,
            stopping=stopping,  # type: ignore[arg-type]
            num_hypotheses=beam_size,
        )
        for hypotheses, text in zip(found, sources, strict=True):
            check(
                hypotheses,
                plain_beam_search(
                    model,
                    text,
                    Plain(beam_size, 9, min_length, length_penalty, stopping),
                ),
            )


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("min_length", [0, 2])
def test_a_beam_as_wide_as_the_search_space_equals_brute_force(
    min_length: int, length_penalty: float
) -> None:
    # 3 usable tokens and at most 3 steps: 1 + 3 + 9 complete targets and 27 cut ones.
    model = PrefixDecoder(vocabulary=45, usable=(3, 7, 40))
    source, source_lengths, sources = batch([2, 5, 1], seed=3)
    found = beam_search(
        model,
        source,
        source_lengths,
        beam_size=40,
        max_length=3,
        min_length=min_length,
        length_penalty=length_penalty,
        num_hypotheses=40,
    )
    for hypotheses, text in zip(found, sources, strict=True):
        expected = every_target(model, text, 3, min_length, length_penalty)
        assert len(expected) == 40 if min_length == 0 else 36
        check(hypotheses, expected)


@pytest.mark.parametrize("end_bonus", [-1.0, 2.0, 4.0])
@pytest.mark.parametrize("min_length", [0, 4])
def test_one_beam_equals_greedy(end_bonus: float, min_length: int) -> None:
    model = PrefixDecoder(end_bonus=end_bonus)
    source, source_lengths, sources = batch(list(range(1, 25)))
    one_beam = beam_search(model, source, source_lengths, beam_size=1, min_length=min_length)
    greedy = greedy_search(model, source, source_lengths, min_length=min_length)
    assert [hypotheses[0] for hypotheses in one_beam] == greedy
    for hypothesis, text in zip(greedy, sources, strict=True):
        prefix: Prefix = ()
        limit = 2 * len(text) + 10
        while len(prefix) < limit:
            values = model.log_probabilities(text, prefix)
            if len(prefix) < min_length:
                values[EOS] = -math.inf
            best = max(range(len(values)), key=values.__getitem__)
            if best == EOS:
                break
            prefix = (*prefix, best)
        assert (tuple(hypothesis.tokens), hypothesis.complete) == (prefix, len(prefix) < limit)


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_result_does_not_depend_on_the_batch(search: str) -> None:
    model = PrefixDecoder(end_bonus=2.5)
    source, lengths, _ = batch([3, 1, 6, 2, 2, 9, 4, 1, 5, 7, 8, 3])

    def decode(rows: list[int], padding: int = 0) -> list[list[Hypothesis]]:
        texts = torch.cat([source[rows], torch.full((len(rows), padding), 49)], dim=1)
        if search == "greedy":
            return [[best] for best in greedy_search(model, texts, lengths[rows])]
        return beam_search(model, texts, lengths[rows], beam_size=3, num_hypotheses=3)

    together = decode(list(range(12)))
    assert together == [decode([row])[0] for row in range(12)]
    order = [5, 0, 11, 3, 8, 2]
    assert decode(order, padding=4) == [together[row] for row in order]


def test_finished_sentences_leave_the_batch() -> None:
    model = PrefixDecoder(end_bonus=3.0)
    source, lengths, _ = batch([2] * 16)
    for search in (greedy_search, beam_search):
        model.rows_stepped.clear()
        search(model, source, lengths, max_length=40)
        assert model.rows_stepped[0] == 16
        assert model.rows_stepped == sorted(model.rows_stepped, reverse=True)
        assert 0 < model.rows_stepped[-1] <= 4
        assert len(model.rows_stepped) < 40


@pytest.mark.parametrize("patience", [3, 8, 1000])
def test_looking_rarely_changes_nothing(patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PrefixDecoder(end_bonus=2.5)
    source, lengths, _ = batch([3, 1, 6, 2, 2, 9, 4, 1, 5])
    beams = beam_search(model, source, lengths, beam_size=3, num_hypotheses=3)
    best = greedy_search(model, source, lengths)
    monkeypatch.setattr(_engine, "steps_between_looks", lambda device: patience)
    assert beam_search(model, source, lengths, beam_size=3, num_hypotheses=3) == beams
    assert greedy_search(model, source, lengths) == best


def test_scores_are_those_of_the_sequence() -> None:
    model = PrefixDecoder(end_bonus=2.0)
    source, lengths, sources = batch([3, 5, 1, 2])
    found = beam_search(
        model, source, lengths, beam_size=4, max_length=6, length_penalty=0.7, num_hypotheses=4
    )
    assert {h.complete for hypotheses in found for h in hypotheses} == {True, False}
    for hypotheses, text in zip(found, sources, strict=True):
        for hypothesis in hypotheses:
            prefix = tuple(hypothesis.tokens)
            total = score_of(model, text, prefix)
            if hypothesis.complete:
                total += model.log_probabilities(text, prefix)[EOS]
            assert hypothesis.log_probability == pytest.approx(total, rel=1e-5)
            steps = len(prefix) + hypothesis.complete
            assert hypothesis.score == pytest.approx(total / steps**0.7, rel=1e-5)


def test_default_longest_length_follows_the_source() -> None:
    # No end in reach: every sentence is cut at its own limit, whatever the batch.
    source, lengths, _ = batch([1, 4, 2])
    for search, limits in (
        (PrefixDecoder(end_bonus=-math.inf), [12, 18, 14]),
        (PrefixDecoder(end_bonus=-math.inf, max_length=13), [12, 13, 13]),
    ):
        greedy = greedy_search(search, source, lengths)
        beams = beam_search(search, source, lengths, beam_size=2)
        assert [len(best.tokens) for best in greedy] == limits
        assert [len(hypotheses[0].tokens) for hypotheses in beams] == limits
        assert not any(best.complete for best in greedy)
    # An explicit shortest length lifts the default.
    decoder = PrefixDecoder(end_bonus=50.0)
    assert len(greedy_search(decoder, source, lengths, min_length=30)[0].tokens) == 30


def test_lengths_default_to_the_whole_source() -> None:
    model = PrefixDecoder(end_bonus=2.0)
    source, _, _ = batch([4, 4, 4])
    whole = torch.full((3,), 4, dtype=torch.int32)
    assert beam_search(model, source) == beam_search(model, source, whole)
    assert greedy_search(model, source) == greedy_search(model, source, whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    model = PrefixDecoder(end_bonus=2.0, dtype=dtype)
    source, lengths, sources = batch([3, 5, 1, 2])
    found = beam_search(model, source, lengths, beam_size=2, max_length=8, num_hypotheses=2)
    for hypotheses, text in zip(found, sources, strict=True):
        for hypothesis in hypotheses:
            prefix = tuple(hypothesis.tokens)
            total = score_of(model, text, prefix)
            if hypothesis.complete:
                total += model.log_probabilities(text, prefix)[EOS]
            assert hypothesis.log_probability == pytest.approx(total, rel=1e-5)


def test_fewer_hypotheses_where_no_more_are_possible() -> None:
    model = PrefixDecoder(usable=(5,), vocabulary=12)
    source, lengths, sources = batch([2, 1])
    found = beam_search(model, source, lengths, beam_size=8, max_length=3, num_hypotheses=8)
    for hypotheses, text in zip(found, sources, strict=True):
        check(hypotheses, every_target(model, text, 3, 0, 1.0))
        assert len(hypotheses) == 4


def test_no_path_but_the_end() -> None:
    model = PrefixDecoder(usable=())
    source, lengths, _ = batch([2, 1])
    found = [[best] for best in greedy_search(model, source, lengths)]
    for hypotheses in found + beam_search(model, source, lengths, beam_size=3, num_hypotheses=3):
        check(hypotheses, [(0.0, (), True)])


def test_an_empty_batch_gives_nothing() -> None:
    model = PrefixDecoder()
    assert greedy_search(model, torch.zeros(0, 4, dtype=torch.int64)) == []
    assert beam_search(model, torch.zeros(0, 4, dtype=torch.int64)) == []


class _Changed(PrefixDecoder):
    """A decoder whose logits are changed before they are returned."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self.change = change

    def step(self, tokens: Tensor, state):  # type: ignore[no-untyped-def]
        logits, state = super().step(tokens, state)
        return self.change(logits), state  # type: ignore[operator]


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@pytest.mark.parametrize(
    ("source", "options", "error", "match"),
    [
        ([[5, 6]], {"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ([[5, 6]], {"max_length": 2.5}, TypeError, "max_length must be an int, got 2.5"),
        ([[5, 6]], {"min_length": -1}, ValueError, "min_length must be at least 0, got -1"),
        ([[5, 6]], {"min_length": 21}, ValueError, r"min_length must be at most 20 \(the model"),
        (
            [[5, 6]],
            {"min_length": 5, "max_length": 4},
            ValueError,
            "max_length must be at least min_length = 5, got 4",
        ),
        ([[5, 6]], {"max_length": 21}, ValueError, r"max_length must be at most 20 \(the model"),
        ([5, 6], {}, ValueError, r"source must have shape \[B, S\], got \[2\]"),
        ([[]], {}, ValueError, "every source must have 1..0 tokens .* got 0 for sentence 0"),
        (
            [[5, 6], [7, 8]],
            {"source_lengths": torch.tensor([2, 0])},
            ValueError,
            "every source must have 1..2 tokens .* got 0 for sentence 1",
        ),
        (
            [[5, 6], [7, 8]],
            {"source_lengths": torch.tensor([3, 1])},
            ValueError,
            "every source must have 1..2 tokens .* got 3 for sentence 0",
        ),
        (
            [[5] * 21],
            {},
            ValueError,
            r"every source must have at most 20 tokens \(the model's max_length\), got 21 for "
            "sentence 0",
        ),
        (
            [[5, 6]],
            {"source_lengths": torch.tensor([1, 1])},
            ValueError,
            r"source_lengths must have shape \[B\] with B = 1 \(from source\), got \[2\]",
        ),
        (
            [[5, 6]],
            {"source_lengths": torch.tensor([2.0])},
            TypeError,
            "source_lengths must have dtype int32 or int64, got float32",
        ),
        (
            [[5, 6]],
            {"source_lengths": [2]},
            TypeError,
            "source_lengths must be a tensor, got list",
        ),
    ],
)
def test_refuses_a_wrong_request(search, source, options, error, match) -> None:  # type: ignore[no-untyped-def]
    model = PrefixDecoder(max_length=20)
    with pytest.raises(error, match=f"{search.__name__}: {match}"):
        search(model, torch.tensor(source, dtype=torch.int64), **options)


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_refuses_what_is_no_source(search) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match=f"{search.__name__}: source must be a tensor, got list"):
        search(PrefixDecoder(), [[5, 6]])


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: x[:, :, None], ValueError, r"logits must have shape \[B, K, V\] with B = 2"),
        (lambda x: x[:1], ValueError, r"logits must have shape \[B, K, V\] with B = 2"),
        (lambda x: x.tolist(), TypeError, "step must return a tensor of logits first, got list"),
        (lambda x: x[..., :2], ValueError, "eos_token must be in 0..V-1 with V = 2"),
        (
            lambda x: x * math.nan,
            GenerationError,
            "logits must not hold NaN or .inf, got some at step 1 for sentence 0 .and 1 more",
        ),
        (
            lambda x: x - math.inf,
            GenerationError,
            "logits must be finite for some token that may follow at every step, got none for "
            "sentence 0",
        ),
    ],
)
def test_refuses_a_model_that_returns_nonsense(search, change, error, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=f"{search.__name__}: the model's {match}"):
        search(_Changed(change), torch.tensor([[5, 6], [7, 8]]))


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_refuses_what_is_no_decoder(search) -> None:  # type: ignore[no-untyped-def]
    class NoEnd:
        bos_token = 1

    with pytest.raises(TypeError, match="model must have eos_token, got NoEnd"):
        search(NoEnd(), torch.tensor([[5, 6]]))
    model = PrefixDecoder()
    model.eos_token = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="the model's eos_token must be an int, got None"):
        search(model, torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"beam_size": 0}, ValueError, "beam_size must be at least 1, got 0"),
        ({"beam_size": 2.0}, TypeError, "beam_size must be an int, got 2.0"),
        (
            {"beam_size": 13},
            ValueError,
            r"beam_size must be at most V = 12 \(from the model's logits\), got 13",
        ),
        (
            {"num_hypotheses": 5},
            ValueError,
            "num_hypotheses must be at most beam_size = 4, got 5",
        ),
        ({"length_penalty": "1"}, TypeError, "length_penalty must be a number, got '1'"),
        ({"length_penalty": math.nan}, ValueError, "length_penalty must be finite, got nan"),
        ({"stopping": "early"}, ValueError, "stopping must be one of heuristic, first, never"),
    ],
)
def test_refuses_wrong_options(options, error, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=f"beam_search: {match}"):
        beam_search(PrefixDecoder(), torch.tensor([[5, 6]]), **options)


def test_ties_go_to_the_lower_token() -> None:
    class Flat(PrefixDecoder):
        def logits(self, source: Prefix, prefix: Prefix) -> list[float]:
            return [-math.inf if token < 3 else 0.0 for token in range(self.vocabulary)]

    model = Flat(vocabulary=5)
    source = torch.tensor([[5]])
    assert greedy_search(model, source, max_length=3)[0].tokens == [3, 3, 3]
    found = beam_search(model, source, beam_size=4, max_length=2, num_hypotheses=4)[0]
    assert [h.tokens for h in found] == [list(p) for p in itertools.product((3, 4), repeat=2)]
