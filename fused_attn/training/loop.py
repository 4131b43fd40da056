"""The training loop: updates, validation, checkpoints, and resuming where it stopped."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import (
    BEST_LINK,
    CHECKPOINTS,
    MODEL_LINK,
    TrainingState,
    Vocabularies,
    average_weights,
    check_config,
    checkpoint_name,
    link_directory,
    list_checkpoints,
    load_training_state,
    load_weights,
    remove_checkpoint,
    save_checkpoint,
)
from .config import TrainingConfig
from .data import Dataset, TokenBatches
from .errors import CheckpointError
from .loss import Losses, Seq2SeqModel, training_losses, translation_loss
from .metrics import corpus_bleu
from .optimizer import InverseSquareRoot, build_optimizer

LOG_FILE = "log.jsonl"


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or its gradient is no longer a number."""


@dataclass(frozen=True)
class Validation:
    """Held-out pairs, and how to translate them.

    Attributes:
        dataset: The pairs as tokens, for the loss.
        sources: The sources, for BLEU: sentences, or whatever ``translate`` takes.
        references: Their translations.
        translate: Translates sentences with the model in training; None leaves BLEU out.
        tokenization: sacreBLEU's, ``13a`` or ``zh``.
    """

    dataset: Dataset
    sources: Sequence[Any] = ()
    references: Sequence[str] = ()
    translate: Callable[[Sequence[Any]], list[str]] | None = None
    tokenization: str = "13a"


