"""Laws of the recurrent model as a decoder: steps are the full forward, whoever else is there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.generation import (
    BeamSearch,
    Constraints,
    beam_search,
    generate,
    generate_each,
    greedy_search,
    sample,
    score,
)
from fused_attn.models import RNNSeq2Seq

from .test_rnn_seq2seq import VARIANTS, make, sources, targets
from .test_transformer import close

LOOKS = [name for name in VARIANTS if name not in ("plain", "cho")]


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> RNNSeq2Seq:
    return make(**VARIANTS[request.param])


def same(logits: Tensor, expected: Tensor) -> None:
    """The same distributions."""
    close(logits.softmax(-1), expected.softmax(-1))
    assert torch.equal(logits == -torch.inf, expected == -torch.inf)


# --- steps ----------------------------------------------------------------------------------------


def test_steps_equal_the_full_forward(model: RNNSeq2Seq) -> None:
    source, lengths = sources(model, 5, 2, 7)
    K = 2
    words = targets(model, (6, 3, K))
    parents = targets(model, (6, 3, K), seed=2) % K
    state = model.start(source, lengths, K)
    history = torch.zeros(3, K, 0, dtype=torch.int64)
    for tokens, beams in zip(words, parents, strict=True):
        history = torch.cat([history, tokens[:, :, None]], dim=2)
        logits, state = model.step(tokens, state)
        for k in range(K):
            same(logits[:, k], model(source, history[:, k], lengths)[:, -1])
        history = history.gather(1, beams[:, :, None].expand(-1, -1, history.size(2)))
        state = model.reorder(state, beams)


def test_sources_leave_and_others_take_their_place(model: RNNSeq2Seq) -> None:
    """A source's logits are those that it has alone; newcomers may be longer."""
    K = 2
    texts = [sources(model, n, seed=n)[0] for n in (3, 5, 2, 8, 4)]
    words = targets(model, (5, 9, K))

    def begin(names: list[int]) -> Any:
        S = max(texts[name].size(1) for name in names)
        rows = [torch.nn.functional.pad(texts[n], (0, S - texts[n].size(1))) for n in names]
        return model.start(
            torch.cat(rows), torch.tensor([texts[name].size(1) for name in names]), K
        )

    def run(first: list[int], arrives: dict[int, int], leaves: int) -> dict[Any, Tensor]:
        state, present, ages = begin(first), list(first), [0] * len(first)
        found = {}
        for step in range(9):
            if step in arrives:
                state = model.replace(state, torch.tensor([1]), begin([arrives[step]]))
                present[1], ages[1] = arrives[step], 0
            if step == leaves:
                kept = torch.tensor([1, 2])
                state = model.reorder(state, torch.tensor([[1, 0], [0, 1]]), kept)
                present, ages = present[1:], ages[1:]
                swapped.add(present[0])
            tokens = torch.stack([words[n, a] for n, a in zip(present, ages, strict=True)])
            logits, state = model.step(tokens, state)
            for row, (name, age) in enumerate(zip(present, ages, strict=True)):
                found[name, age] = logits[row]
            ages = [age + 1 for age in ages]
        return found

    swapped: set[int] = set()
    together = run([0, 1, 2], {2: 3, 6: 4}, leaves=4)
    assert {name for name, _ in together} == {0, 1, 2, 3, 4}
    for name in range(5):
        alone = run([name], {}, leaves=99)
        for (other, age), logits in together.items():
            # After beams changed places their histories differ.
            if other == name and not (name in swapped and age >= 2):
                same(logits, alone[name, age])


def test_steps_keep_shapes_and_places(model: RNNSeq2Seq) -> None:
    """What a captured graph needs: every tensor that a step reads stays where it is."""
    source, lengths = sources(model, 5, 2, 7)
    state = model.reserve(model.start(source, lengths, 2), 24)
    assert model.decodes_on_static_shapes

    def places() -> list[tuple[int, torch.Size]]:
        held: list[Any] = [state.recurrent, state.feed, state.keys, state.tokens, state.table]
        held += [state.context, state.lengths, state.source_lengths]
        if state.memory is not None:
            held += [*vars(state.memory).values(), *vars(state.attention).values()]
        tensors = [t for part in held for t in (part if isinstance(part, tuple) else [part])]
        return [(t.data_ptr(), t.shape) for t in tensors if t is not None]

    before = places()
    for step in range(3):
        _, state = model.step(targets(model, (3, 2), step), state)
        state = model.reorder(state, targets(model, (3, 2), step) % 2)
        assert places() == before


