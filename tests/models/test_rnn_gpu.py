"""The recurrent model on a GPU: it learns what it learns on a CPU, and a graph holds its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.generation import BeamSearch, Greedy, _engine, _graph, generate
from fused_attn.models import RNNSeq2Seq

from .test_rnn_seq2seq import VARIANTS, gradients, make, sources, targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_a_cpu(name: str) -> None:
    model = make(**VARIANTS[name], dropout=0.0)
    source, lengths = sources(model, 5, 2, 7)
    target = targets(model, (3, 6))

    def learn(model: RNNSeq2Seq, device: str) -> tuple[Tensor, list[Tensor]]:
        model = model.to(device)
        model.zero_grad()
        inputs = [tensor.to(device) for tensor in (source, target, lengths)]
        outputs = model.outputs(inputs[0], inputs[1][:, :-1], inputs[2])
        loss = model.target_nll(outputs, inputs[0], inputs[1][:, 1:], inputs[2])
        # A word that neither vocabulary nor source has costs infinitely much, on both.
        loss.backward()
        return loss.detach().cpu(), [gradient.cpu() for gradient in gradients(model)]

    expected, expected_gradients = learn(model, "cpu")
    loss, found = learn(model, "cuda")
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    for gradient, other in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("strategy", [BeamSearch(beam_size=3), Greedy()], ids=["beam", "greedy"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_captured_step_finds_what_an_eager_one_does(
    name: str, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(**VARIANTS[name], dropout=0.0).to("cuda")
    source, lengths = (tensor.to("cuda") for tensor in sources(model, 5, 2, 7, 4, 6))
    options: dict[str, Any] = {"strategy": strategy, "max_length": 36, "batch_size": 3}
    captured = []

    class Counted(_graph.StepRunner):
        def _capture(self) -> Any:
            captured.append(name)
            return super()._capture()

    monkeypatch.setattr(_engine, "StepRunner", Counted)
    found = generate(model, source, lengths, **options)
    assert captured
    monkeypatch.setattr(RNNSeq2Seq, "decodes_on_static_shapes", False)
    eager = generate(model, source, lengths, **options)
    for result, other in zip(found, eager, strict=True):
        assert [h.tokens for h in result.hypotheses] == [h.tokens for h in other.hypotheses]
        assert result.best.score == pytest.approx(other.best.score, rel=1e-4)
