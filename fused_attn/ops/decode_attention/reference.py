"""Attention to a key-value cache in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def decode_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None,
    ancestry: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output ``[R, H, T, Dv]`` in the query's dtype and lse ``[R, H, T]``; see the public function.

    Computes in fp32 (fp64 for fp64 inputs) and rounds once at the end.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    R, H, T, _ = query.shape
    C, Hk, S, _ = key.shape
    group = H // Hk
    device = query.device

    lengths = torch.full((R,), S, device=device)
    if key_lengths is not None:
        repeats = R // max(1, key_lengths.size(0))
        lengths = key_lengths.clamp(0, S).repeat_interleave(repeats)
    position = lengths[:, None] - T + torch.arange(T, device=device)  # [R, T]
    column = torch.arange(S, device=device)
    distance = position[:, :, None] - column  # [R, T, S]
    allowed = (column < lengths[:, None, None]).expand(R, T, S)
    if is_causal:
        allowed = allowed & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance <= window)
    allowed = allowed[:, None].expand(R, H, T, S)
    if mask is not None:
        allowed = allowed & mask

    # Rows of the cache as each row of queries sees them.
    if ancestry is not None:
        keys = gather_ancestors(key, ancestry)
        values = gather_ancestors(value, ancestry)
        visible = allowed.unflatten(1, (Hk, group)).any(dim=3).any(dim=2)  # [R, Hk, S]
    else:
        K = R // max(1, C)
        keys, values = key.repeat_interleave(K, 0), value.repeat_interleave(K, 0)
        pairs = allowed.reshape(C, K, Hk, group, T, S)
        visible = pairs.any(dim=4).any(dim=3).any(dim=1).repeat_interleave(K, 0)  # [R, Hk, S]
    # What no query that shares a key may look at is replaced, so that a NaN there cannot survive
    # as 0 * NaN.
    keys = keys.to(compute).masked_fill(~visible[..., None], 0.0).repeat_interleave(group, 1)
    values = values.to(compute).masked_fill(~visible[..., None], 0.0).repeat_interleave(group, 1)

    logits = scale * (query.to(compute) @ keys.transpose(-2, -1))  # [R, H, T, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(compute)[:, None, None]
        logits = logits - slopes * distance.abs()[:, None].to(compute)
    logits = logits.masked_fill(~allowed, -math.inf)

    # A row of -inf would give NaN in softmax: shift by 0 and divide by 1 instead.
    peak = logits.new_full((R, H, T, 1), -math.inf)
    if S > 0:
        peak = logits.amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = torch.exp(logits - peak)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0.0
    lse = (peak + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, -math.inf)
    output = (weights / total.masked_fill(empty, 1.0)) @ values
    return output.to(query.dtype).contiguous(), lse.squeeze(-1).contiguous()


def gather_ancestors(cache: Tensor, ancestry: Tensor) -> Tensor:
    """``[R, Hk, S, D]``: position s of row b * K + k from row ``b * K + ancestry[b, k, s]``.

    Entries outside 0..K-1 count as the nearest of these, since they may stand where there is
    nothing yet.
    """
    B, K, S = ancestry.shape
    first = K * torch.arange(B, device=cache.device)
    rows = (first[:, None, None] + ancestry.clamp(0, max(0, K - 1))).reshape(B * K, 1, S)
    heads = torch.arange(cache.size(1), device=cache.device)[:, None]
    return cache[rows, heads, torch.arange(S, device=cache.device)]


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
