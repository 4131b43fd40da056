"""Laws of the engine that all strategies share: constraints, groups, batches, streams, samples."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.generation import (
    BeamSearch,
    Constraints,
    FunctionDecoder,
    GenerationError,
    Greedy,
    Hypothesis,
    Result,
    Sampling,
    beam_search,
    generate,
    generate_each,
    greedy_search,
    sample,
    score,
    stream,
)
from fused_attn.generation._choosing import draw

from .test_search import batch, check
from .toy import BOS, EOS, Plain, Prefix, PrefixDecoder, ReplacingDecoder, plain_beam_search

LENGTHS = [1, 4, 2, 7, 3, 3, 5, 1, 2]


# --- constraints ------------------------------------------------------------------------------


def _repetition(penalty: float) -> Callable[[Prefix, list[float]], list[float]]:
    def change(prefix: Prefix, values: list[float]) -> list[float]:
        seen = {BOS, *prefix}
        return [v * penalty if token in seen else v for token, v in enumerate(values)]

    return change


def _no_repeat(n: int) -> Callable[[Prefix, list[float]], list[float]]:
    def change(prefix: Prefix, values: list[float]) -> list[float]:
        text = (BOS, *prefix)
        seen = {text[i : i + n] for i in range(len(text) - n + 1)}
        tail = text[len(text) - n + 1 :]
        return [
            -math.inf if (*tail, token) in seen and len(text) >= n - 1 else v
            for token, v in enumerate(values)
        ]

    return change


def _banned(prefix: Prefix, values: list[float]) -> list[float]:
    return [-math.inf if token in (4, 9) else v for token, v in enumerate(values)]


def _biased(prefix: Prefix, values: list[float]) -> list[float]:
    return [v + {5: 2.5, EOS: -1.5}.get(token, 0.0) for token, v in enumerate(values)]


def _prefixed(prefix: Prefix, values: list[float]) -> list[float]:
    wanted = (6, 3, 6)
    if len(prefix) >= len(wanted):
        return values
    return [v if token == wanted[len(prefix)] else -math.inf for token, v in enumerate(values)]


def _listed(prefix: Prefix, values: list[float]) -> list[float]:
    allowed = (EOS, 3, 5, 7, 8)
    total = math.log(sum(math.exp(values[token]) for token in allowed))
    return [v - total if token in allowed else -math.inf for token, v in enumerate(values)]


CONSTRAINTS: dict[str, tuple[Constraints, Callable[[Prefix, list[float]], list[float]]]] = {
    "repetition_penalty": (Constraints(repetition_penalty=1.8), _repetition(1.8)),
    "repetition_reward": (Constraints(repetition_penalty=0.6), _repetition(0.6)),
    "no_repeat_unigram": (Constraints(no_repeat_ngram_size=1), _no_repeat(1)),
    "no_repeat_bigram": (Constraints(no_repeat_ngram_size=2), _no_repeat(2)),
    "no_repeat_trigram": (Constraints(no_repeat_ngram_size=3), _no_repeat(3)),
    "banned_tokens": (Constraints(banned_tokens=[4, 9]), _banned),
    "token_bias": (Constraints(token_bias={5: 2.5, EOS: -1.5}), _biased),
    "prefix": (Constraints(prefix=[6, 3, 6]), _prefixed),
    "shortlist": (Constraints(shortlist=[8, 7, 5, 3, EOS]), _listed),
    "all": (
        Constraints(
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            banned_tokens=[4, 9],
            token_bias={5: 2.5, EOS: -1.5},
        ),
        lambda prefix, values: _banned(
            prefix, _no_repeat(2)(prefix, _biased(prefix, _repetition(1.3)(prefix, values)))
        ),
    ),
}


class Forgetful(ReplacingDecoder):
    """Knows hardly more than the source and the last word, so that it goes round in circles."""

    def logits(self, source: Prefix, prefix: Prefix) -> list[float]:
        whole = super().logits(source, prefix)  # no ties between other orders of the same words
        last = super().logits(source, prefix[-1:])
        return [0.1 * a + 0.9 * b for a, b in zip(whole, last, strict=True)]


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_are_those_of_the_documentation(name: str, beam_size: int) -> None:
    constraints, change = CONSTRAINTS[name]
    source, lengths, sources = batch(LENGTHS)
    model = Forgetful(vocabulary=12, end_bonus=0.5, usable=(3, 4, 5, 6, 7, 8, 9))
    strategy = BeamSearch(beam_size=beam_size, num_hypotheses=beam_size)
    found = generate(
        model,
        source,
        lengths,
        strategy=strategy,
        constraints=constraints,
        max_length=8,
        min_length=2,
        batch_size=4,
    )
    plain = [
        plain_beam_search(model, text, Plain(beam_size, 8, 2, change=change)) for text in sources
    ]
    for result, expected in zip(found, plain, strict=True):
        check(result.hypotheses, expected)
    unconstrained = beam_search(
        model,
        source,
        lengths,
        beam_size=beam_size,
        num_hypotheses=beam_size,
        max_length=8,
        min_length=2,
    )
    changed = [
        [h.tokens for h in result.hypotheses] != [h.tokens for h in hypotheses]
        for result, hypotheses in zip(found, unconstrained, strict=True)
    ]
    assert any(changed), "the constraint changed nothing"
    if beam_size == 1:
        greedy = greedy_search(
            model, source, lengths, constraints=constraints, max_length=8, min_length=2
        )
        assert greedy == [result.best for result in found]


def test_an_empty_shortlist_leaves_nothing() -> None:
    source, lengths, _ = batch([3, 5])
    model = ReplacingDecoder()
    for strategy in (BeamSearch(), Greedy(), Sampling(seed=1)):
        constraints = Constraints(shortlist=[])
        found = generate(model, source, lengths, strategy=strategy, constraints=constraints)
        assert ["got none for sentence" in str(result.error) for result in found] == [True, True]


def test_no_constraint_forbids_a_prefix() -> None:
    source, lengths, _ = batch([3, 5])
    model = ReplacingDecoder(end_bonus=1.0)
    constraints = Constraints(
        prefix=[4, 4, 4], banned_tokens=[4], no_repeat_ngram_size=2, repetition_penalty=1.5
    )
    for strategy in (BeamSearch(), Greedy(), Sampling(seed=1)):
        free = generate(
            model, source, lengths, strategy=strategy, constraints=Constraints(prefix=[4, 4, 4])
        )
        found = generate(model, source, lengths, strategy=strategy, constraints=constraints)
        for result, other in zip(found, free, strict=True):
            assert result.best.tokens[:3] == [4, 4, 4]
            assert 4 not in result.best.tokens[3:]
            ours, theirs = (r.best.token_log_probabilities[:3] for r in (result, other))
            assert ours == theirs


def test_a_prefix_and_a_shortlist_for_each_source() -> None:
    source, lengths, _ = batch([3, 5, 2])
    model = ReplacingDecoder(end_bonus=1.0)
    prefixes = [[], [4, 4], [7]]
    shortlists = [[EOS, 3, 4], [EOS, 4, 5, 6, 7], [EOS, 7]]
    found = generate(
        model,
        source,
        lengths,
        constraints=Constraints(prefix=prefixes, shortlist=shortlists),
        max_length=6,
        batch_size=2,
    )
    for i, result in enumerate(found):
        alone = generate(
            model,
            source[i : i + 1],
            lengths[i : i + 1],
            constraints=Constraints(prefix=prefixes[i], shortlist=shortlists[i]),
            max_length=6,
        )
        assert result == alone[0]
        assert result.best.tokens[: len(prefixes[i])] == prefixes[i]
        assert set(result.best.tokens) <= set(shortlists[i])


# --- scores and penalties ---------------------------------------------------------------------


@pytest.mark.parametrize("stopping", ["heuristic", "first", "never"])
@pytest.mark.parametrize(
    "options",
    [
        {"length_normalization": "gnmt", "length_penalty": 0.6},
        {"length_normalization": "gnmt", "length_penalty": 2.0},
        {"coverage_penalty": 0.2},
        {"coverage_penalty": 1.5, "length_normalization": "gnmt"},
        {"groups": 2, "diversity_penalty": 0.7},
        {"groups": 6, "diversity_penalty": 2.0, "coverage_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties_are_those_of_the_documentation(options: dict[str, Any], stopping: str) -> None:
    source, lengths, sources = batch(LENGTHS)
    model = ReplacingDecoder(end_bonus=2.5)
    strategy = BeamSearch(beam_size=6, num_hypotheses=6, stopping=stopping, **options)  # type: ignore[arg-type]
    found = generate(model, source, lengths, strategy=strategy, max_length=9, batch_size=4)
    for result, text in zip(found, sources, strict=True):
        plain = Plain(6, 9, stopping=stopping, **options)
        expected = plain_beam_search(model, text, plain)
        assert len(result.hypotheses) == len(expected)
        # Equal scores of different groups stand in any order.
        key = lambda entry: (-round(entry[0], 4), entry[1])  # noqa: E731
        actual = sorted(
            ((h.score, tuple(h.tokens), h.complete) for h in result.hypotheses), key=key
        )
        for ours, theirs in zip(actual, sorted(expected, key=key), strict=True):
            assert ours[1:] == theirs[1:]
            assert ours[0] == pytest.approx(theirs[0], rel=1e-5)


def test_groups_without_a_penalty_repeat_each_other() -> None:
    source, lengths, _ = batch(LENGTHS)
    model = PrefixDecoder(end_bonus=2.0)
    narrow = beam_search(model, source, lengths, beam_size=2, num_hypotheses=2)
    strategy = BeamSearch(beam_size=6, num_hypotheses=6, groups=3)
    for result, two in zip(
        generate(model, source, lengths, strategy=strategy), narrow, strict=True
    ):
        repeated = [h.tokens for h in two for _ in range(3)]
        assert [h.tokens for h in result.hypotheses] == repeated


def test_temperature_divides_the_logits() -> None:
    class Cold(PrefixDecoder):
        def logits(self, source: Prefix, prefix: Prefix) -> list[float]:
            return [value / 0.5 for value in super().logits(source, prefix)]

    source, lengths, _ = batch(LENGTHS)
    strategy = BeamSearch(temperature=0.5, num_hypotheses=4)
    found = generate(PrefixDecoder(end_bonus=2.0), source, lengths, strategy=strategy)
    expected = beam_search(Cold(end_bonus=2.0), source, lengths, num_hypotheses=4)
    for result, hypotheses in zip(found, expected, strict=True):
        assert [h.tokens for h in result.hypotheses] == [h.tokens for h in hypotheses]
        assert result.best.score == pytest.approx(hypotheses[0].score, rel=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [BeamSearch(num_hypotheses=4), Greedy(), Sampling(num_samples=3, seed=3)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_token_scores_and_ancestry(strategy: Any) -> None:
    source, lengths, sources = batch(LENGTHS)
    model = ReplacingDecoder(end_bonus=1.5)
    found = generate(model, source, lengths, strategy=strategy, max_length=8, batch_size=4)
    assert {h.complete for result in found for h in result.hypotheses} == {True, False}
    for result, text in zip(found, sources, strict=True):
        for hypothesis in result.hypotheses:
            tokens = [*hypothesis.tokens, *[EOS] * hypothesis.complete]
            expected = [
                model.log_probabilities(text, tuple(tokens[:t]))[token]
                for t, token in enumerate(tokens)
            ]
            assert hypothesis.token_log_probabilities == pytest.approx(expected, abs=1e-5)
            assert len(hypothesis.beams) == len(hypothesis.tokens)
    if isinstance(strategy, BeamSearch):
        assert {k for result in found for h in result.hypotheses for k in h.beams} == {0, 1, 2, 3}
    # Two hypotheses that part after t tokens stand in different beams from there on.
    for result in found:
        for a, b in itertools.combinations(result.hypotheses, 2):
            for t in range(min(len(a.tokens), len(b.tokens))):
                same = a.tokens[: t + 1] == b.tokens[: t + 1]
                if isinstance(strategy, BeamSearch):
                    assert same == (a.beams[t] == b.beams[t])


def test_score_of_given_targets_is_that_of_the_search() -> None:
    source, lengths, _ = batch(LENGTHS)
    model = ReplacingDecoder(end_bonus=2.5)
    found = [result.best for result in generate(model, source, lengths, max_length=30)]
    assert all(hypothesis.complete for hypothesis in found)
    scored = score(model, source, [h.tokens for h in found], lengths, batch_size=4, alignments=True)
    for ours, theirs in zip(scored, found, strict=True):
        assert (ours.tokens, ours.complete) == (theirs.tokens, True)
        assert ours.log_probability == pytest.approx(theirs.log_probability, rel=1e-5)
        assert ours.token_log_probabilities == pytest.approx(
            theirs.token_log_probabilities, abs=1e-5
        )
        assert ours.alignment is not None
        assert ours.alignment.shape[0] == len(ours.tokens) + 1
    with pytest.raises(ValueError, match=r"score: targets must be B = 9 sequences"):
        score(model, source, [[5]], lengths)
    with pytest.raises(ValueError, match=r"fewer than 3 tokens .* got 3 for sentence 1"):
        score(PrefixDecoder(max_length=3), source[:2, :1], [[5], [5, 5, 5]])
    with pytest.raises(GenerationError, match="got none for sentence 1"):
        score(PrefixDecoder(usable=(5,)), source[:2], [[5], [6]])
    assert score(model, source[:0], []) == []


def test_alignments_are_those_of_the_winning_path() -> None:
    source, lengths, sources = batch([3, 1, 5])
    model = ReplacingDecoder(end_bonus=1.0)
    strategy = BeamSearch(num_hypotheses=3)
    found = generate(
        model, source, lengths, strategy=strategy, max_length=5, alignments=True, batch_size=2
    )
    assert {h.complete for result in found for h in result.hypotheses} == {True, False}
    for result, text in zip(found, sources, strict=True):
        for hypothesis in result.hypotheses:
            steps = len(hypothesis.tokens) + hypothesis.complete
            expected = [model.attention(text, tuple(hypothesis.tokens[:t])) for t in range(steps)]
            torch.testing.assert_close(hypothesis.alignment, torch.tensor(expected))


# --- batches ----------------------------------------------------------------------------------

STRATEGIES: dict[str, Any] = {
    "beam": BeamSearch(beam_size=3, num_hypotheses=3),
    "coverage": BeamSearch(beam_size=3, coverage_penalty=0.4),
    "groups": BeamSearch(beam_size=4, groups=2, diversity_penalty=1.0, num_hypotheses=4),
    "greedy": Greedy(),
    "sampling": Sampling(num_samples=2, top_p=0.9, seed=11),
}


@pytest.mark.parametrize("model_class", [PrefixDecoder, ReplacingDecoder])
@pytest.mark.parametrize("name", STRATEGIES)
def test_waiting_sources_change_nothing(name: str, model_class: type[PrefixDecoder]) -> None:
    strategy = STRATEGIES[name]
    source, lengths, _ = batch([3, 1, 6, 2, 2, 9, 4, 1, 5, 7, 8, 3, 40, 1, 1, 2])
    constraints = Constraints(repetition_penalty=1.1, no_repeat_ngram_size=3)
    options = {"strategy": strategy, "constraints": constraints}
    model = model_class(end_bonus=2.5)
    expected = generate(model, source, lengths, batch_size=16, **options)
    for batch_size in (1, 2, 5):
        model.rows_stepped.clear()
        assert generate(model, source, lengths, batch_size=batch_size, **options) == expected
        assert max(model.rows_stepped) == batch_size
    if model_class is ReplacingDecoder:
        # Places are taken again: hardly a row steps for nothing.
        steps = sum(
            max(len(h.tokens) + h.complete for h in result.hypotheses) for result in expected
        )
        assert sum(model.rows_stepped) < 2.5 * steps
    if not isinstance(strategy, Sampling):  # a sample depends on the source's number
        order = torch.tensor([12, 0, 5, 3, 9, 15, 1])
        shuffled = generate(model, source[order], lengths[order], batch_size=3, **options)
        assert shuffled == [expected[i] for i in order.tolist()]


@pytest.mark.parametrize("patience", [3, 8, 1000])
def test_looking_rarely_changes_nothing(patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attn.generation import _engine

    source, lengths, _ = batch([3, 1, 6, 2, 2, 9, 4, 1, 5])
    for name, strategy in STRATEGIES.items():
        model = ReplacingDecoder(end_bonus=2.5, max_length=24)
        expected = generate(model, source, lengths, strategy=strategy, batch_size=3)
        monkeypatch.setattr(_engine, "steps_between_looks", lambda device: patience)
        assert generate(model, source, lengths, strategy=strategy, batch_size=3) == expected, name
        monkeypatch.undo()


def test_a_stream_of_sources() -> None:
    source, lengths, sources = batch(LENGTHS)
    model = ReplacingDecoder(end_bonus=2.5, max_length=20)
    expected = generate(model, source, lengths)
    taken = 0

    def supply() -> Iterator[Any]:
        nonlocal taken
        for number, text in enumerate(sources):
            taken += 1
            yield torch.tensor(text) if number % 2 else text

    found: dict[int, Result] = {}
    for number, result in generate_each(model, supply(), batch_size=2):
        assert taken <= len(found) + 4  # no more than there is room for
        found[number] = result
    assert [found[i] for i in range(9)] == expected

    # Numbers of their own: samples are drawn by them, and not by the order.
    options: dict[str, Any] = {"strategy": Sampling(seed=5), "batch_size": 2}
    drawn = dict(generate_each(model, sources, **options))
    pairs = list(enumerate(sources))[::-1]
    assert dict(generate_each(model, pairs, numbered=True, **options)) == drawn

    awkward = [(5, 6), (), tuple(range(3, 30)), (7,)]
    results = dict(generate_each(model, awkward, batch_size=3))
    assert results[0].error is None
    assert results[3].error is None
    assert "must have a token, got none for sentence 1" in str(results[1].error)
    assert "at most 20 tokens (the model's max_length), got 27 for sentence 2" in str(
        results[2].error
    )
    assert list(generate_each(model, [])) == []
    assert [r.error is None for _, r in generate_each(model, [()])] == [False]
    limited = generate_each(model, [(5,)], constraints=Constraints(prefix=[4] * 21))
    assert "at least the prefix's 21 tokens, got 20" in str(next(limited)[1].error)
    with pytest.raises(ValueError, match="prefix must be one sequence for all sources"):
        list(generate_each(model, [(5,)], constraints=Constraints(prefix=[[4], [5]])))


def test_a_source_that_fails_leaves_the_others_alone() -> None:
    class Poisoned(ReplacingDecoder):
        def logits(self, source: Prefix, prefix: Prefix) -> list[float]:
            values = super().logits(source, prefix)
            if source == sources[2] and len(prefix) == 3:
                values[7] = math.nan
            if source == sources[4]:
                values = [-math.inf] * len(values)
            if source == sources[5] and len(prefix) == 1:
                values[9] = math.inf
            return values

    source, lengths, sources = batch(LENGTHS)
    whole = generate(PrefixDecoder(end_bonus=1.0), source, lengths)
    for strategy in (BeamSearch(), Greedy(), Sampling(num_samples=2, seed=5)):
        expected = generate(PrefixDecoder(end_bonus=1.0), source, lengths, strategy=strategy)
        model = Poisoned(end_bonus=1.0)
        found = generate(model, source, lengths, strategy=strategy, batch_size=4)
        for i, (result, other) in enumerate(zip(found, expected, strict=True)):
            if i in (2, 4, 5):
                assert result.hypotheses == []
                with pytest.raises(GenerationError, match=f"for sentence {i}"):
                    _ = result.best
            else:
                assert result == other
        assert "must not hold NaN or +inf, got some at step 4 for sentence 2" in str(found[2].error)
        assert "got none for sentence 4" in str(found[4].error)
        assert "got some at step 2 for sentence 5" in str(found[5].error)
    with pytest.raises(GenerationError, match=r"step 4 for sentence 2 \(and 2 more\)") as caught:
        beam_search(model, source, lengths)
    assert [result.error is None for result in caught.value.results].count(False) == 3
    assert caught.value.results[0] == whole[0]


def test_memory_does_not_grow_with_the_number_of_sources() -> None:
    # What is kept between two results, over 10,000 of them: the batch, and nothing of its past.
    generator = torch.Generator().manual_seed(0)
    follows = torch.randn(12, 12, generator=generator)
    follows[:, EOS] += 2.0

    def function(source: Tensor, lengths: Tensor, target: Tensor, ends: Tensor) -> Tensor:
        last = target.gather(1, ends[:, None] - 1)[:, 0]
        return follows[last] + follows[source[:, 0] % 12]

    model = FunctionDecoder(function, bos_token=BOS, eos_token=EOS)
    texts = ((3 + i % 40, 5) for i in range(10_000))
    sizes = []
    seen: dict[int, Hypothesis] = {}
    for number, result in generate_each(model, texts, batch_size=200, max_length=8):
        # The same source gives the same result, whenever it comes.
        assert seen.setdefault(number % 40, result.best) == result.best
        if number % 1000 == 999:
            sizes.append(_tensor_bytes())
    assert len(sizes) == 10
    assert max(sizes[1:]) <= 1.1 * sizes[0]


def _tensor_bytes() -> int:
    import gc

    tensors = [item for item in gc.get_objects() if type(item) is Tensor]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- sampling ---------------------------------------------------------------------------------


def test_samples_repeat_with_their_seed() -> None:
    source, lengths, _ = batch(LENGTHS)
    model = ReplacingDecoder(end_bonus=1.0)
    first = sample(model, source, lengths, num_samples=4, seed=1)
    assert sample(model, source, lengths, num_samples=4, seed=1) == first
    assert sample(model, source, lengths, num_samples=4, seed=2) != first
    assert len({str(h.tokens) for hypotheses in first for h in hypotheses}) > 20
    torch.manual_seed(5)
    drawn = sample(model, source, lengths)
    assert sample(model, source, lengths) != drawn
    torch.manual_seed(5)
    assert sample(model, source, lengths) == drawn


def test_samples_follow_the_probabilities() -> None:
    # 4,000 samples of one step: each count within four standard deviations of its expectation.
    model = PrefixDecoder(vocabulary=8)
    source = torch.tensor([[5]])
    N = 4000
    probabilities = [math.exp(v) for v in model.log_probabilities((5,), ())]
    for options, expected in (
        ({}, probabilities),
        ({"top_k": 3}, _kept(probabilities, 3)),
        ({"top_p": 0.8}, _nucleus(probabilities, 0.8)),
        ({"top_k": 5, "top_p": 0.6}, _nucleus(_kept(probabilities, 5), 0.6)),
    ):
        [hypotheses] = sample(model, source, num_samples=N, max_length=1, seed=9, **options)  # type: ignore[arg-type]
        counts = Counter(h.tokens[0] if h.tokens else EOS for h in hypotheses)
        for token, p in enumerate(expected):
            assert abs(counts[token] - N * p) <= 4 * math.sqrt(N * p * (1 - p))
            assert (counts[token] == 0) == (p == 0.0)
        for h in hypotheses[:20]:
            token = h.tokens[0] if h.tokens else EOS
            # The model's own, whatever is left out.
            assert h.log_probability == pytest.approx(math.log(probabilities[token]), abs=1e-5)


def _kept(probabilities: list[float], k: int) -> list[float]:
    worst = sorted(probabilities, reverse=True)[k - 1]
    total = sum(p for p in probabilities if p >= worst)
    return [p / total if p >= worst else 0.0 for p in probabilities]


def _nucleus(probabilities: list[float], top_p: float) -> list[float]:
    kept, reached = [0.0] * len(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        if reached >= top_p:
            break
        kept[token] = probabilities[token]
        reached += probabilities[token]
    return [p / reached for p in kept]


def test_draw_equals_the_inverse_of_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 300, generator=generator) * 0.1  # flat: top_p takes many tokens
    logits[:, 17] = -math.inf
    number = torch.rand(40, generator=generator, dtype=torch.float64)
    for top_k, top_p in ((None, None), (7, None), (None, 0.97), (200, 0.9), (None, 1.0)):
        drawn = draw(logits, number, top_k, top_p)
        for row, u, token in zip(logits.double(), number.tolist(), drawn.tolist(), strict=True):
            probabilities = row.softmax(0).tolist()
            order = list(range(300))
            if top_k is not None or top_p is not None:
                order.sort(key=lambda t: -probabilities[t])
            kept = _kept(probabilities, top_k or 300)
            kept = _nucleus(kept, top_p or 1.0)
            reached = 0.0
            for expected in order:
                reached += kept[expected]
                if reached > u + 1e-9:
                    break
            if abs(reached - u) > 1e-7:
                assert token == expected
            assert token != 17


def test_cold_samples_are_greedy() -> None:
    source, lengths, _ = batch(LENGTHS)
    model = PrefixDecoder(end_bonus=2.0)
    greedy = greedy_search(model, source, lengths, min_length=2)
    for options in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-9}):
        found = sample(model, source, lengths, min_length=2, seed=1, num_samples=2, **options)  # type: ignore[arg-type]
        for hypotheses, best in zip(found, greedy, strict=True):
            assert [h.tokens for h in hypotheses] == [best.tokens] * 2
            assert hypotheses[0].score == pytest.approx(best.score, rel=1e-5)


# --- streaming --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [BeamSearch(), BeamSearch(stopping="first", length_penalty=0.0), Greedy(), Sampling(seed=4)],
    ids=["beam", "first", "greedy", "sampling"],
)
def test_a_stream_of_tokens_is_the_best_hypothesis(strategy: Any) -> None:
    source, lengths, _ = batch(LENGTHS)
    model = PrefixDecoder(end_bonus=1.0)
    expected = generate(model, source, lengths, strategy=strategy)
    shown: list[list[int]] = [[] for _ in expected]
    ended: list[int] = []
    early = 0
    for sentence, tokens in stream(model, source, lengths, strategy=strategy):
        assert sentence not in ended
        shown[sentence] += tokens
        early += bool(tokens) and len(shown[sentence]) < len(expected[sentence].best.tokens)
        if not tokens:
            ended.append(sentence)
    assert shown == [result.best.tokens for result in expected]
    assert sorted(ended) == list(range(len(expected)))
    assert early > 0, "nothing came before the end"


def test_what_cannot_be_streamed() -> None:
    source, _, _ = batch([2])
    with pytest.raises(ValueError, match="groups must be 1 to stream, got 2"):
        list(stream(PrefixDecoder(), source, strategy=BeamSearch(groups=2)))
    with pytest.raises(ValueError, match="num_samples must be 1 to stream, got 2"):
        list(stream(PrefixDecoder(), source, strategy=Sampling(num_samples=2)))
    with pytest.raises(GenerationError, match="got none for sentence 0"):
        list(stream(PrefixDecoder(usable=(), end_bonus=-math.inf), source))
    assert list(stream(PrefixDecoder(), source[:0])) == []


# --- a plain function -------------------------------------------------------------------------


def test_a_function_is_a_decoder() -> None:
    source, lengths, _ = batch(LENGTHS)
    plain = PrefixDecoder(end_bonus=2.0)

    def function(source: Tensor, lengths: Tensor, target: Tensor, ends: Tensor) -> Tensor:
        assert (target[:, 0] == BOS).all()
        return torch.tensor(
            [
                plain.logits(tuple(text[:size]), tuple(prefix[1:end]))
                for text, size, prefix, end in zip(
                    source.tolist(), lengths.tolist(), target.tolist(), ends.tolist(), strict=True
                )
            ]
        )

    model = FunctionDecoder(function, bos_token=BOS, eos_token=EOS)
    for strategy in (BeamSearch(num_hypotheses=4), Greedy()):
        expected = generate(plain, source, lengths, strategy=strategy)
        for batch_size in (9, 3):
            found = generate(model, source, lengths, strategy=strategy, batch_size=batch_size)
            assert found == expected


# --- a step that is replayed ------------------------------------------------------------------


class _Recorded:
    """Stands in for a CUDA graph: replaying it calls the step again."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def replay(self) -> None:
        self.engine.step()


