"""The training objective: label-smoothed cross-entropy over the positions that are words."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from .data import Batch


class Seq2SeqModel(Protocol):
    """What the objective needs of a model: states first, vocabulary scores apart."""

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
        label_smoothing: e, in [0, 1].

    Returns:
        A scalar, fp32.

    Reference: Szegedy et al., 2016. https://arxiv.org/abs/1512.00567
    """
    hidden = model.decode(
        batch.source, batch.target_input, batch.source_lengths, batch.target_lengths
    )
    words = batch.target_output.flatten()
    hidden = hidden.flatten(0, 1)  # [B * T, E]
    if batch.target_tokens < len(words):
        hidden = hidden.index_select(0, batch.target_rows)
        words = words.index_select(0, batch.target_rows)
    logits = model.project(hidden).float()  # [N, V]
    return F.cross_entropy(logits, words, reduction="sum", label_smoothing=label_smoothing)
