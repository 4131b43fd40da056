"""Beam search against the ``generate`` of Hugging Face, on the same models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from fused_attn import generation
from fused_attn.generation import Hypothesis, beam_search, greedy_search

from .hugging_face import (
    ARCHITECTURES,
    FIRST_WORD,
    VOCABULARY,
    Architecture,
    Generated,
    HuggingFaceDecoder,
    added_bias,
    attention_mask,
    build,
    hugging_face_beam_search,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EARLY_STOPPING: dict[str, bool | str] = {"first": True, "heuristic": False, "never": "never"}
PENALTIES = [-0.5, 0.0, 0.6, 1.0, 2.0]
BEAM_SIZES: dict[Architecture, tuple[int, ...]] = {
    "marian": (1, 2, 3, 4, 5, 6),
    "bart": (1, 4),
    "t5": (2, 5),
}
MAX_LENGTH = 12

needs_constraints = pytest.mark.skipif(
    not hasattr(generation, "Constraints"), reason="fused_attn.generation has no Constraints"
)


def batch(lengths: Sequence[int] = (7, 3, 5, 1, 6, 2), seed: int = 3) -> tuple[Tensor, Tensor]:
    """Random sources, padded with junk."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    source = torch.randint(FIRST_WORD, VOCABULARY - 1, shape, generator=generator)
    return source, torch.tensor(lengths)