def test_when_a_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attn.generation import _engine, _graph

    captured: list[int] = []

    class Runner(_graph.StepRunner):
        def __init__(self, engine: Any) -> None:
            super().__init__(engine)
            self._captures = True

        def _capture(self) -> Any:
            captured.append(engine_rows(self._engine))
            return _Recorded(self._engine)

    def engine_rows(engine: Any) -> int:
        return len(engine.slots.tokens)

    class Static(ReplacingDecoder):
        decodes_on_static_shapes = True
        reserved: list[int] = []  # noqa: RUF012

        def reserve(self, state: Any, capacity: int) -> Any:
            self.reserved.append(capacity)
            return state

    source, lengths, _ = batch([3, 1, 6, 2, 2, 9, 4, 30, 5])
    expected = generate(ReplacingDecoder(end_bonus=0.5), source, lengths, max_length=80)
    monkeypatch.setattr(_engine, "StepRunner", Runner)
    assert generate(Static(end_bonus=0.5), source, lengths, max_length=80, batch_size=4) == expected
    assert 32 in Static.reserved
    assert 64 in Static.reserved
    assert len(captured) >= 2


# --- wrong calls ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: BeamSearch(groups=3), ValueError, "groups must divide beam_size = 4, got 3"),
        (lambda: BeamSearch(groups=0), ValueError, "groups must be at least 1, got 0"),
        (lambda: BeamSearch(temperature=0.0), ValueError, "temperature must be above 0, got 0.0"),
        (
            lambda: BeamSearch(coverage_penalty=-1.0),
            ValueError,
            "coverage_penalty must be at least",
        ),
        (
            lambda: BeamSearch(length_normalization="wu"),  # type: ignore[arg-type]
            ValueError,
            "length_normalization must be one of power, gnmt, got 'wu'",
        ),
        (lambda: Sampling(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: Sampling(top_p=0.0), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (lambda: Sampling(top_p=1.5), ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        (lambda: Sampling(seed=1.5), TypeError, "seed must be an int, got 1.5"),  # type: ignore[arg-type]
        (lambda: Sampling(seed=-1), ValueError, "seed must be in 0..2"),
        (lambda: Sampling(num_samples=0), ValueError, "num_samples must be at least 1"),
        (
            lambda: Constraints(repetition_penalty=-1.0),
            ValueError,
            "repetition_penalty must be above 0, got -1.0",
        ),
        (
            lambda: Constraints(no_repeat_ngram_size=1.5),  # type: ignore[arg-type]
            TypeError,
            "no_repeat_ngram_size must be an int, got 1.5",
        ),
        (
            lambda: Constraints(no_repeat_ngram_size=-1),
            ValueError,
            "no_repeat_ngram_size must be at least 0, got -1",
        ),
        (lambda: Constraints(banned_tokens=3), TypeError, "banned_tokens must be a sequence"),  # type: ignore[arg-type]
        (lambda: Constraints(banned_tokens=[-1]), ValueError, "tokens of at least 0, got -1"),
        (lambda: Constraints(prefix=["a"]), TypeError, "prefix must"),  # type: ignore[list-item]
        (
            lambda: Constraints(token_bias={3: math.inf}),
            ValueError,
            "token_bias's values must be finite, got inf",
        ),
    ],
)
def test_refuses_wrong_options(make: Callable[[], Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_refuses_wrong_calls() -> None:
    model = PrefixDecoder()
    source = torch.tensor([[5, 6], [7, 8]])
    for options, error, match in (
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.0}, TypeError, "batch_size must be an int, got 1.0"),
        (
            {"constraints": Constraints(prefix=[3, 4, 5]), "max_length": 2},
            ValueError,
            "max_length must be at least the prefix's 3 tokens, got 2",
        ),
        (
            {"constraints": Constraints(prefix=[[3], [4], [5]])},
            ValueError,
            "prefix must be one sequence or B = 2 .from source., got 3",
        ),
    ):
        with pytest.raises(error, match=match):
            generate(model, source, **options)  # type: ignore[arg-type]

    class Bare:
        bos_token, eos_token, max_length = BOS, EOS, None
        start, step, reorder = model.start, model.step, model.reorder

    with pytest.raises(TypeError, match="needs a model with align, got Bare"):
        generate(Bare(), source, alignments=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a model with cross_attention, got Bare"):
        generate(Bare(), source, strategy=BeamSearch(coverage_penalty=0.1))  # type: ignore[arg-type]

    class WrongWeights(PrefixDecoder):
        def cross_attention(self, state: Any) -> Tensor:
            return super().cross_attention(state)[:1]

    with pytest.raises(ValueError, match=r"cross_attention must return \[B, K, S\] with B = 2"):
        generate(WrongWeights(), source, strategy=BeamSearch(coverage_penalty=0.1))
