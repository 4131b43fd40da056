"""Additive attention in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .contract import AdditiveInputs


def additive_attention_reference(inputs: AdditiveInputs) -> tuple[Tensor, Tensor]:
    """Context ``[B, H, T, D]`` in the query's dtype and weights ``[B, H, T, S]``.

    Without values, an empty tensor and the scores. See the public functions. Computes in fp32
    (fp64 for fp64 inputs) and rounds once at the end, under autocast too, which would round every
    product.
    """
    device = inputs.query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return additive_attention_reference(inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    allowed = allowed_pairs(inputs)  # [B, H, T, S]
    hidden = query.to(compute)[:, :, :, None] + key.to(compute)[:, :, None]  # [B, H, T, S, E]
    if inputs.features is not None:
        assert inputs.feature_weight is not None  # the public function checks that they go together
        # What is out of sight is replaced, so that a NaN there cannot survive as 0 * NaN.
        features = inputs.features.to(compute).masked_fill(~allowed[..., None], 0.0)
        weight = inputs.feature_weight.to(compute)[None, :, None]  # [1, H, 1, F, E]
        hidden = hidden + features @ weight
    hidden = torch.tanh(hidden.masked_fill(~allowed[..., None], 0.0))
    scores = (hidden @ inputs.score_weight.to(compute)[None, :, None, :, None])[..., 0]
    if value is None:
        return query.new_empty(0), scores.masked_fill(~allowed, -math.inf)
    # The lowest number and not -inf, which would make NaN of a row with nothing to attend to.
    lowest = torch.finfo(compute).min
    weights = torch.softmax(scores.masked_fill(~allowed, lowest), dim=-1)
    weights = weights.masked_fill(~allowed, 0.0)
    seen = allowed.any(dim=2)[..., None]  # [B, H, S, 1]
    context = weights @ value.to(compute).masked_fill(~seen, 0.0)
    return context.to(query.dtype), weights


def allowed_pairs(inputs: AdditiveInputs) -> Tensor:
    """Boolean ``[B, H, T, S]``: True where query t may look at key s."""
    B, H, T, _ = inputs.query.shape
    S, device = inputs.key.size(2), inputs.query.device
    allowed = torch.ones(B, H, T, S, dtype=torch.bool, device=device)
    if inputs.key_lengths is not None:
        column = torch.arange(S, device=device)
        allowed = allowed & (column < inputs.key_lengths[:, None])[:, None, None]
    if inputs.mask is not None:
        allowed = allowed & inputs.mask
    return allowed


def unsupported_reasons(inputs: AdditiveInputs) -> list[str]:
    """The reference runs every call."""
    return []