@dataclass
class Progress:
    """Where a run stands: counters that a checkpoint saves and a resumption restores.

    Attributes:
        step: Updates done.
        epoch: Passes over the data completed.
        batch: Batches done of the present pass.
        best: Best validation score so far, larger is better: BLEU, or minus the loss.
        best_step: The update that had it.
        worse: Validations since then.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -math.inf
    best_step: int = 0
    worse: int = 0


@dataclass
class _Window:
    """What happened since the last line of the log."""

    started: float = field(default_factory=time.perf_counter)
    updates: int = 0
    tokens: int = 0
    loss: Tensor | float = 0.0
    guided_attention: Tensor | float = 0.0
    coverage: Tensor | float = 0.0
    gradient_norm: Tensor | float = 0.0

    def add(self, losses: Losses) -> None:
        """Enter the losses of a batch; of those that are not asked for, nothing."""
        self.loss = self.loss + losses.translation.detach()
        if losses.guided_attention is not None:
            self.guided_attention = self.guided_attention + losses.guided_attention.detach()
        if losses.coverage is not None:
            self.coverage = self.coverage + losses.coverage.detach()

    def check_finite(self, step: int) -> None:
        """Raise TrainingError when a loss or gradient was infinite or NaN."""
        for name, value in (("loss", self.loss), ("gradient", self.gradient_norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name} became {float(value)} by update {step}: lower the learning rate "
                    "or lengthen the warm-up; earlier checkpoints are unharmed"
                )


class Trainer:
    """Trains a sequence-to-sequence model on a dataset.

    Args:
        model: The model, on its device. It must have ``decode`` and ``project``, or ``outputs``
            and ``target_nll``; see ``Seq2SeqModel``.
        dataset: The pairs to learn from.
        config: How to train.
        model_config: The model's configuration as plain values, stored in every checkpoint.
        vocabularies: Stored in every checkpoint.
        directory: Where to write checkpoints and the log; None writes nothing.
        validation: Held-out pairs; None validates nothing.
        progress: Show a progress bar on standard error.
        report: Receives one line of text now and then. Default: standard error.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainingConfig,
        *,
        model_config: Mapping[str, Any],
        vocabularies: Vocabularies | None = None,
        directory: str | Path | None = None,
        validation: Validation | None = None,
        progress: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.config = config
        self.progress = Progress()
        self._model_config = dict(model_config)
        self._vocabularies = vocabularies
        self._directory = None if directory is None else Path(directory)
        self._validation = validation
        self._show_bar = progress
        self._report = report or _report_to_standard_error
        self._device = next(model.parameters()).device
        self._batches = TokenBatches(dataset, max_tokens=config.max_tokens, seed=config.seed)
        self._optimizer = build_optimizer(model, weight_decay=config.weight_decay)
        self._schedule = InverseSquareRoot(
            config.learning_rate,
            config.warmup_steps,
            cooldown_steps=config.cooldown_steps,
            last_step=config.max_steps,
        )
        self._sampling = config.sampling_schedule()
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]

    def train(self) -> None:
        """Train until a limit is reached, then give out the model.

        With a directory, it then holds ``model``, a link to the checkpoint to use: the average
        of the last ones, the best, or the last; see ``TrainingConfig.average``.

        Raises:
            TrainingError: The loss or its gradient became infinite or NaN. No checkpoint is
                written of that.
            CheckpointError: A checkpoint cannot be written.
        """
        self.model.train()
        limit = self.config.max_minutes
        deadline = math.inf if limit is None else time.monotonic() + 60 * limit
        window = _Window()
        with tqdm(
            total=self.config.max_steps,
            initial=self.progress.step,
            unit=" updates",
            desc="train",
            disable=not self._show_bar,
        ) as bar:
            for ends_epoch, batches in () if self._at_limit() else self._groups():
                self._update(batches, window)
                bar.update()
                step = self.progress.step
                stop = self._at_limit() or time.monotonic() >= deadline
                if step % self.config.log_every == 0 or stop:
                    self._log_window(window, bar)
                    window = _Window()
                every = self.config.checkpoint_every
                if stop or (ends_epoch if every is None else step % every == 0):
                    window.check_finite(step)
                    began = time.perf_counter()
                    patient = self._validate()
                    self._save()
                    window.started += time.perf_counter() - began
                    if stop or not patient:
                        break
        self._give_out()

    def resume(self, checkpoint: str | Path) -> None:
        """Go on from a checkpoint as if training had not stopped.

        Parameters, optimiser, random number generators and position in the data are restored, so
        the parameters after N more updates have the bits they would have had (on one machine,
        with one number of threads).

        Raises:
            CheckpointError: The checkpoint is damaged, of another model, of other data, or of
                settings that change what an update is.
        """
        path = Path(checkpoint)
        check_config(path, self._model_config)
        state = load_training_state(path)
        for name, expected in self._invariants().items():
            saved = state.values["invariants"].get(name)
            if saved != expected:
                raise CheckpointError(
                    f"{path / 'training.json'}: training cannot resume: {name} is {saved!r} there "
                    f"and {expected!r} here"
                )
        self.model.load_state_dict(load_weights(path, self.model.state_dict()))
        self.progress = Progress(**state.values["progress"])
        self._load_optimizer(state.tensors)
        torch.set_rng_state(state.tensors["random.cpu"])
        if self._device.type == "cuda" and "random.cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["random.cuda"], self._device)

    def _at_limit(self) -> bool:
        steps, epochs = self.config.max_steps, self.config.max_epochs
        return (steps is not None and self.progress.step >= steps) or (
            epochs is not None and self.progress.epoch >= epochs
        )

    def _groups(self) -> Iterator[tuple[bool, list[np.ndarray]]]:
        """Yield the batches of each update, and whether an epoch ends with it.

        The position is advanced before the update is yielded, so that a checkpoint taken after
        it resumes with the next.
        """
        while True:
            batches = self._batches.epoch(self.progress.epoch)
            while self.progress.batch < len(batches):
                start = self.progress.batch
                group = batches[start : start + self.config.accumulate]
                ends_epoch = start + len(group) == len(batches)
                self.progress.batch = 0 if ends_epoch else start + len(group)
                self.progress.epoch += ends_epoch
                yield ends_epoch, group
                if ends_epoch:
                    break

    def _update(self, groups: Sequence[np.ndarray], window: _Window) -> None:
        """Do one update and enter it in the window."""
        config = self.config
        batches = [self.dataset.batch(indices).to(self._device) for indices in groups]
        tokens = sum(batch.target_tokens for batch in batches)
        for batch in batches:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=config.bf16):
                losses = training_losses(
                    cast(Seq2SeqModel, self.model),
                    batch,
                    label_smoothing=config.label_smoothing,
                    sampling_probability=self._sampling(self.progress.step + 1),
                    guided_attention=config.guided_attention,
                    coverage_loss=config.coverage_loss,
                )
            (losses.total / tokens).backward()
            window.add(losses)
        # Also measured when not clipped: training stops when it is no number.
        window.gradient_norm = window.gradient_norm + nn.utils.clip_grad_norm_(
            self._parameters, config.clip_norm or math.inf
        )
        self.progress.step += 1
        rate = self._schedule(self.progress.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        window.tokens += tokens
        window.updates += 1

    def _log_window(self, window: _Window, bar: tqdm) -> None:
        window.check_finite(self.progress.step)
        loss = float(window.loss) / window.tokens
        speed = window.tokens / (time.perf_counter() - window.started)
        rate = self._schedule(self.progress.step)
        config = self.config
        extra: dict[str, float] = {}
        if config.guided_attention:
            extra["guided_attention"] = float(window.guided_attention) / window.tokens
        if config.coverage_loss:
            extra["coverage_loss"] = float(window.coverage) / window.tokens
        if config.sampling != "none":
            extra["sampling_probability"] = self._sampling(self.progress.step)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, lr {rate:.2e}")
        if not self._show_bar:
            more = "".join(
                f"  {name.replace('_', ' ')} {value:.4f}" for name, value in extra.items()
            )
            self._report(
                f"update {self.progress.step}  epoch {self.progress.epoch}  loss {loss:.4f}{more}  "
                f"{speed:,.0f} tokens/s  lr {rate:.3e}"
            )
        self._log(
            loss=loss,
            **extra,
            gradient_norm=float(window.gradient_norm) / window.updates,
            tokens_per_second=round(speed),
            learning_rate=rate,
        )

    def _validate(self) -> bool:
        """Validate; return whether training shall go on."""
        if self._validation is None:
            return True
        scores = self.validate()
        progress = self.progress
        score = scores.get("bleu", -scores["valid_loss"])
        if score > progress.best:
            progress.best, progress.best_step, progress.worse = score, progress.step, 0
        else:
            progress.worse += 1
        return self.config.patience is None or progress.worse < self.config.patience

    def validate(self) -> dict[str, Any]:
        """Return loss and perplexity a token, and BLEU, on the held-out pairs, and log them.

        Raises:
            ValueError: The trainer has no held-out pairs.
        """
        validation = self._validation
        if validation is None:
            raise ValueError("Trainer.validate: the trainer must have held-out pairs, got none")
        loss = mean_loss(
            self.model, validation.dataset, max_tokens=self.config.max_tokens, bf16=self.config.bf16
        )
        scores: dict[str, Any] = {"valid_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        line = f"update {self.progress.step}  valid loss {loss:.4f}  perplexity "
        line += f"{scores['perplexity']:.2f}"
        if validation.translate is not None:
            bleu = corpus_bleu(
                validation.translate(validation.sources),
                validation.references,
                tokenization=validation.tokenization,
            )
            scores |= {"bleu": bleu.score, "signature": bleu.signature}
            line += f"  {bleu}"
        self._report(line)
        self._log(**scores)
        return scores

    def _save(self) -> None:
        if self._directory is None:
            return
        folder = self._directory / CHECKPOINTS
        path = folder / checkpoint_name(self.progress.step)
        save_checkpoint(
            path,
            config=self._model_config,
            weights=self.model.state_dict(),
            vocabularies=self._vocabularies,
            step=self.progress.step,
            training=self._training_state(),
        )
        best = folder / checkpoint_name(self.progress.best_step)
        if best.exists():
            link_directory(self._directory / BEST_LINK, best)
        for old in list_checkpoints(folder)[: -self.config.keep_checkpoints]:
            if old != best:
                remove_checkpoint(old)

    def _give_out(self) -> None:
        """Link the checkpoint to use as ``model``, averaging the last ones when asked."""
        if self._directory is None:
            return
        folder = self._directory / CHECKPOINTS
        path = folder / checkpoint_name(self.progress.step)
        if self.config.average > 1:
            latest = list_checkpoints(folder)[-self.config.average :]
            self.model.load_state_dict(average_weights(latest))
            path = folder / f"average-{checkpoint_name(self.progress.step)}"
            save_checkpoint(
                path,
                config=self._model_config,
                weights=self.model.state_dict(),
                vocabularies=self._vocabularies,
                step=self.progress.step,
            )
            self._report(f"averaged {len(latest)} checkpoints, {latest[0].name} to the last")
            if self._validation is not None:
                self.validate()
        elif self._validation is not None:
            best = folder / checkpoint_name(self.progress.best_step)
            self.model.load_state_dict(load_weights(best, self.model.state_dict()))
            path = best
        link_directory(self._directory / MODEL_LINK, path)
        self._report(f"model: {self._directory / MODEL_LINK} -> {path.name}")

    def _training_state(self) -> TrainingState:
        tensors = {"random.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self._device)
        for name, parameter in self.model.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().contiguous()
        values = {
            "progress": asdict(self.progress),
            "invariants": self._invariants(),
            "settings": asdict(self.config),
        }
        return TrainingState(values, tensors)

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".", 2)
                by_name.setdefault(name, {})[slot] = value
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = self._optimizer.param_groups
        order = [parameter for group in groups for parameter in group["params"]]
        state = {
            index: by_name[names[parameter]]
            for index, parameter in enumerate(order)
            if names[parameter] in by_name
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _invariants(self) -> dict[str, Any]:
        """Return what must not change for the position in the data to mean the same."""
        return {
            "training data": self.dataset.fingerprint(),
            "max_tokens": self.config.max_tokens,
            "accumulate": self.config.accumulate,
            "seed": self.config.seed,
        }

    def _log(self, **values: Any) -> None:
        if self._directory is None:
            return
        record = {"step": self.progress.step, "epoch": self.progress.epoch} | values
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(self._directory / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self._directory / LOG_FILE}: cannot write: {error.strerror}"
            ) from error


@torch.inference_mode()
def mean_loss(
    model: nn.Module, dataset: Dataset, *, max_tokens: int = 4096, bf16: bool = False
) -> float:
    """Return the cross-entropy a target token, in nats, without label smoothing or dropout."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for indices in TokenBatches(dataset, max_tokens=max_tokens, seed=0).in_order():
            batch = dataset.batch(indices).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                total += float(translation_loss(cast(Seq2SeqModel, model), batch))
            tokens += batch.target_tokens
    finally:
        model.train(training)
    return total / tokens


def _report_to_standard_error(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
