from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from fused_attn.training import checkpoint as checkpoints
from fused_attn.training.checkpoint import (
    TrainingState,
    Vocabularies,
    average_weights,
    check_config,
    find_model,
    link_directory,
    list_checkpoints,
    load_config,
    load_training_state,
    load_vocabularies,
    load_weights,
    replace_directory,
    save_checkpoint,
)
from fused_attn.training.errors import CheckpointError
from fused_attn.training.text import Vocabulary

from .stand_in import StandIn


@pytest.fixture(scope="module")
def vocabularies() -> Vocabularies:
    joint = Vocabulary.train(["abcdefgh"], 100, model_type="char")
    return Vocabularies(joint, joint)


def save(path, model: StandIn, vocabularies=None, **keywords) -> None:
    save_checkpoint(
        path,
        config=model.config,
        weights=model.state_dict(),
        vocabularies=vocabularies,
        step=7,
        **keywords,
    )


def snapshot(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_saved_is_read(tmp_path, vocabularies) -> None:
    model, other = StandIn(), StandIn()
    state = TrainingState({"progress": {"step": 7}}, {"moment": torch.arange(3.0)})
    save(tmp_path / "c", model, vocabularies, training=state)
    assert load_config(tmp_path / "c") == (model.config, 7)
    other.load_state_dict(load_weights(tmp_path / "c", other.state_dict()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    read = load_vocabularies(tmp_path / "c")
    assert read == vocabularies
    assert read.source is read.target
    restored = load_training_state(tmp_path / "c")
    assert restored.values == state.values
    assert torch.equal(restored.tensors["moment"], torch.arange(3.0))


def test_tied_weights_are_stored_once(tmp_path) -> None:
    model = StandIn(vocabulary=1000, width=64)
    save(tmp_path / "c", model)
    bare = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert (tmp_path / "c" / "model.safetensors").stat().st_size < bare + 4096
    assert set(load_weights(tmp_path / "c", model.state_dict())) == set(model.state_dict())


def test_saving_replaces_a_checkpoint(tmp_path) -> None:
    first, second = StandIn(), StandIn()
    save(tmp_path / "c", first)
    save(tmp_path / "c", second)
    weights = load_weights(tmp_path / "c", second.state_dict())
    assert torch.equal(weights["layers.0.weight"], second.layers[0].weight)
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("failing", ["write_text", "write_bytes", "save_file", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path, monkeypatch, vocabularies, failing
) -> None:
    save(tmp_path / "c", StandIn(), vocabularies)
    before = snapshot(tmp_path / "c")

    def full(*arguments, **keywords):
        if failing == "save_file":
            (tmp_path / ".c.partial" / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"save_file": checkpoints, "fsync": os}.get(failing, checkpoints.Path)
    monkeypatch.setattr(owner, failing, full)
    message = r"c: cannot write the checkpoint: No space left on device; earlier checkpoints are"
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "c", StandIn(), vocabularies)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["c"]
    assert snapshot(tmp_path / "c") == before


def test_the_system_refuses_a_write(tmp_path) -> None:
    """A limit on file size makes the real writers fail midway, as a full disk does."""
    save(tmp_path / "c", StandIn())
    before = snapshot(tmp_path / "c")
    program = """
import resource, sys, torch
from fused_attn.training import CheckpointError, save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    save_checkpoint(
        sys.argv[1], config={}, weights={"w": torch.zeros(9999)}, vocabularies=None, step=1
    )
except CheckpointError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "c: cannot write the checkpoint: " in run.stdout
    assert "File too large" in run.stdout
    assert os.listdir(tmp_path) == ["c"]
    assert snapshot(tmp_path / "c") == before


def interrupted_save(path) -> None:
    with replace_directory(path) as directory:
        (directory / "config.json").write_text("half")
        raise KeyboardInterrupt


def test_an_interruption_leaves_the_old_checkpoint(tmp_path) -> None:
    save(tmp_path / "c", StandIn())
    before = snapshot(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        interrupted_save(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert snapshot(tmp_path / "c") == before


def test_a_place_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/c: cannot write the checkpoint"):
        save(tmp_path / "file" / "c", StandIn())


def test_another_model_is_refused_with_every_difference(tmp_path) -> None:
    save(tmp_path / "c", StandIn(vocabulary=40, width=16))
    message = (
        r"c/config\.json: checkpoint of another model: vocabulary is 40 there and 50 here; "
        r"width is 16 there and 8 here"
    )
    with pytest.raises(CheckpointError, match=message):
        check_config(tmp_path / "c", {"vocabulary": 50, "width": 8})
    check_config(tmp_path / "c", {"vocabulary": 40, "width": 16})


def test_other_weights_are_refused(tmp_path) -> None:
    save(tmp_path / "c", StandIn())
    state = StandIn().state_dict()
    shape = r"c/model\.safetensors: checkpoint of another model: 'layers.0.bias' has shape \[16\]"
    with pytest.raises(CheckpointError, match=shape):
        load_weights(tmp_path / "c", state | {"layers.0.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"another model: it has no 'more'"):
        load_weights(tmp_path / "c", state | {"more": torch.zeros(3)})
    del state["layers.0.bias"]
    with pytest.raises(CheckpointError, match=r"it has 'layers.0.bias', which this model has not"):
        load_weights(tmp_path / "c", state)


def test_damaged_checkpoints_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"c/config\.json: no such file; .*c is no check"):
        load_config(tmp_path / "c")
    save(tmp_path / "c", StandIn())
    weights = tmp_path / "c" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"c/model\.safetensors: cannot read"):
        load_weights(tmp_path / "c", StandIn().state_dict())
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"c/model\.safetensors: no such file"):
        load_weights(tmp_path / "c", StandIn().state_dict())
    with pytest.raises(CheckpointError, match=r"source\.spm: cannot read: No such file"):
        load_vocabularies(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"training\.json: absent: .* not a training run"):
        load_training_state(tmp_path / "c")
    config = tmp_path / "c" / "config.json"
    for content, message in (
        ("{", "not JSON"),
        ("[]", "must hold a JSON object"),
        (json.dumps({"format": 9, "model": {}}), "not a checkpoint of format 1, got format 9"),
    ):
        config.write_text(content)
        with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
            load_config(tmp_path / "c")


def test_average_is_the_mean(tmp_path) -> None:
    models = [StandIn() for _ in range(3)]
    for index, model in enumerate(models):
        save(tmp_path / str(index), model)
    mean = average_weights([tmp_path / str(index) for index in range(3)])
    for name, tensor in mean.items():
        expected = sum(model.state_dict()[name] for model in models) / 3
        torch.testing.assert_close(tensor, expected)
    with pytest.raises(ValueError, match="at least one checkpoint, got none"):
        average_weights([])


def test_links_are_replaced_in_one_step(tmp_path) -> None:
    for step in (10, 9, 200):
        save(tmp_path / "checkpoints" / f"step-{step:08d}", StandIn())
        link_directory(tmp_path / "best", tmp_path / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "checkpoints" / ".step-00000300.partial").mkdir()
    found = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step-00000009", "step-00000010", "step-00000200"]
    assert os.readlink(tmp_path / "best") == "checkpoints/step-00000200"
    assert find_model(tmp_path) == found[-1]
    link_directory(tmp_path / "model", found[0])
    assert find_model(tmp_path) == tmp_path / "model"
    assert find_model(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(CheckpointError, match=r"neither a checkpoint nor the directory of a tr"):
        find_model(tmp_path / "checkpoints")