def test_features_are_decoded() -> None:
    model = make(source_features=4, time_reduction=3, input_feeding=True)
    frames, lengths = torch.randn(3, 8, 4), torch.tensor([8, 4, 1])
    found = generate(
        model,
        frames,
        lengths,
        strategy=BeamSearch(beam_size=2, coverage_penalty=0.2),
        max_length=6,
        batch_size=2,
        alignments=True,
    )
    for result, S in zip(found, lengths.tolist(), strict=True):
        alignment = result.best.alignment
        assert alignment is not None
        assert alignment.size(1) == S
        close(alignment.sum(1), torch.ones(len(alignment)))


# --- searches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["feeding", "location", "copynet", "pointer"])
@torch.no_grad()
def test_a_wide_beam_is_brute_force(name: str) -> None:
    """Targets of up to 2 words (positions: 3), all of whose beginnings have a beam."""
    points, copies = name == "pointer", name == "copynet"
    changes = dict(VARIANTS[name])
    if not points:
        changes.update(source_vocab_size=5, target_vocab_size=5, extra_tokens=int(copies))
    model = make(**changes)
    source = torch.tensor([[4, 5, 3] if copies else [4, 3, 4]])
    longest, eos = 3 if points else 2, model.eos_token
    words = [3, 4, 5] if points else [v for v in range(5 + copies) if v != eos]
    totals: dict[tuple[int, ...], float] = {}
    for length in range(longest + 1):
        found = list(itertools.product(words, repeat=length))
        ends = [eos] if length < longest else []
        texts = torch.tensor([[*text, *ends] for text in found])
        begun = torch.cat([torch.full((len(found), 1), model.bos_token), texts[:, :-1]], dim=1)
        logits = model(source.expand(len(found), -1), begun)
        each = logits.log_softmax(-1).gather(2, texts[:, :, None])[:, :, 0].sum(1)
        totals.update(zip(found, each.tolist(), strict=True))
    best = sorted(totals, key=lambda text: -totals[text])[:3]
    [beams] = beam_search(
        model,
        source,
        beam_size=len(words) ** (longest - 1),
        num_hypotheses=3,
        max_length=longest,
        length_penalty=0.0,
        stopping="never",
    )
    assert [tuple(h.tokens) for h in beams] == best
    for hypothesis, text in zip(beams, best, strict=True):
        assert hypothesis.log_probability == pytest.approx(totals[text], abs=1e-5)


def test_greedy_is_a_beam_of_one(model: RNNSeq2Seq) -> None:
    source, lengths = sources(model, 5, 1, 7, 3)
    greedy = greedy_search(model, source, lengths, max_length=12)
    beams = beam_search(model, source, lengths, beam_size=1, max_length=12)
    assert [h.tokens for h in greedy] == [row[0].tokens for row in beams]
    each = dict(
        generate_each(
            model,
            [source[i, :n] for i, n in enumerate(lengths.tolist())],
            strategy=BeamSearch(beam_size=1),
            max_length=12,
            batch_size=2,
        )
    )
    assert [each[i].best.tokens for i in range(4)] == [h.tokens for h in greedy]
    drawn = sample(model, source, lengths, num_samples=2, seed=3, max_length=12)
    assert all(h.log_probability > -torch.inf for row in drawn for h in row)
    complete = [i for i, h in enumerate(greedy) if h.complete]
    if complete:
        again = score(
            model, source[complete], [greedy[i].tokens for i in complete], lengths[complete]
        )
        for i, scored in zip(complete, again, strict=True):
            assert scored.log_probability == pytest.approx(greedy[i].log_probability, abs=1e-4)


@pytest.mark.parametrize("name", LOOKS)
def test_alignments(name: str) -> None:
    model = make(**VARIANTS[name])
    source, lengths = sources(model, 5, 1, 7)
    target = targets(model, (3, 4))
    target_lengths = torch.tensor([4, 2, 3])
    weights = model.align(source, target, lengths, target_lengths)
    assert weights.shape == (3, 4, 7)
    assert not weights[torch.arange(4) >= target_lengths[:, None]].any()
    assert not weights.mT[torch.arange(7) >= lengths[:, None]].any()
    totals = weights.sum(-1)[torch.arange(4) < target_lengths[:, None]]
    if not model.config.monotonic:  # which may find nothing to look at
        close(totals, torch.ones(9))
    state = model.start(source, lengths, 1)
    for t in range(4):
        _, state = model.step(target[:, t : t + 1], state)
        inside = t < target_lengths
        close(model.cross_attention(state)[inside, 0], weights[inside, t])


def test_coverage_is_the_attention_of_the_winning_path() -> None:
    model = make(**VARIANTS["feeding"])
    source, lengths = sources(model, 5, 2, 7)
    found = generate(
        model,
        source,
        lengths,
        strategy=BeamSearch(beam_size=3, coverage_penalty=0.5),
        max_length=9,
        alignments=True,
    )
    for result in found:
        best = result.best
        assert best.alignment is not None
        steps = len(best.tokens) + best.complete
        covered = best.alignment.sum(0).clamp(max=1.0).log().sum().item()
        assert best.score == pytest.approx(best.log_probability / steps + 0.5 * covered, rel=1e-3)


