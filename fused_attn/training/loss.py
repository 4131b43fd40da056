"""The training objective: label-smoothed cross-entropy over the positions that are words.

To it come, where asked for, losses on where the model looks: guided attention and coverage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batch
from .sampling import mix_predictions

GUIDED_ATTENTION_WIDTH = 0.2
"""g of guided attention: how far from the diagonal, as a part of the whole, costs little."""


class Seq2SeqModel(Protocol):
    """What the objective needs of a model: states first, vocabulary scores apart.

    A model may have instead, as ``fused_attn.models.RNNSeq2Seq`` has,

    - ``outputs(source, target, source_lengths, target_lengths, *, sampling_probability)``, which
      returns an object whose ``attention`` is where each target position looked, ``[B, T, S]``, or
      None, and
    - ``target_nll(outputs, source, target_output, source_lengths, rows, *, label_smoothing)``,
      the cross-entropy summed over those rows of ``target_output.flatten()``.

    Then these are used. What copies words needs them, and every loss on the attention.
    """

    def decode(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the decoder's states ``[B, T, E]`` for teacher-forced targets."""
        ...

    def project(self, hidden: Tensor) -> Tensor:
        """Return the scores ``[..., V]`` of states ``[..., E]``."""
        ...


@dataclass(frozen=True)
class Losses:
    """The parts of the objective, each a scalar in fp32, summed over the batch's target positions.

    Attributes:
        total: What is minimised: the sum of the parts by their weights.
        translation: Cross-entropy, smoothed.
        guided_attention: Without its weight; None where that is 0.
        coverage: Likewise.
    """

    total: Tensor
    translation: Tensor
    guided_attention: Tensor | None = None
    coverage: Tensor | None = None


def training_losses(
    model: Any,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    sampling_probability: float = 0.0,
    guided_attention: float = 0.0,
    coverage_loss: float = 0.0,
) -> Losses:
    """The objective of a batch and its parts, summed over its target positions.

        total = translation + guided_attention * guided + coverage_loss * coverage

    Args:
        model: The model: a ``Seq2SeqModel``.
        batch: The sentence pairs, on the model's device.
        label_smoothing: See ``translation_loss``.
        sampling_probability: How likely a word of the prefix is the model's own: step by step
            where the model has ``outputs``, else in two passes; see ``mix_predictions``.
        guided_attention: Weight of ``guided_attention_loss``.
        coverage_loss: Weight of ``attention_coverage_loss``.

    Raises:
        ValueError: A loss on the attention is asked for and the model has none.
    """
    if not hasattr(model, "outputs"):
        if guided_attention or coverage_loss:
            raise ValueError(
                "training_losses: guided_attention and coverage_loss must be 0 for a model without "
                f"outputs that hold its attention, got {guided_attention} and {coverage_loss}"
            )
        target = mix_predictions(model, batch, sampling_probability)
        hidden = model.decode(batch.source, target, batch.source_lengths, batch.target_lengths)
        translation = _cross_entropy(model, hidden, batch, label_smoothing)
        return Losses(translation, translation)
    outputs = model.outputs(
        batch.source,
        batch.target_input,
        batch.source_lengths,
        batch.target_lengths,
        sampling_probability=sampling_probability,
    )
    translation = model.target_nll(
        outputs,
        batch.source,
        batch.target_output,
        batch.source_lengths,
        None if batch.is_unpadded else batch.target_rows,
        label_smoothing=label_smoothing,
    )
    total, guided, coverage = translation, None, None
    if guided_attention or coverage_loss:
        weights = outputs.attention
        if weights is None:
            raise ValueError(
                "training_losses: guided_attention and coverage_loss must be 0 for a model without "
                f"attention, got {guided_attention} and {coverage_loss}"
            )
        if guided_attention:
            lengths = _memory_lengths(model, batch.source_lengths)
            guided = guided_attention_loss(weights, lengths, batch.target_lengths)
            total = total + guided_attention * guided
        if coverage_loss:
            coverage = attention_coverage_loss(weights, batch.target_lengths)
            total = total + coverage_loss * coverage
    return Losses(total, translation, guided, coverage)


