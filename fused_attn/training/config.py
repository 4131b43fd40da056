"""How to train, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from .sampling import Sampling, SamplingSchedule


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run.

    An update is one step of the optimiser; a checkpoint is written, and validation runs, every
    ``checkpoint_every`` updates and at the end. Training ends at the first limit that is reached;
    at least one of ``max_steps``, ``max_epochs`` and ``max_minutes`` must be set.

    Attributes:
        learning_rate: Peak of the schedule.
        warmup_steps: Updates until the peak; the rate then falls as 1 / sqrt(update).
        cooldown_steps: Updates before ``max_steps`` in which the rate goes on to zero; 0: none.
        label_smoothing: Probability given to the whole vocabulary instead of the right word.
        max_tokens: Most tokens of the longer side a batch, padding counted.
        accumulate: Batches an update, as if they were one.
        clip_norm: Longest gradient, all parameters together; 0 does not clip.
        weight_decay: Decoupled decay of matrices.
        max_steps: Most updates, those before a resumption included.
        max_epochs: Most passes over the data, likewise.
        max_minutes: Most minutes of this invocation, before the final validation.
        checkpoint_every: Updates between checkpoints; None: one an epoch.
        keep_checkpoints: How many of the latest checkpoints to keep; the best is kept besides.
        average: Give out the mean of the weights of this many latest checkpoints; 1: give out
            the best one, or without validation the last.
        patience: Stop after this many validations without a better score; None: never.
        seed: Of the order of the data. (Initial weights and dropout follow PyTorch's generator.)
        bf16: Compute in bfloat16 where autocast deems it safe; weights and optimiser stay fp32.
        log_every: Updates between lines of the log.
        sampling: How the probability grows with which the decoder reads its own word instead of
            the target's; see ``SamplingSchedule``.
        sampling_decay: In how many updates, roughly.
        sampling_start: Updates of teacher forcing before.
        sampling_limit: The highest probability.
        guided_attention: Weight of ``guided_attention_loss``; 0: none.
        coverage_loss: Weight of ``attention_coverage_loss``; 0: none.

    Raises:
        ValueError: A value is out of range.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 2000
    cooldown_steps: int = 0
    label_smoothing: float = 0.1
    max_tokens: int = 4096
    accumulate: int = 1
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    max_steps: int | None = None
    max_epochs: int | None = None
    max_minutes: float | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 5
    average: int = 1
    patience: int | None = None
    seed: int = 1
    bf16: bool = False
    log_every: int = 100
    sampling: Sampling = "none"
    sampling_decay: float = 10_000.0
    sampling_start: int = 0
    sampling_limit: float = 1.0
    guided_attention: float = 0.0
    coverage_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "max_tokens",
            "accumulate",
            "max_steps",
            "max_epochs",
            "checkpoint_every",
            "keep_checkpoints",
            "average",
            "patience",
            "log_every",
        ):
            self._at_least(name, 1)
        for name in (
            "warmup_steps",
            "cooldown_steps",
            "clip_norm",
            "weight_decay",
            "max_minutes",
            "seed",
            "guided_attention",
            "coverage_loss",
        ):
            self._at_least(name, 0)
        self.sampling_schedule()
        if not self.learning_rate > 0:
            raise ValueError(
                f"TrainingConfig: learning_rate must be positive, got {self.learning_rate}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"TrainingConfig: label_smoothing must be in [0, 1), got {self.label_smoothing}"
            )
        if self.average > self.keep_checkpoints:
            raise ValueError(
                f"TrainingConfig: average must be at most keep_checkpoints = "
                f"{self.keep_checkpoints}, got {self.average}"
            )
        if self.cooldown_steps and self.max_steps is None:
            raise ValueError(
                f"TrainingConfig: cooldown_steps must be 0 without max_steps, got "
                f"{self.cooldown_steps}"
            )
        if self.max_steps is None and self.max_epochs is None and self.max_minutes is None:
            raise ValueError(
                "TrainingConfig: one of max_steps, max_epochs and max_minutes must be set, got none"
            )

    def sampling_schedule(self) -> SamplingSchedule:
        """Return the probability of scheduled sampling as a function of the update."""
        return SamplingSchedule(
            self.sampling, self.sampling_decay, self.sampling_start, self.sampling_limit
        )

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is not None and not value >= low:
            raise ValueError(f"TrainingConfig: {name} must be at least {low}, got {value}")