# --- copying --------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["pointer_generator", "copynet"])
def test_a_word_outside_the_vocabulary_is_copied(output: str) -> None:
    """Trained to repeat the first word of the source, whatever it is."""
    torch.manual_seed(1)
    model = make(
        output=output,
        target_vocab_size=23,
        extra_tokens=3,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dropout=0.0,
        initialization="he",
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    bos = torch.ones(16, 1, dtype=torch.int64)
    for _ in range(40):
        source = torch.randint(4, 26, (16, 3), generator=generator)
        outputs = model.outputs(source, torch.cat([bos, source[:, :1]], 1))
        following = torch.cat([source[:, :1], 2 * bos], dim=1)
        loss = model.target_nll(outputs, source, following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    source = torch.tensor([[23, 5, 6], [25, 24, 7], [9, 24, 23], [24, 24, 4]])
    found = beam_search(model, source, beam_size=3, max_length=4)
    assert [row[0].tokens for row in found] == [[23], [25], [9], [24]]


def test_unknown_words_are_read_as_unknown() -> None:
    model = make(**VARIANTS["copynet"])
    source = torch.tensor([[5, 24, 6]])
    target = torch.tensor([[1, 24, 7]])
    plain = model.outputs(source.where(source < 23, 3), target.where(target < 23, 3))
    assert torch.equal(model.outputs(source, target).hidden, plain.hidden)


def test_a_pointer_network_points() -> None:
    """Trained to point at the rightmost of a few points, then at the end."""
    model = make(
        source_features=2,
        output="pointer",
        target_vocab_size=3,
        attention="none",
        num_encoder_layers=1,
        num_decoder_layers=1,
        dropout=0.0,
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    bos = torch.ones(32, 1, dtype=torch.int64)
    lengths = torch.arange(32) % 3 + 2
    behind = torch.arange(4) >= lengths[:, None]

    def rightmost(points: Tensor) -> Tensor:
        return 3 + points[:, :, 0].masked_fill(behind, -1.0).argmax(1, keepdim=True)

    for _ in range(90):
        points = torch.rand(32, 4, 2, generator=generator)
        answer = rightmost(points)
        outputs = model.outputs(points, torch.cat([bos, answer], 1), lengths)
        loss = model.target_nll(outputs, points, torch.cat([answer, 2 * bos], 1), lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    points = torch.rand(32, 4, 2, generator=generator)
    found = beam_search(model, points, lengths, beam_size=2, max_length=3)
    right = [row[0].tokens == [int(a)] for row, a in zip(found, rightmost(points), strict=True)]
    assert sum(right) >= 28
    logits, _ = model.step(bos, model.start(points, lengths, 1))
    position = torch.arange(logits.size(2)) - 3
    is_possible = (position < lengths[:, None]) & ((position >= 0) | (position == -1))
    assert torch.equal(logits[:, 0] > -torch.inf, is_possible)


# --- errors ---------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = make()
    source, lengths = sources(model, 3, 2)
    state = model.start(source, lengths, 2)
    one = model.start(source[:1], lengths[:1], 2)
    tokens = targets(model, (1, 2))
    with pytest.raises(ValueError, match=r"cross_attention needs a step"):
        model.cross_attention(state)
    with pytest.raises(ValueError, match=r"sentences must have shape \[N\] with N = 1 .*got \[2\]"):
        model.replace(state, torch.tensor([0, 1]), one)
    with pytest.raises(ValueError, match=r"other must have beam_size = 2 .*got 1"):
        model.replace(state, torch.tensor([0]), model.start(source[:1], lengths[:1], 1))
    _, one = model.step(tokens, one)
    with pytest.raises(ValueError, match=r"other must come from start"):
        model.replace(state, torch.tensor([0]), one)
    with pytest.raises(RuntimeError, match=r"generation needs the model in evaluation mode"):
        model.train().start(source, lengths, 2)
    blind = make(**VARIANTS["plain"])
    with pytest.raises(ValueError, match="alignments need a model that attends or copies"):
        blind.align(source, tokens.expand(2, -1), lengths)
    _, state = blind.step(tokens.expand(2, -1), blind.start(source, lengths, 2))
    with pytest.raises(ValueError, match="alignments need a model that attends or copies"):
        blind.cross_attention(state)


def test_a_prefix_may_be_copied() -> None:
    model = make(**VARIANTS["pointer_generator"])
    source = torch.tensor([[5, 24, 6]])
    [result] = generate(model, source, constraints=Constraints(prefix=[24, 5]), max_length=4)
    assert result.best.tokens[:2] == [24, 5]
