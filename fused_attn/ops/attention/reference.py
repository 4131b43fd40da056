"""Attention in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._philox import keep_mask


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, T, Dv]`` in the query's dtype and lse ``[B, H, T]``; see the public function.

    Computes in fp32 (fp64 for fp64 inputs) and rounds once at the end.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    B, H, T, _ = query.shape
    S = key.size(2)
    allowed = allowed_pairs(query, S, mask, query_lengths, key_lengths, is_causal)

    # What no query may look at is replaced, so that a NaN there cannot survive as 0 * NaN.
    # The same for queries that look at nothing: their gradient is exactly 0.
    visible = allowed.any(dim=2)[..., None]  # [B, H, S, 1]
    active = allowed.any(dim=3)[..., None]  # [B, H, T, 1]
    q = query.to(compute).masked_fill(~active, 0.0)
    k = key.to(compute).masked_fill(~visible, 0.0)
    v = value.to(compute).masked_fill(~visible, 0.0)

    logits = scale * (q @ k.transpose(-2, -1))  # [B, H, T, S]
    if bias is not None:
        logits = logits + bias.to(compute)
    logits = logits.masked_fill(~allowed, -math.inf)

    # A row of -inf would give NaN in softmax: shift by 0 and divide by 1 instead.
    peak = (
        logits.detach().amax(dim=-1, keepdim=True)
        if S > 0
        else logits.new_full((B, H, T, 1), -math.inf)
    )
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = torch.exp(logits - peak)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0.0
    lse = (peak + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, -math.inf)
    weights = weights / total.masked_fill(empty, 1.0)
    if dropout_p > 0.0:
        assert seed is not None  # the public function draws one
        weights = weights * keep_mask(seed, (B, H, T, S), dropout_p) / (1.0 - dropout_p)
    output = weights @ v
    lse_dtype = torch.float64 if compute == torch.float64 else torch.float32
    return output.to(query.dtype).contiguous(), lse.squeeze(-1).to(lse_dtype).contiguous()


def allowed_pairs(
    query: Tensor,
    S: int,
    mask: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Boolean ``[B, H, T, S]``: True where query t may look at key s."""
    B, H, T, _ = query.shape
    device = query.device
    allowed = torch.ones(B, H, T, S, dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed.tril()
    if query_lengths is not None:
        row = torch.arange(T, device=device)
        allowed = allowed & (row < query_lengths[:, None])[:, None, :, None]
    if key_lengths is not None:
        column = torch.arange(S, device=device)
        allowed = allowed & (column < key_lengths[:, None])[:, None, None, :]
    if mask is not None:
        allowed = allowed & mask
    return allowed


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