def check(found: list[list[Hypothesis]], expected: list[list[Generated]]) -> None:
    for hypotheses, sequences in zip(found, expected, strict=True):
        assert [(h.tokens, h.complete) for h in hypotheses] == [
            (sequence.tokens, sequence.complete) for sequence in sequences
        ]
        for hypothesis, sequence in zip(hypotheses, sequences, strict=True):
            assert hypothesis.score == pytest.approx(sequence.score, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("stopping", EARLY_STOPPING)
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_generate(architecture: Architecture, length_penalty: float, stopping: str) -> None:
    model = build(architecture)
    source, lengths = batch()
    for beam_size in BEAM_SIZES[architecture]:
        expected = hugging_face_beam_search(
            model,
            source,
            lengths,
            max_length=MAX_LENGTH,
            num_hypotheses=beam_size,
            num_beams=beam_size,
            length_penalty=length_penalty,
            early_stopping=EARLY_STOPPING[stopping],
        )
        found = beam_search(
            HuggingFaceDecoder(model),
            source,
            lengths,
            beam_size=beam_size,
            max_length=MAX_LENGTH,
            length_penalty=length_penalty,
            stopping=stopping,
            num_hypotheses=beam_size,
        )
        check(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_comparison_is_of_something(architecture: Architecture) -> None:
    # Every option of the test above changes what generate returns; targets end at many lengths,
    # are cut, and differ between the sources.
    model = build(architecture)
    source, lengths = batch()

    def generated(length_penalty: float, stopping: str) -> list[list[Generated]]:
        return hugging_face_beam_search(
            model,
            source,
            lengths,
            max_length=MAX_LENGTH,
            num_hypotheses=4,
            num_beams=4,
            length_penalty=length_penalty,
            early_stopping=EARLY_STOPPING[stopping],
        )

    found = {(p, s): generated(p, s) for p in PENALTIES for s in EARLY_STOPPING}
    texts = {
        key: [tuple(tuple(sequence.tokens) for sequence in sequences) for sequences in value]
        for key, value in found.items()
    }
    for stopping in EARLY_STOPPING:
        assert len({tuple(texts[p, stopping]) for p in PENALTIES}) >= 4
    assert len({tuple(texts[1.0, stopping]) for stopping in EARLY_STOPPING}) == 3
    sequences = [sequence for hypotheses in found[1.0, "heuristic"] for sequence in hypotheses]
    assert len({len(sequence.tokens) for sequence in sequences if sequence.complete}) >= 5
    assert {sequence.complete for sequence in sequences} == {True, False}
    assert len(set(texts[1.0, "heuristic"])) == len(source)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_large_batch_equals_generate(architecture: Architecture) -> None:
    # Sources that are done stay for a while, since few do not leave. In the last case of T5 a
    # source would stop too early if "never" looked ahead where it must not.
    source, lengths = batch([1 + i % 7 for i in range(48)])
    for num_hypotheses, length_penalty, stopping, end_bias in (
        (1, 1.0, "first", 2.5),
        (3, 0.6, "heuristic", 2.5),
        (5, -0.5, "never", 4.5),
    ):
        model = build(architecture, end_bias)
        expected = hugging_face_beam_search(
            model,
            source,
            lengths,
            max_length=MAX_LENGTH,
            num_hypotheses=num_hypotheses,
            num_beams=5,
            length_penalty=length_penalty,
            early_stopping=EARLY_STOPPING[stopping],
        )
        found = beam_search(
            HuggingFaceDecoder(model),
            source,
            lengths,
            beam_size=5,
            max_length=MAX_LENGTH,
            length_penalty=length_penalty,
            stopping=stopping,
            num_hypotheses=num_hypotheses,
        )
        check(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lengths_are_generates(architecture: Architecture) -> None:
    # min_new_tokens counts what ours does; min_length, the token that begins a target besides.
    model = build(architecture, end_bias=3.0)
    source, lengths = batch()
    decoder = HuggingFaceDecoder(model)
    for min_length, max_length in ((0, 1), (1, 1), (3, 4), (4, 4), (2, 9), (6, 12)):
        expected, with_start = (
            hugging_face_beam_search(
                model,
                source,
                lengths,
                max_length=max_length,
                num_hypotheses=4,
                num_beams=4,
                length_penalty=0.0,
                **shortest,
            )
            for shortest in ({"min_new_tokens": min_length}, {"min_length": min_length + 1})
        )
        assert expected == with_start
        found = beam_search(
            decoder,
            source,
            lengths,
            beam_size=4,
            num_hypotheses=4,
            length_penalty=0.0,
            min_length=min_length,
            max_length=max_length,
        )
        check(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_source_in_a_batch_equals_generate_of_it_alone(architecture: Architecture) -> None:
    # Without max_length each source has its own; generate has one for all of its batch.
    model = build(architecture, end_bias=1.0)
    source, lengths = batch()
    found = beam_search(HuggingFaceDecoder(model), source, lengths, num_hypotheses=2)
    for i, length in enumerate(lengths.tolist()):
        expected = hugging_face_beam_search(
            model,
            source[i : i + 1, :length],
            lengths[i : i + 1],
            max_length=2 * length + 10,
            num_hypotheses=2,
            num_beams=4,
        )
        check([found[i]], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_search_equals_generate(architecture: Architecture) -> None:
    model = build(architecture)
    source, lengths = batch()
    for min_length in (0, 3):
        check_greedy(
            model,
            greedy_search(
                HuggingFaceDecoder(model),
                source,
                lengths,
                max_length=MAX_LENGTH,
                min_length=min_length,
            ),
            min_new_tokens=min_length,
        )


def check_greedy(model: PreTrainedModel, found: list[Hypothesis], **options: Any) -> None:
    """Compare with ``generate`` of one beam, which leaves softmax and sums to its caller."""
    source, lengths = batch()
    expected = model.generate(
        source,
        attention_mask=attention_mask(source, lengths),
        max_new_tokens=MAX_LENGTH,
        num_beams=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    eos = model.generation_config.eos_token_id
    log_probabilities = torch.stack(expected.logits, dim=1).log_softmax(-1)  # [B, T, V]
    for hypothesis, row, values in zip(
        found, expected.sequences.tolist(), log_probabilities, strict=True
    ):
        tokens = hypothesis.tokens + [eos] * hypothesis.complete
        assert row[1 : 1 + len(tokens)] == tokens
        assert hypothesis.complete or len(tokens) == MAX_LENGTH
        total = values[range(len(tokens)), tokens].sum().item()
        assert hypothesis.log_probability == pytest.approx(total, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_source_takes_the_place_of_another(architecture: Architecture) -> None:
    model = build(architecture)
    decoder = HuggingFaceDecoder(model)
    source, lengths = batch()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(FIRST_WORD, VOCABULARY, (5, 3, 2), generator=generator)

    def alone(rows: list[int], steps: list[Tensor]) -> Tensor:
        state = decoder.start(source[rows, :7], lengths[rows], 2)
        for step in steps:
            logits, state = decoder.step(step, state)
        return logits

    # Source 4 enters after two steps of 0, 1, 2, in the place of source 1; then 5 in that of 2.
    state = decoder.start(source[:3], lengths[:3], 2)
    for step in tokens[:2]:
        _, state = decoder.step(step, state)
    state = decoder.replace(state, torch.tensor([1]), decoder.start(source[4:5], lengths[4:5], 2))
    _, state = decoder.step(tokens[2], state)
    entering = decoder.start(source[5:, :2], lengths[5:], 2)
    state = decoder.replace(state, torch.tensor([2]), entering)
    logits, state = decoder.step(tokens[3], state)
    expected = torch.cat(
        [
            alone([0], list(tokens[:4, :1])),
            alone([4], list(tokens[2:4, 1:2])),
            alone([5], list(tokens[3:4, 2:])),
        ]
    )
    torch.testing.assert_close(logits, expected)
    assert (expected[0] - alone([0], list(tokens[3:4, :1]))[0]).abs().max() > 0.1


def compare(
    architecture: Architecture,
    constraints: dict[str, Any],
    options: dict[str, Any],
    *,
    min_length: int = 0,
    length_penalty: float = 1.0,
    end_bias: float = 2.0,
) -> None:
    """Ours under constraints against ``generate`` with options, of several beams."""
    model = build(architecture, end_bias)
    source, lengths = batch()
    free = beam_search(
        HuggingFaceDecoder(model), source, lengths, beam_size=1, max_length=MAX_LENGTH
    )
    for beam_size, stopping in ((1, "heuristic"), (2, "never"), (4, "first"), (6, "heuristic")):
        expected = hugging_face_beam_search(
            model,
            source,
            lengths,
            max_length=MAX_LENGTH,
            num_hypotheses=beam_size,
            num_beams=beam_size,
            length_penalty=length_penalty,
            early_stopping=EARLY_STOPPING[stopping],
            min_new_tokens=min_length,
            **options,
        )
        found = beam_search(
            HuggingFaceDecoder(model),
            source,
            lengths,
            beam_size=beam_size,
            max_length=MAX_LENGTH,
            min_length=min_length,
            length_penalty=length_penalty,
            stopping=stopping,
            num_hypotheses=beam_size,
            constraints=generation.Constraints(**constraints),
        )
        check(found, expected)
        if beam_size == 1:
            assert [best[0].tokens for best in found] != [best[0].tokens for best in free]


@needs_constraints
@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_repetition_penalty(architecture: Architecture, penalty: float) -> None:
    # The token that begins a target counts as one of it: in BART it is the end of sequence.
    compare(
        architecture, {"repetition_penalty": penalty}, {"repetition_penalty": penalty}, end_bias=1.0
    )


@needs_constraints
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_repeated_ngrams(architecture: Architecture, size: int) -> None:
    compare(
        architecture, {"no_repeat_ngram_size": size}, {"no_repeat_ngram_size": size}, end_bias=0.0
    )


@needs_constraints
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_banned_tokens(architecture: Architecture) -> None:
    banned = list(range(FIRST_WORD, VOCABULARY, 2))
    compare(architecture, {"banned_tokens": banned}, {"bad_words_ids": [[t] for t in banned]})


@needs_constraints
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_bias(architecture: Architecture) -> None:
    eos = build(architecture).generation_config.eos_token_id
    bias = {eos: -1.0, 7: 2.5, 11: -3.0, 13: 1.25, 20: 0.5, 30: -0.75}
    compare(
        architecture,
        {"token_bias": bias},
        {"sequence_bias": {(token,): value for token, value in bias.items()}},
    )


@needs_constraints
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_constraints_together(architecture: Architecture) -> None:
    # With sequence_bias generate would have the bias before the penalty, which multiplies the
    # biased log-probability; ours is added after.
    bias = {7: 2.5, 11: -3.0, 13: 1.25}
    compare(
        architecture,
        {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "banned_tokens": [9, 12, 31],
            "token_bias": bias,
        },
        {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[9], [12], [31]],
            "logits_processor": [added_bias(bias)],
        },
        min_length=2,
        length_penalty=0.6,
    )


def begins_with(prefixes: list[list[int]]) -> Callable[[int, Tensor], list[int]]:
    """For ``generate``: the tokens that may follow where each source's target has its prefix."""

    def allowed(sentence: int, target: Tensor) -> list[int]:
        begun, prefix = len(target) - 1, prefixes[sentence]
        return [prefix[begun]] if begun < len(prefix) else list(range(VOCABULARY))

    return allowed


PREFIXES = [[8, 9, 10], [12], [20, 8], [30, 31, 32], [13, 13, 14, 13], [25]]


@needs_constraints
@pytest.mark.parametrize("per_source", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefix(architecture: Architecture, per_source: bool) -> None:
    # A prefix is what prefix_allowed_tokens_fn makes of it: its probability and length count.
    prefixes = PREFIXES if per_source else [[8, 9, 10]] * 6

    compare(
        architecture,
        {"prefix": prefixes if per_source else prefixes[0], "no_repeat_ngram_size": 3},
        {"prefix_allowed_tokens_fn": begins_with(prefixes), "no_repeat_ngram_size": 3},
    )


@needs_constraints
@pytest.mark.parametrize("forced", ["decoder_input_ids", "forced_bos_token_id"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefix_beside_forced_tokens(architecture: Architecture, forced: str) -> None:
    # Tokens that generate forces have no log-probability in its scores; those of decoder_input_ids
    # have no length either. Where length does not matter the order is the same as ours.
    model = build(architecture)
    source, lengths = batch()
    decoder = HuggingFaceDecoder(model)
    begin = torch.full((len(source), 1), decoder.bos_token)
    prefix = torch.tensor([[8, 9], [12, 8], [20, 8], [30, 31], [13, 13], [25, 6]])
    if forced == "forced_bos_token_id":
        prefix = torch.full_like(begin, 12)
    target = torch.cat([begin, prefix], dim=1)
    expected = hugging_face_beam_search(
        model,
        source,
        lengths,
        max_length=MAX_LENGTH,
        num_hypotheses=4,
        num_beams=4,
        length_penalty=0.0,
        **({forced: target} if forced == "decoder_input_ids" else {forced: 12}),
    )
    found = beam_search(
        decoder,
        source,
        lengths,
        beam_size=4,
        max_length=MAX_LENGTH,
        length_penalty=0.0,
        num_hypotheses=4,
        constraints=generation.Constraints(prefix=prefix.tolist()),
    )
    with torch.inference_mode():
        logits = model(
            input_ids=source,
            attention_mask=attention_mask(source, lengths),
            decoder_input_ids=target,
        ).logits[:, :-1]
    sums = logits.log_softmax(-1).gather(2, prefix[:, :, None]).sum(dim=(1, 2)).tolist()
    check(
        found,
        [
            [sequence._replace(score=sequence.score + prefix_sum) for sequence in sequences]
            for sequences, prefix_sum in zip(expected, sums, strict=True)
        ],
    )


@needs_constraints
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_search_under_constraints(architecture: Architecture) -> None:
    # Here generate's processors see logits instead of log-probabilities. To forbid tokens is the
    # same in both; a repetition penalty is not.
    model = build(architecture, end_bias=0.0)
    source, lengths = batch()
    found = greedy_search(
        HuggingFaceDecoder(model),
        source,
        lengths,
        max_length=MAX_LENGTH,
        min_length=2,
        constraints=generation.Constraints(no_repeat_ngram_size=2, banned_tokens=[9, 12, 31]),
    )
    check_greedy(
        model,
        found,
        min_new_tokens=2,
        no_repeat_ngram_size=2,
        bad_words_ids=[[9], [12], [31]],
    )


@needs_constraints
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sources_that_wait_for_a_place(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever has gone on in a place before, a source finds there what generate finds.
    model = build(architecture)
    source, lengths = batch([1 + i % 7 for i in range(24)])
    prefixes = [PREFIXES[i % len(PREFIXES)] for i in range(24)]

    entered = []
    replace = HuggingFaceDecoder.replace

    def counted(self: HuggingFaceDecoder, state: Any, sentences: Tensor, other: Any) -> Any:
        entered.append(len(sentences))
        return replace(self, state, sentences, other)

    monkeypatch.setattr(HuggingFaceDecoder, "replace", counted)
    found = generation.generate(
        HuggingFaceDecoder(model),
        source,
        lengths,
        strategy=generation.BeamSearch(beam_size=4, num_hypotheses=4),
        constraints=generation.Constraints(prefix=prefixes, no_repeat_ngram_size=3),
        max_length=MAX_LENGTH,
        batch_size=5,
    )
    assert sum(entered) > 5
    expected = hugging_face_beam_search(
        model,
        source,
        lengths,
        max_length=MAX_LENGTH,
        num_hypotheses=4,
        num_beams=4,
        prefix_allowed_tokens_fn=begins_with(prefixes),
        no_repeat_ngram_size=3,
    )
    check([result.hypotheses for result in found], expected)
