"""A Transformer under the engine: the same bits whatever else is decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_attn.generation import (
    BeamSearch,
    Constraints,
    Greedy,
    Hypothesis,
    Result,
    Sampling,
    _engine,
    _graph,
    generate,
    score,
    stream,
)
from fused_attn.models import Transformer

from .test_transformer import VARIANTS, make, sources

LENGTHS = (1, 6, 4, 9, 2, 3, 7, 5, 1, 8)

STRATEGIES: dict[str, Any] = {
    "beam": BeamSearch(beam_size=4, num_hypotheses=4),
    "coverage": BeamSearch(beam_size=3, num_hypotheses=3, coverage_penalty=0.3),
    "groups": BeamSearch(beam_size=4, groups=2, diversity_penalty=0.5, num_hypotheses=4),
    "greedy": Greedy(),
}


@pytest.fixture(params=["post_norm", "rms_norm_swiglu"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return make(**VARIANTS[request.param])


# So that some targets end by themselves.
ENDING = Constraints(token_bias={2: 2.0})


def bits(results: list[Result]) -> list[Any]:
    """All that was found, with every number exact."""
    return [
        [
            (h.tokens, h.score, h.log_probability, h.complete, h.token_log_probabilities, h.beams)
            for h in result.hypotheses
        ]
        for result in results
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_result_is_the_same_bits_in_every_batch(model: Transformer, name: str) -> None:
    source, lengths = sources(*LENGTHS)
    options: dict[str, Any] = {
        "strategy": STRATEGIES[name],
        "constraints": ENDING,
        "max_length": 45,
    }
    expected = generate(model, source, lengths, **options)
    found = [h for result in expected for h in result.hypotheses]
    assert any(h.complete for h in found)
    assert len({len(h.tokens) for h in found}) >= 3
    for batch_size in (1, 3):
        found = generate(model, source, lengths, batch_size=batch_size, **options)
        assert bits(found) == bits(expected), f"in batches of {batch_size}"
    order = torch.tensor([3, 9, 0, 7, 5, 1])
    padded = torch.nn.functional.pad(source, (0, 20), value=5)
    found = generate(model, padded[order], lengths[order], batch_size=4, **options)
    assert bits(found) == [bits(expected)[i] for i in order.tolist()]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert bits(generate(model, source, lengths, **options)) == bits(expected)
    finally:
        torch.set_num_threads(threads)


def test_samples_are_the_same_bits_in_every_batch(model: Transformer) -> None:
    source, lengths = sources(*LENGTHS)
    strategy = Sampling(num_samples=3, temperature=1.5, top_k=12, top_p=0.95, seed=7)
    expected = generate(model, source, lengths, strategy=strategy, max_length=20)
    found = generate(model, source, lengths, strategy=strategy, max_length=20, batch_size=3)
    assert bits(found) == bits(expected)


def test_alignments_and_scores_are_those_of_the_model(model: Transformer) -> None:
    source, lengths = sources(*LENGTHS)
    strategy = BeamSearch(beam_size=3)
    constraints = Constraints(prefix=[5, 7], token_bias={2: 2.0})
    found = generate(
        model,
        source,
        lengths,
        strategy=strategy,
        constraints=constraints,
        max_length=12,
        batch_size=4,
        alignments=True,
    )
    for i, result in enumerate(found):
        best = result.best
        text = [model.bos_token, *best.tokens]
        target = torch.tensor([text if best.complete else text[:-1]])
        S = int(lengths[i])
        weights = model.cross_attention_weights(source[i : i + 1, :S], target)[0]
        torch.testing.assert_close(best.alignment, weights, atol=1e-5, rtol=1e-4)
    complete = [i for i, result in enumerate(found) if result.best.complete]
    assert complete
    scored = score(
        model, source[complete], [found[i].best.tokens for i in complete], lengths[complete]
    )
    for i, again in zip(complete, scored, strict=True):
        assert again.token_log_probabilities == pytest.approx(
            [
                p - 2.0 * (t == len(found[i].best.tokens))
                for t, p in enumerate(found[i].best.token_log_probabilities)
            ],
            abs=1e-5,
        )


def test_coverage_is_the_attention_of_the_winning_path(model: Transformer) -> None:
    source, lengths = sources(*LENGTHS)
    strategy = BeamSearch(beam_size=3, num_hypotheses=3, coverage_penalty=0.5)
    found = generate(
        model, source, lengths, strategy=strategy, max_length=9, batch_size=4, alignments=True
    )

    def expected(h: Hypothesis) -> float:
        assert h.alignment is not None
        steps = len(h.tokens) + h.complete
        covered = h.alignment.sum(0).clamp(max=1.0).log().sum().item()
        return h.log_probability / steps + 0.5 * covered

    for result in found:
        for hypothesis in result.hypotheses:
            assert hypothesis.score == pytest.approx(expected(hypothesis), rel=1e-3)


def test_a_stream_is_the_search(model: Transformer) -> None:
    source, lengths = sources(4, 2)
    expected = generate(model, source, lengths, max_length=20)
    shown: list[list[int]] = [[], []]
    for sentence, tokens in stream(model, source, lengths, max_length=20):
        shown[sentence] += tokens
    assert shown == [result.best.tokens for result in expected]


def test_nan_in_one_source_stays_there(model: Transformer) -> None:
    source, lengths = sources(*LENGTHS)
    expected = generate(model, source, lengths, max_length=12)
    with torch.no_grad():
        embedding = model.source_embedding or model.target_embedding
        embedding.weight[0] = torch.nan  # no source has it
        poisoned = source.clone()
        poisoned[4, 0] = 0
    found = generate(model, poisoned, lengths, max_length=12, batch_size=4)
    assert "must not hold NaN or +inf, got some at step 1 for sentence 4" in str(found[4].error)
    others = [i for i in range(len(LENGTHS)) if i != 4]
    assert bits([found[i] for i in others]) == bits([expected[i] for i in others])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_captured_step_finds_what_an_eager_one_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().to("cuda")
    source, lengths = (tensor.to("cuda") for tensor in sources(*LENGTHS))
    options: dict[str, Any] = {
        "strategy": STRATEGIES[name],
        "constraints": ENDING,
        "max_length": 45,  # beyond the first bucket of a graph
        "batch_size": 4,
    }
    captured = []

    class Counted(_graph.StepRunner):
        def _capture(self) -> Any:
            captured.append(name)
            return super()._capture()

    monkeypatch.setattr(_engine, "StepRunner", Counted)
    found = generate(model, source, lengths, **options)
    assert captured
    monkeypatch.setattr(Transformer, "decodes_on_static_shapes", False)
    eager = generate(model, source, lengths, **options)
    assert len(captured) < 20
    for result, other in zip(found, eager, strict=True):
        assert [h.tokens for h in result.hypotheses] == [h.tokens for h in other.hypotheses]
        assert result.best.score == pytest.approx(other.best.score, rel=1e-4)
