"""The attention weights themselves, for callers who want to look at them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .contract import SOFTMAX, AttentionInputs
from .reference import activated, group_size, masked_logits, unpacked


def attention_weights(inputs: AttentionInputs, lse: Tensor, mean: bool) -> Tensor:
    """Weights before dropout, 0 where nothing is seen; differentiable.

    The output never comes from here: this is a second pass over the logits, with the row sums
    that the forward has found, one head at a time.

    Args:
        inputs: What the forward was called with.
        lse: ``[B, H, T]``, the forward's; packed ``[1, H, N]``.
        mean: Average over the heads.

    Returns:
        ``[B, H, T, S]`` in the query's dtype, ``[B, T, S]`` for the mean. Those of a packed batch
        are padded.
    """
    dtype = inputs.query.dtype
    if inputs.is_packed:
        # As a query of width 1 the lse is padded along with the queries.
        lse = unpacked(inputs._replace(query=lse[..., None])).query[..., 0]
        inputs = unpacked(inputs)
    B, H, T, S = inputs.logical_shape
    heads = []
    total = inputs.query.new_zeros(B, T, S, dtype=lse.dtype)
    for h in range(H):
        one = _head(inputs, h)
        logits, _ = masked_logits(one)
        if inputs.activation == SOFTMAX:
            shift = lse[:, h : h + 1, :, None].detach()
            weights = torch.exp(logits - shift.masked_fill(shift == -math.inf, 0.0))
            # 1 but for the rounding of the lse; and what the gradient of the lse would be for.
            row_sum = weights.sum(dim=-1, keepdim=True)
            weights = weights / row_sum.masked_fill(row_sum == 0.0, 1.0)
        else:
            weights = activated(logits, inputs.activation)
        if mean:
            total = total + weights[:, 0] / H
        else:
            heads.append(weights.to(dtype))
    if mean:
        return total.to(dtype)
    return torch.cat(heads, dim=1) if heads else inputs.query.new_zeros(B, 0, T, S)


def _head(inputs: AttentionInputs, h: int) -> AttentionInputs:
    """The call of one head."""

    def one(pairs: Tensor | None) -> Tensor | None:
        if pairs is None or pairs.dim() < 3 or pairs.size(-3) == 1:
            return pairs
        return pairs[..., h : h + 1, :, :]

    g = h // group_size(inputs)
    block_mask = list(inputs.block_mask)
    if block_mask and block_mask[0].size(1) > 1:
        # The bits are those of all heads: the tiles say which.
        block_mask = [
            tensor if i == 1 else tensor[:, h : h + 1] for i, tensor in enumerate(block_mask)
        ]
    slopes = inputs.alibi_slopes
    return inputs._replace(
        query=inputs.query[:, h : h + 1],
        key=inputs.key[:, g : g + 1],
        value=inputs.value[:, g : g + 1],
        mask=one(inputs.mask),
        bias=one(inputs.bias),
        alibi_slopes=None if slopes is None else slopes[..., h : h + 1],
        block_mask=block_mask,
    )
