"""Checkpoints: directories that are complete or absent.

    step-00002000/
      config.json           what the model is, and the update it was saved at
      model.safetensors     its weights
      source.spm            its vocabularies (SentencePiece models)
      target.spm
      training.json         position in the data and best score      } only where training
      training.safetensors  optimiser moments, random number state   } can resume

A training run is a directory with its checkpoints in ``checkpoints``, ``best`` linked to the one
that scored best in validation, and, once it ended, ``model`` linked to the one to use.

A checkpoint is written beside its place, flushed to the disk and renamed into place. Whatever
interrupts the writing, a full disk or a lost machine, earlier checkpoints stay as they were.
Nothing in a checkpoint is executed when it is read: there is no pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError
from .text import Vocabulary

FORMAT = 1

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SOURCE_VOCABULARY_FILE = "source.spm"
TARGET_VOCABULARY_FILE = "target.spm"
TRAINING_FILE = "training.json"
TRAINING_TENSORS_FILE = "training.safetensors"

CHECKPOINTS = "checkpoints"
BEST_LINK = "best"
MODEL_LINK = "model"

_PREFIX = "step-"


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies of the two sides; the same object twice when they are shared."""

    source: Vocabulary
    target: Vocabulary


@dataclass(frozen=True)
class TrainingState:
    """What training needs, besides the weights, to go on as if it had not stopped.

    Attributes:
        values: Plain values: position in the data, best score, settings that must not change.
        tensors: Optimiser moments and random number generator state.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Give a fresh directory to write into, which becomes ``path`` when the block ends well.

    The files are flushed to the disk before the rename. When the block raises, nothing is left
    behind and ``path`` is as before.

    Raises:
        CheckpointError: The directory cannot be written, with the system's reason.
    """
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        yield partial
        for name in os.listdir(partial):
            _flush(partial / name)
        _flush(partial)
        if path.exists():
            # A directory cannot be renamed onto another: the old one steps aside first.
            _remove(replaced)
            path.rename(replaced)
        partial.rename(path)
        _flush(path.parent)
        _remove(replaced)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        reason = error.strerror if isinstance(error, OSError) else None
        raise CheckpointError(
            f"{path}: cannot write the checkpoint: {reason or error}; earlier checkpoints are "
            "unharmed"
        ) from error
    except BaseException:
        _remove(partial)
        raise


