"""Scores that are products, and weights applied: what an RNN's attention does without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_state import AttentionMemory


def weights_dtype(memory: AttentionMemory) -> torch.dtype:
    """fp32, or fp64 in a module of fp64."""
    return torch.float64 if memory.value.dtype == torch.float64 else torch.float32


def products(q: Tensor, key: Tensor) -> Tensor:
    """``[B, H, T, E]`` and ``[B, H or 1, S, E]`` to ``[B, H, T, S]``, at least fp32."""
    B, H, T, _ = q.shape
    if key.size(1) == 1:
        # One product, and no copy of the keys for each head.
        scores = (q.flatten(1, 2) @ key[:, 0].mT).view(B, H, T, key.size(2))
    else:
        scores = q @ key.mT
    return scores if scores.dtype == torch.float64 else scores.float()


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """``[B, H, T, S]`` and ``[B, H, S, D]`` to ``[B, H, T, D]``."""
    return weights.to(value.dtype) @ value


def softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Weights ``[B, H, T, S]``, 0 where ``visible [B, S]`` is False; of nothing, all 0."""
    if visible is None:
        return scores.softmax(-1)
    hidden = ~visible[:, None, None]
    # The lowest number and not -inf, which would make NaN of a row with nothing to attend to.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)
