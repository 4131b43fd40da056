"""The attention weights themselves, for callers who want to look at them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._masks import Visibility, length_mask


def attention_weights(query: Tensor, key: Tensor, lse: Tensor, visibility: Visibility) -> Tensor:
    """Weights ``[B, H, T, S]`` in the query's dtype, differentiable, 0 where nothing is seen.

    The output never comes from here: this is a second pass over the logits, with the row sums
    that the op has found already.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H, S, D]``.
        lse: ``[B, H, T]``, the op's log-sum-exp.
        visibility: What the op was called with.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    T, S = query.size(2), key.size(2)
    hidden = _hidden_pairs(visibility, T, S, query.device)
    q = query.to(compute) / math.sqrt(query.size(3))
    k = key.to(compute)
    if hidden is not None:
        # A NaN in a key that nobody sees would reach the query's gradient as 0 * NaN.
        k = k.masked_fill(hidden.all(dim=-2)[..., None], 0.0)
    logits = q @ k.transpose(-2, -1)
    if visibility.bias is not None:
        logits = logits + visibility.bias.to(compute)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -math.inf)
    shift = lse.to(compute).masked_fill(lse == -math.inf, 0.0)[..., None]
    weights = torch.exp(logits - shift)
    if weights.requires_grad:
        # The shift is a constant to autograd; dividing by the sum, which is 1 up to rounding,
        # restores the part of the gradient that goes through it.
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0.0, 1.0)
    return weights.to(query.dtype)


def _hidden_pairs(visibility: Visibility, T: int, S: int, device: torch.device) -> Tensor | None:
    """bool, broadcastable to ``[B, H, T, S]`` and at least four-dimensional, True where hidden."""
    masks = []
    if visibility.mask is not None:
        masks.append(~visibility.mask)
    if visibility.is_causal:
        masks.append(torch.ones(T, S, dtype=torch.bool, device=device).triu(1))
    if visibility.query_lengths is not None:
        masks.append(~length_mask(visibility.query_lengths, T)[:, None, :, None])
    if visibility.key_lengths is not None:
        masks.append(~length_mask(visibility.key_lengths, S)[:, None, None, :])
    if not masks:
        return None
    hidden = masks[0]
    for mask in masks[1:]:
        hidden = hidden | mask
    return hidden.view((1,) * (4 - hidden.dim()) + tuple(hidden.shape))
