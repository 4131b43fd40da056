from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch

from fused_attn.training import checkpoint as checkpoints
from fused_attn.training.checkpoint import list_checkpoints, load_weights
from fused_attn.training.config import TrainingConfig
from fused_attn.training.data import ParallelDataset
from fused_attn.training.errors import CheckpointError
from fused_attn.training.loop import Trainer, TrainingError, Validation, mean_loss

from .stand_in import StandIn


@pytest.fixture(scope="module")
def dataset() -> ParallelDataset:
    random = np.random.default_rng(0)
    sources = [random.integers(4, 40, random.integers(1, 9)).tolist() for _ in range(200)]
    return ParallelDataset(sources, [ids[:1] * len(ids) for ids in sources])


def trainer(dataset, directory=None, *, seed: int = 0, validation=None, **settings) -> Trainer:
    torch.manual_seed(seed)
    model = StandIn()
    defaults = {"learning_rate": 0.01, "warmup_steps": 10, "max_tokens": 128, "log_every": 5}
    return Trainer(
        model,
        dataset,
        TrainingConfig(**(defaults | settings)),
        model_config=model.config,
        directory=directory,
        validation=validation,
        report=lambda line: None,
    )


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def assert_same_bits(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_loss_falls(dataset) -> None:
    run = trainer(dataset, max_epochs=30)
    before = mean_loss(run.model, dataset)
    run.train()
    assert mean_loss(run.model, dataset) < 0.5 * before
    assert run.progress.epoch == 30


# 7 updates stop inside the first epoch, 23 inside the second: both must continue in place.
@pytest.mark.parametrize(("middle", "accumulate"), [(7, 1), (23, 1), (9, 2)])
def test_resuming_gives_the_bits_of_not_stopping(dataset, tmp_path, middle, accumulate) -> None:
    total = 2 * middle
    whole = trainer(dataset, tmp_path / "whole", max_steps=total, accumulate=accumulate)
    whole.train()
    trainer(dataset, tmp_path / "parts", max_steps=middle, accumulate=accumulate).train()
    resumed = trainer(dataset, tmp_path / "parts", seed=99, max_steps=total, accumulate=accumulate)
    resumed.resume(list_checkpoints(tmp_path / "parts" / "checkpoints")[-1])
    assert resumed.progress.step == middle
    resumed.train()
    assert_same_bits(weights(whole), weights(resumed))
    assert whole.progress == resumed.progress


def test_dropout_goes_on_from_the_restored_generator(dataset, tmp_path) -> None:
    """The test above would fail without it; this shows that it would."""
    trainer(dataset, tmp_path, max_steps=5).train()
    runs = []
    for disturb in (False, True):
        run = trainer(dataset, max_steps=8)
        run.resume(list_checkpoints(tmp_path / "checkpoints")[-1])
        if disturb:
            torch.rand(1)
        run.train()
        runs.append(weights(run))
    assert any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_accumulated_batches_are_one(dataset) -> None:
    """Two batches an update give the gradient of their union, each token weighing the same."""
    torch.manual_seed(0)
    model = StandIn(dropout=0.0)
    settings = TrainingConfig(max_tokens=64, accumulate=2, max_steps=1, clip_norm=0.0)
    run = Trainer(model, dataset, settings, model_config=model.config, report=lambda line: None)
    gradients = {}
    step = run._optimizer.step

    def keep_gradients() -> None:
        for name, parameter in model.named_parameters():
            gradients[name] = parameter.grad.clone()
        step()

    run._optimizer.step = keep_gradients
    groups = run._batches.epoch(0)[:2]
    union = StandIn(dropout=0.0)
    union.load_state_dict(model.state_dict())
    run.train()

    batch = dataset.batch(np.concatenate(groups))
    from fused_attn.training.loss import translation_loss

    (translation_loss(union, batch, label_smoothing=0.1) / batch.target_tokens).backward()
    for name, parameter in union.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_checkpoints_are_kept_and_averaged(dataset, tmp_path) -> None:
    run = trainer(
        dataset, tmp_path, max_steps=50, checkpoint_every=10, keep_checkpoints=3, average=2
    )
    run.train()
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name[-2:] for path in kept] == ["30", "40", "50"]
    state = run.model.state_dict()
    last = [load_weights(path, state) for path in kept[1:]]
    given = load_weights(tmp_path / "model", state)
    for name in given:
        torch.testing.assert_close(given[name], (last[0][name] + last[1][name]) / 2)
    assert_same_bits(weights(run), given)
    assert not (tmp_path / "model" / "training.json").exists()


def test_the_best_checkpoint_survives_and_patience_ends(dataset, tmp_path) -> None:
    """Trained ever further on one half of a contradiction, the other half gets worse."""
    sources = [[token] * 3 for token in range(4, 14)]
    data = ParallelDataset(sources, sources)
    held_out = ParallelDataset(sources, [[4] * 3] * 10)
    run = trainer(
        data,
        tmp_path,
        validation=Validation(held_out),
        max_steps=2000,
        checkpoint_every=5,
        keep_checkpoints=1,
        patience=3,
    )
    run.train()
    progress = run.progress
    assert progress.step < 2000
    assert progress.worse == 3
    assert progress.best_step == progress.step - 15
    assert os.readlink(tmp_path / "best").endswith(f"{progress.best_step:08d}")
    assert os.readlink(tmp_path / "model") == os.readlink(tmp_path / "best")
    kept = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert kept == [f"step-{progress.best_step:08d}", f"step-{progress.step:08d}"]
    assert mean_loss(run.model, held_out) == pytest.approx(-progress.best)


