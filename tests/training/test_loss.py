from __future__ import annotations

import math

import pytest
import torch

from fused_attn.training.data import ParallelDataset
from fused_attn.training.loss import (
    attention_coverage_loss,
    guided_attention_loss,
    training_losses,
    translation_loss,
)
from fused_attn.training.optimizer import InverseSquareRoot, build_optimizer

from .stand_in import StandIn


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_equation_over_words_alone(smoothing: float) -> None:
    torch.manual_seed(0)
    dataset = ParallelDataset([[5, 6, 7], [8]], [[9], [10, 11, 12]])
    batch = dataset.batch(torch.tensor([0, 1]).numpy())
    model = StandIn().eval()
    hidden = model.decode(
        batch.source, batch.target_input, batch.source_lengths, batch.target_lengths
    )
    log_p = model.project(hidden).log_softmax(-1)
    V = log_p.shape[-1]
    expected = 0.0
    for row in range(2):
        for position in range(int(batch.target_lengths[row])):
            word = batch.target_output[row, position]
            expected -= (1 - smoothing) * log_p[row, position, word]
            expected -= smoothing / V * log_p[row, position].sum()
    loss = translation_loss(model, batch, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_padding_contributes_nothing() -> None:
    torch.manual_seed(0)
    model = StandIn().eval()
    pairs = [([5, 6, 7], [9]), ([8], [10, 11, 12]), ([4, 4], [13, 14])]
    dataset = ParallelDataset([source for source, _ in pairs], [target for _, target in pairs])
    together = translation_loss(model, dataset.batch(torch.arange(3).numpy()))
    alone = sum(translation_loss(model, dataset.batch(torch.tensor([i]).numpy())) for i in range(3))
    torch.testing.assert_close(together, alone)


def test_schedule_rises_to_its_peak_and_falls_as_the_root() -> None:
    rate = InverseSquareRoot(peak=2.0, warmup_steps=100)
    assert rate(1) == pytest.approx(0.02)
    assert rate(50) == pytest.approx(1.0)
    assert rate(100) == 2.0
    assert rate(400) == pytest.approx(1.0)
    assert max(rate(step) for step in range(1, 500)) == 2.0
    assert InverseSquareRoot(1.0, 0)(4) == pytest.approx(1 / math.sqrt(4))


def test_cooldown_ends_at_zero_after_the_last_update() -> None:
    plain = InverseSquareRoot(1.0, 10)
    rate = InverseSquareRoot(1.0, 10, cooldown_steps=9, last_step=100)
    assert rate(91) == plain(91)
    assert rate(96) == pytest.approx(plain(96) / 2)
    assert rate(100) == pytest.approx(plain(100) / 10)
    assert rate(101) == 0


def test_schedule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"peak must be positive, got 0"):
        InverseSquareRoot(0, 10)
    with pytest.raises(ValueError, match=r"warmup_steps must not be negative, got -1"):
        InverseSquareRoot(1, -1)
    with pytest.raises(ValueError, match=r"last_step must be given for a cooldown"):
        InverseSquareRoot(1, 1, cooldown_steps=1)


def test_only_matrices_decay() -> None:
    model = StandIn()
    optimizer = build_optimizer(model, weight_decay=0.1)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = dict(model.named_parameters())
    assert len(decay) == len(parameters)
    for parameter in parameters.values():
        assert decay[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0)


def _attention(lengths: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    """Random weights ``[B, T, S]``, 0 behind the sources, and nonsense in rows behind targets."""
    T, S = max(t for t, _ in lengths), max(s for _, s in lengths)
    weights = torch.rand(len(lengths), T, S, generator=torch.Generator().manual_seed(seed))
    for b, (_, s) in enumerate(lengths):
        weights[b, :, s:] = 0.0
    return weights / weights.sum(dim=2, keepdim=True)


LENGTHS = [(5, 7), (3, 4), (1, 1)]


def test_guided_attention_is_the_equation() -> None:
    weights = _attention(LENGTHS)
    expected = 0.0
    for b, (T, S) in enumerate(LENGTHS):
        for t in range(T):
            for s in range(S):
                far = 1 - math.exp(-((t / T - s / S) ** 2) / (2 * 0.3**2))
                expected += weights[b, t, s].item() * far
    targets, sources = torch.tensor(LENGTHS).unbind(1)
    found = guided_attention_loss(weights, sources, targets, width=0.3)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    diagonal = torch.eye(6)[None]
    assert guided_attention_loss(diagonal, torch.tensor([6]), torch.tensor([6])) == 0.0


def test_the_coverage_loss_is_the_equation() -> None:
    weights = _attention(LENGTHS)
    expected = 0.0
    for b, (T, S) in enumerate(LENGTHS):
        coverage = [0.0] * S
        for t in range(T):
            for s in range(S):
                expected += min(weights[b, t, s].item(), coverage[s])
                coverage[s] += weights[b, t, s].item()
    targets = torch.tensor([t for t, _ in LENGTHS])
    assert attention_coverage_loss(weights, targets).item() == pytest.approx(expected, rel=1e-5)
    assert attention_coverage_loss(torch.eye(6)[None], torch.tensor([6])) == 0.0


def test_losses_on_attention_need_a_model_that_shows_it() -> None:
    batch = ParallelDataset([[5, 6]], [[7]]).batch(torch.tensor([0]).numpy())
    for weight in ("guided_attention", "coverage_loss"):
        with pytest.raises(ValueError, match="must be 0 for a model without outputs that hold"):
            training_losses(StandIn(), batch, **{weight: 0.5})