def save_checkpoint(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    vocabularies: Vocabularies | None,
    step: int,
    training: TrainingState | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all.

    Args:
        path: The directory; one that exists is replaced.
        config: The model's configuration, plain values.
        weights: The model's ``state_dict``. Tensors that share memory (tied embeddings) are
            stored once.
        vocabularies: The vocabularies, or None for a model on bare token ids.
        step: The update the weights are from.
        training: What resuming needs, or None for a model that is only to be used.

    Raises:
        CheckpointError: The directory cannot be written; the message names it.
    """
    with replace_directory(Path(path)) as directory:
        _write_json(
            directory / CONFIG_FILE, {"format": FORMAT, "step": step, "model": dict(config)}
        )
        distinct, aliases = _without_shared(weights)
        save_file(distinct, directory / WEIGHTS_FILE, metadata={"aliases": json.dumps(aliases)})
        if vocabularies is not None:
            (directory / SOURCE_VOCABULARY_FILE).write_bytes(vocabularies.source.model)
            (directory / TARGET_VOCABULARY_FILE).write_bytes(vocabularies.target.model)
        if training is not None:
            _write_json(directory / TRAINING_FILE, training.values)
            save_file(training.tensors, directory / TRAINING_TENSORS_FILE)


def load_config(path: str | Path) -> tuple[dict[str, Any], int]:
    """Read a checkpoint's model configuration and the update it was saved at.

    Raises:
        CheckpointError: The directory is no checkpoint.
    """
    file = Path(path) / CONFIG_FILE
    content = _read_json(file)
    if content.get("format") != FORMAT or not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f"{file}: not a checkpoint of format {FORMAT}, got format {content.get('format')!r}"
        )
    return content["model"], int(content["step"])


def check_config(path: str | Path, expected: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of a model with this configuration.

    Raises:
        CheckpointError: It is of another; the message names the file and every difference.
    """
    saved, _ = load_config(path)
    differences = [
        f"{name} is {saved.get(name)!r} there and {expected.get(name)!r} here"
        for name in sorted({*saved, *expected})
        if saved.get(name) != expected.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{Path(path) / CONFIG_FILE}: checkpoint of another model: {'; '.join(differences)}"
        )


def load_weights(path: str | Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights of a checkpoint for a model.

    Args:
        path: The checkpoint directory.
        expected: The model's ``state_dict``, whose names and shapes the file must have.

    Returns:
        A ``state_dict`` on the CPU with exactly the expected names.

    Raises:
        CheckpointError: The file cannot be read, or holds another model's weights; the message
            names the file and the first difference.
    """
    file = Path(path) / WEIGHTS_FILE
    weights = _read_tensors(file)
    for name, tensor in expected.items():
        if name not in weights:
            raise CheckpointError(f"{file}: checkpoint of another model: it has no {name!r}")
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: checkpoint of another model: {name!r} has shape "
                f"{list(weights[name].shape)} there and {list(tensor.shape)} here"
            )
    for name in weights:
        if name not in expected:
            raise CheckpointError(
                f"{file}: checkpoint of another model: it has {name!r}, which this model has not"
            )
    return weights


def load_vocabularies(path: str | Path) -> Vocabularies:
    """Read the vocabularies of a checkpoint.

    Raises:
        CheckpointError: They are absent or damaged.
    """
    source = Vocabulary.load(Path(path) / SOURCE_VOCABULARY_FILE)
    target = Vocabulary.load(Path(path) / TARGET_VOCABULARY_FILE)
    return Vocabularies(source, source if source == target else target)


def load_training_state(path: str | Path) -> TrainingState:
    """Read what training needs to go on from a checkpoint.

    Raises:
        CheckpointError: The checkpoint holds a model only, or is damaged.
    """
    file = Path(path) / TRAINING_FILE
    if not file.exists():
        raise CheckpointError(
            f"{file}: absent: this checkpoint holds a model to use, not a training run to resume"
        )
    return TrainingState(_read_json(file), _read_tensors(Path(path) / TRAINING_TENSORS_FILE))


def average_weights(paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the mean of the weights of several checkpoints of one model.

    Sums are kept in fp64 and rounded once. Of counters, which are integers, the largest is taken.

    Raises:
        CheckpointError: A checkpoint cannot be read or is of another model.
        ValueError: No checkpoint is given.

    Reference: Vaswani et al., 2017, section 6.1. https://arxiv.org/abs/1706.03762
    """
    if not paths:
        raise ValueError("average_weights: paths must name at least one checkpoint, got none")
    expected = _read_tensors(Path(paths[0]) / WEIGHTS_FILE)
    floating = {name for name, tensor in expected.items() if tensor.is_floating_point()}
    totals = {n: t.double() if n in floating else t for n, t in expected.items()}
    for path in paths[1:]:
        for name, tensor in load_weights(path, expected).items():
            total = totals[name]
            totals[name] = total + tensor if name in floating else torch.maximum(total, tensor)
    return {
        name: (total / len(paths)).to(expected[name].dtype) if name in floating else total
        for name, total in totals.items()
    }


def checkpoint_name(step: int) -> str:
    """Return the directory name of a training run's checkpoint."""
    return f"{_PREFIX}{step:08d}"


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Return the checkpoints of a training run, oldest first.

    Only complete ones exist, by construction.
    """
    found = Path(directory).glob(f"{_PREFIX}*")
    return sorted(path for path in found if path.name.removeprefix(_PREFIX).isdigit())


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; interrupted at any moment, it leaves no incomplete one."""
    doomed = path.with_name(f".{path.name}.removed")
    path.rename(doomed)
    _remove(doomed)


def find_model(path: str | Path) -> Path:
    """Return the checkpoint that a path means.

    That is the path itself when it is a checkpoint. In the directory of a training run it is
    what the run gave out at its end, or the latest checkpoint of a run that did not end yet.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    path = Path(path)
    if (path / CONFIG_FILE).exists():
        return path
    if (path / MODEL_LINK / CONFIG_FILE).exists():
        return path / MODEL_LINK
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    if checkpoints:
        return checkpoints[-1]
    raise CheckpointError(f"{path}: neither a checkpoint nor the directory of a training run")


def link_directory(link: Path, target: Path) -> None:
    """Make ``link`` a symbolic link to a directory beside or below it, in one step.

    Raises:
        CheckpointError: The link cannot be made.
    """
    partial = link.with_name(f".{link.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        partial.replace(link)
    except OSError as error:
        raise CheckpointError(f"{link}: cannot link to {target}: {error.strerror}") from error


def _without_shared(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into distinct tensors and names that mean one of them."""
    distinct: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in owner:
            aliases[name] = owner[key]
        else:
            owner[key] = name
            distinct[name] = tensor.detach().contiguous()
    return distinct, aliases


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; {file.parent} is no checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return content


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            aliases = json.loads((opened.metadata() or {}).get("aliases", "{}"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; {file.parent} is no checkpoint") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot read: {error}") from error
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}