def test_validation_reports_bleu_with_its_signature(dataset, tmp_path) -> None:
    references = ["the cat sat on the mat", "a dog barks at the moon"]
    run = trainer(
        dataset,
        tmp_path,
        validation=Validation(dataset, ["x", "y"], references, lambda sources: references),
        max_steps=1,
    )
    run.train()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 1
    assert records[1]["bleu"] == pytest.approx(100)
    assert records[1]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|vers")
    assert run.progress.best == pytest.approx(100)


def test_limits(dataset) -> None:
    run = trainer(dataset, max_steps=3)
    run.train()
    assert run.progress.step == 3
    run = trainer(dataset, max_epochs=2)
    run.train()
    assert (run.progress.epoch, run.progress.batch) == (2, 0)
    run = trainer(dataset, max_minutes=0)
    run.train()
    assert run.progress.step == 1


def test_resuming_a_finished_run_changes_nothing(dataset, tmp_path) -> None:
    run = trainer(dataset, tmp_path, max_steps=4)
    run.train()
    again = trainer(dataset, tmp_path, max_steps=4)
    again.resume(list_checkpoints(tmp_path / "checkpoints")[-1])
    again.train()
    assert_same_bits(weights(run), weights(again))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_tokens": 64}, r"max_tokens is 128 there and 64 here"),
        ({"accumulate": 2}, r"accumulate is 1 there and 2 here"),
        ({"seed": 5}, r"seed is 1 there and 5 here"),
    ],
)
def test_resuming_under_other_settings_is_refused(dataset, tmp_path, changed, message) -> None:
    trainer(dataset, tmp_path, max_steps=2).train()
    settings = {"learning_rate": 0.01, "max_tokens": 128, "max_steps": 4} | changed
    model = StandIn()
    run = Trainer(model, dataset, TrainingConfig(**settings), model_config=model.config)
    with pytest.raises(
        CheckpointError, match=rf"training\.json: training cannot resume: {message}"
    ):
        run.resume(tmp_path / "checkpoints" / "step-00000002")


def test_resuming_on_other_data_or_another_model_is_refused(dataset, tmp_path) -> None:
    trainer(dataset, tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoints" / "step-00000002"
    other = ParallelDataset([[4, 5]], [[6]])
    with pytest.raises(CheckpointError, match=r"training data is '\w+' there and '\w+' here"):
        trainer(other, max_steps=4).resume(path)
    model = StandIn(width=8)
    run = Trainer(model, dataset, TrainingConfig(max_steps=4), model_config=model.config)
    with pytest.raises(CheckpointError, match=r"another model: width is 16 there and 8 here"):
        run.resume(path)


def test_a_full_disk_ends_training_and_leaves_the_last_checkpoint(
    dataset, tmp_path, monkeypatch
) -> None:
    run = trainer(dataset, tmp_path, max_steps=20, checkpoint_every=10)
    save_file, calls = checkpoints.save_file, []

    def full_at_the_third(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(*arguments, **keywords)

    monkeypatch.setattr(checkpoints, "save_file", full_at_the_third)
    with pytest.raises(CheckpointError, match=r"step-00000020: cannot write .* No space left"):
        run.train()
    monkeypatch.undo()
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000010"]
    resumed = trainer(dataset, tmp_path, max_steps=20)
    resumed.resume(tmp_path / "checkpoints" / "step-00000010")
    resumed.train()
    whole = trainer(dataset, max_steps=20)
    whole.train()
    assert_same_bits(weights(resumed), weights(whole))


def test_a_loss_that_is_no_number_stops_before_a_checkpoint(dataset, tmp_path) -> None:
    run = trainer(dataset, tmp_path, max_steps=50, checkpoint_every=4)
    hook = run.model.layers[0].register_forward_hook(
        lambda module, inputs, output: output * torch.nan if run.progress.step == 5 else output
    )
    with pytest.raises(TrainingError, match=r"the loss became nan by update 8"):
        run.train()
    hook.remove()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]


def test_bf16_computes_in_bfloat16_and_keeps_fp32_weights(dataset) -> None:
    run = trainer(dataset, max_steps=3, bf16=True)
    seen = []
    run.model.layers[0].register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    run.train()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"one of max_steps, max_epochs and max_minutes must be set"),
        ({"max_steps": 0}, r"max_steps must be at least 1, got 0"),
        ({"max_steps": 1, "warmup_steps": -1}, r"warmup_steps must be at least 0, got -1"),
        ({"max_epochs": 1, "cooldown_steps": 9}, r"cooldown_steps must be 0 without max_steps"),
        ({"max_steps": 1, "learning_rate": 0}, r"learning_rate must be positive, got 0"),
        ({"max_steps": 1, "label_smoothing": 1}, r"label_smoothing must be in \[0, 1\), got 1"),
        ({"max_steps": 1, "average": 9}, r"average must be at most keep_checkpoints = 5, got 9"),
    ],
)
def test_settings_out_of_range(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_validation_without_pairs(dataset) -> None:
    with pytest.raises(ValueError, match="must have held-out pairs, got none"):
        trainer(dataset, max_steps=1).validate()
