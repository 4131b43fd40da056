"""Scheduled sampling: a decoder that in training sometimes reads its own words.

Teacher forcing shows a decoder nothing but right prefixes; in use it reads what it said itself.
Scheduled sampling replaces words of the target's prefix by the model's own, rarely at first.

References: Bengio et al., 2015, https://arxiv.org/abs/1506.03099; in two parallel passes, for a
decoder that reads all of its prefix at once: Mihaylova and Martins, 2019,
https://arxiv.org/abs/1906.07651
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .data import Batch
    from .loss import Seq2SeqModel

Sampling = Literal["none", "linear", "exponential", "inverse_sigmoid"]


@dataclass(frozen=True)
class SamplingSchedule:
    """Probability with which a word of the prefix is the model's own, by the update.

    It is 0 until ``start``. Then, with i the updates since, k = ``decay``, and e(i) the probability
    of reading the right word,

        none             e(i) = 1
        linear           e(i) = max(0, 1 - i / k)
        exponential      e(i) = exp(-i / k)
        inverse_sigmoid  e(i) = k / (k + exp(i / k))

    it is min(``limit``, 1 - e(i)): a function of the update alone, so that a run which is resumed
    goes on with it. (The base of the exponential, k in the paper, is exp(-1 / k) here.)

    Attributes:
        kind: The form.
        decay: k, in updates, above 0.
        start: Updates of teacher forcing before.
        limit: The highest probability, in 0..1.

    Raises:
        ValueError: A value is out of range.
    """

    kind: Sampling = "none"
    decay: float = 10_000.0
    start: int = 0
    limit: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Sampling):
            raise ValueError(
                f"SamplingSchedule: kind must be one of {', '.join(get_args(Sampling))}, got "
                f"{self.kind!r}"
            )
        if not self.decay > 0:
            raise ValueError(f"SamplingSchedule: decay must be positive, got {self.decay}")
        if self.start < 0:
            raise ValueError(f"SamplingSchedule: start must not be negative, got {self.start}")
        if not 0 <= self.limit <= 1:
            raise ValueError(f"SamplingSchedule: limit must be in [0, 1], got {self.limit}")

    def __call__(self, step: int) -> float:
        """Return the probability of an update, counted from 1."""
        updates = step - 1 - self.start
        if self.kind == "none" or updates < 0:
            return 0.0
        x = updates / self.decay
        if self.kind == "linear":
            right = max(0.0, 1.0 - x)
        elif self.kind == "exponential":
            right = math.exp(-x)
        else:
            right = self.decay / (self.decay + math.exp(min(x, 700.0)))
        return min(self.limit, 1.0 - right)


@torch.no_grad()
def mix_predictions(model: Seq2SeqModel, batch: Batch, probability: float) -> Tensor:
    """Return what the decoder reads in the second of two passes.

    The first pass is teacher forced and has no gradient. Each word that the second pass reads is,
    with the given probability and independently of the others, the likeliest word at its place in
    the first pass, else the target's; the token that begins a target stays. Draws come from
    PyTorch's generator of the batch's device.

    Args:
        model: The model, as ``translation_loss`` takes it.
        batch: The sentence pairs, on the model's device.
        probability: In 0..1. At 0 nothing is drawn or computed.

    Returns:
        ``[B, T]`` int64; ``batch.target_input`` itself at probability 0.
    """
    target = batch.target_input
    if probability == 0.0:
        return target
    hidden = model.decode(batch.source, target, batch.source_lengths, batch.target_lengths)
    # What was predicted at position t is read at t + 1.
    predicted = model.project(hidden[:, :-1]).argmax(dim=-1)  # [B, T - 1]
    is_own = torch.rand(predicted.shape, device=predicted.device) < probability
    return torch.cat([target[:, :1], torch.where(is_own, predicted, target[:, 1:])], dim=1)
