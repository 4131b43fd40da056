from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fused_attn.training.checkpoint import list_checkpoints
from fused_attn.training.config import TrainingConfig
from fused_attn.training.data import Batch, ParallelDataset
from fused_attn.training.loop import Trainer
from fused_attn.training.loss import training_losses, translation_loss
from fused_attn.training.sampling import SamplingSchedule, mix_predictions

from .stand_in import StandIn


@pytest.fixture(scope="module")
def dataset() -> ParallelDataset:
    random = np.random.default_rng(0)
    sources = [random.integers(4, 40, random.integers(1, 9)).tolist() for _ in range(60)]
    return ParallelDataset(sources, [ids[::-1] for ids in sources])


@pytest.fixture
def model() -> StandIn:
    torch.manual_seed(0)
    return StandIn(dropout=0.0)


@pytest.fixture
def batch(dataset) -> Batch:
    return dataset.batch(np.arange(20))


def test_schedules_are_the_papers() -> None:
    for step in (1, 2, 10, 300):
        i = step - 1
        assert SamplingSchedule("none")(step) == 0
        assert SamplingSchedule("linear", 40)(step) == pytest.approx(min(1, i * (1 / 40)))
        base = math.exp(-1 / 40)
        assert SamplingSchedule("exponential", 40)(step) == pytest.approx(1 - base**i)
        sigmoid = 40 / (40 + math.exp(i / 40))
        assert SamplingSchedule("inverse_sigmoid", 40)(step) == pytest.approx(1 - sigmoid)
    assert SamplingSchedule("inverse_sigmoid", 1)(10**9) == 1


def test_a_schedule_begins_late_and_has_a_limit() -> None:
    schedule = SamplingSchedule("linear", 10, start=5, limit=0.25)
    assert [schedule(step) for step in range(1, 12)] == pytest.approx(
        [0, 0, 0, 0, 0, 0, 0.1, 0.2, 0.25, 0.25, 0.25]
    )
    late = SamplingSchedule("inverse_sigmoid", 4, start=5)
    assert late(5) == 0
    assert late(6) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "cubic"}, r"kind must be one of none, linear, .*, got 'cubic'"),
        ({"sampling_decay": 0}, r"decay must be positive, got 0"),
        ({"sampling_start": -1}, r"start must not be negative, got -1"),
        ({"sampling_limit": 1.5}, r"limit must be in \[0, 1\], got 1.5"),
        ({"guided_attention": -1}, r"guided_attention must be at least 0, got -1"),
        ({"coverage_loss": -1}, r"coverage_loss must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(max_steps=1, **settings)


def test_at_probability_0_it_is_teacher_forcing(model, batch) -> None:
    state = torch.get_rng_state()
    assert mix_predictions(model, batch, 0.0) is batch.target_input
    assert torch.equal(torch.get_rng_state(), state)
    losses = training_losses(model, batch, sampling_probability=0.0)
    assert torch.equal(losses.total, translation_loss(model, batch))


def test_at_probability_1_all_but_the_first_word_are_the_models_own(model, batch) -> None:
    mixed = mix_predictions(model, batch, 1.0)
    for row in range(len(mixed)):
        alone = slice(row, row + 1)
        for t in range(int(batch.target_lengths[row])):
            if t == 0:
                assert mixed[row, 0] == batch.target_input[row, 0]
                continue
            hidden = model.decode(
                batch.source[alone],
                batch.target_input[alone, :t],
                batch.source_lengths[alone],
                torch.tensor([t]),
            )
            assert mixed[row, t] == model.project(hidden[0, -1]).argmax()


def test_words_are_mixed_in_with_the_probability(model, dataset) -> None:
    batch = dataset.batch(np.arange(60))
    own = mix_predictions(model, batch, 1.0)
    differs = own != batch.target_input
    torch.manual_seed(1)
    taken = torch.stack([mix_predictions(model, batch, 0.3) for _ in range(30)])
    assert ((taken == own) | (taken == batch.target_input)).all()
    is_own = (taken == own)[:, differs].float()
    assert is_own.mean().item() == pytest.approx(0.3, abs=0.02)
    # Drawn by position, and not once for a sentence or a batch.
    assert is_own.mean(dim=0).std() < 0.12
    assert is_own.mean(dim=1).std() < 0.05


def test_the_second_pass_alone_has_a_gradient(model, batch) -> None:
    torch.manual_seed(2)
    mixed = mix_predictions(model, batch, 0.5)
    assert not mixed.requires_grad
    changed = Batch(**{**vars(batch), "target_input": mixed})
    expected = torch.autograd.grad(translation_loss(model, changed), list(model.parameters()))
    torch.manual_seed(2)
    losses = training_losses(model, batch, sampling_probability=0.5)
    found = torch.autograd.grad(losses.total, list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_resuming_goes_on_with_the_schedule(dataset, tmp_path) -> None:
    def run(directory, steps: int) -> Trainer:
        torch.manual_seed(0)
        model = StandIn()
        config = TrainingConfig(
            max_steps=steps, warmup_steps=2, max_tokens=64, sampling="linear", sampling_decay=8
        )
        return Trainer(
            model,
            dataset,
            config,
            model_config=model.config,
            directory=directory,
            report=lines.append,
        )

    lines: list[str] = []
    whole = run(tmp_path / "whole", 8)
    whole.train()
    assert "  sampling probability 0.8750  " in lines[0]
    run(tmp_path / "parts", 4).train()
    resumed = run(tmp_path / "parts", 8)
    resumed.resume(list_checkpoints(tmp_path / "parts" / "checkpoints")[-1])
    resumed.train()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    forced = run(tmp_path / "forced", 8)
    forced._sampling = SamplingSchedule("none")
    forced.train()
    assert not torch.equal(forced.model.output.weight, whole.model.output.weight)