def translation_loss(model: Seq2SeqModel, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of a batch, summed over its target positions.

        loss = sum over positions of (1 - e) * -log p(word) + e / V * sum over v of -log p(v)

    with e the label smoothing and V the size of the vocabulary. Padding is dropped *before* the
    projection onto the vocabulary, the most expensive product of a small model, so it costs
    nothing there and cannot contribute. Divide by ``batch.target_tokens`` for the mean, or by the
    sum over several batches to accumulate gradients as if they were one.

    Args:
        model: The model.
        batch: The sentence pairs, on the model's device.
        label_smoothing: e, in [0, 1]. A model that copies words takes 0 alone.

    Returns:
        A scalar, fp32.

    Reference: Szegedy et al., 2016. https://arxiv.org/abs/1512.00567
    """
    return training_losses(model, batch, label_smoothing=label_smoothing).translation


def guided_attention_loss(
    weights: Tensor,
    source_lengths: Tensor,
    target_lengths: Tensor,
    *,
    width: float = GUIDED_ATTENTION_WIDTH,
) -> Tensor:
    """What attention far from the diagonal costs, summed over the target positions.

        loss = sum over b, t, s of weights[b, t, s] * (1 - exp(-(t / T_b - s / S_b)² / (2 * g²)))

    with t and s counted from 0 and g the width. A row costs between 0 and 1, whatever the length
    of its source, where the paper divides by that too. For tasks whose alignment is monotonic,
    such as speech, it saves an attention from having to find the diagonal by chance.

    Args:
        weights: ``[B, T, S]``, rows that sum to at most 1, 0 behind the sources' lengths.
        source_lengths: ``[B]``: S_b.
        target_lengths: ``[B]``: T_b; rows behind do not count.
        width: g.

    Returns:
        A scalar, fp32.

    Reference: Tachibana et al., 2017. https://arxiv.org/abs/1710.08969
    """
    _, T, S = weights.shape
    device = weights.device
    row = torch.arange(T, device=device) / target_lengths[:, None]  # [B, T]
    column = torch.arange(S, device=device) / source_lengths.clamp(min=1)[:, None]  # [B, S]
    distance = row[:, :, None] - column[:, None, :]
    penalty = -torch.expm1(-(distance**2) / (2.0 * width**2))  # [B, T, S]
    penalty = penalty.masked_fill(_behind(target_lengths, T)[:, :, None], 0.0)
    return (weights.float() * penalty).sum()


def attention_coverage_loss(weights: Tensor, target_lengths: Tensor) -> Tensor:
    """What looking again at the same places costs: the coverage loss, summed over target positions.

        loss = sum over b, t, s of min(weights[b, t, s], sum over t' < t of weights[b, t', s])

    Args:
        weights: ``[B, T, S]``, 0 behind the sources' lengths.
        target_lengths: ``[B]``; rows behind do not count.

    Returns:
        A scalar, fp32.

    Reference: See et al., 2017, section 2.3. https://arxiv.org/abs/1704.04368
    """
    weights = weights.float()
    before = F.pad(weights.cumsum(dim=1)[:, :-1], (0, 0, 1, 0))
    repeated = torch.minimum(weights, before).sum(dim=2)  # [B, T]
    return repeated.masked_fill(_behind(target_lengths, weights.size(1)), 0.0).sum()


def _behind(lengths: Tensor, size: int) -> Tensor:
    """``[B, size]`` bool."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def _memory_lengths(model: Any, source_lengths: Tensor) -> Tensor:
    """Positions of each source that attention sees: fewer than it has where the encoder joins
    several frames into one."""
    reduction = getattr(getattr(model, "config", None), "time_reduction", 1)
    return (source_lengths + reduction - 1) // reduction


def _cross_entropy(
    model: Seq2SeqModel, hidden: Tensor, batch: Batch, label_smoothing: float
) -> Tensor:
    words = batch.target_output.flatten()
    hidden = hidden.flatten(0, 1)  # [B * T, E]
    if not batch.is_unpadded:
        hidden = hidden.index_select(0, batch.target_rows)
        words = words.index_select(0, batch.target_rows)
    logits = model.project(hidden).float()  # [N, V]
    return F.cross_entropy(logits, words, reduction="sum", label_smoothing=label_smoothing)
