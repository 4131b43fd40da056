"""Attention in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._philox import keep_mask
from .block_mask import BlockMask
from .contract import SIGMOID, SOFTMAX, AttentionInputs


def attention_reference(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, T, Dv]`` in the query's dtype and lse ``[B, H, T]``; see the public function.

    Computes in fp32 (fp64 for fp64 inputs) and rounds once at the end.
    """
    if inputs.is_packed:
        output, lse = attention_reference(unpacked(inputs))
        return repacked(inputs, output, 0.0), repacked(inputs, lse[..., None], -math.inf)[..., 0]
    query, value = inputs.query, inputs.value
    logits, allowed = masked_logits(inputs)
    v = value.to(logits.dtype).masked_fill(~seen_keys(inputs, allowed), 0.0)
    v = v.repeat_interleave(group_size(inputs), dim=1)
    if inputs.activation == SOFTMAX:
        weights, lse = softmax(logits)
    else:
        weights = activated(logits, inputs.activation)
        lse = logits.new_zeros(logits.shape[:-1])
        lse = lse.masked_fill((logits == -math.inf).all(dim=-1), -math.inf)
    if inputs.dropout_p > 0.0:
        assert inputs.seed is not None  # the public function draws one
        kept = dropout_mask(inputs.seed, inputs.logical_shape, inputs.dropout_p)
        weights = weights * kept / (1.0 - inputs.dropout_p)
    output = weights @ v
    return output.to(query.dtype).contiguous(), lse.contiguous()


def masked_logits(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Logits ``[B, H, T, S]``, -inf where a pair takes no part, and the pairs that do."""
    query, key = inputs.query, inputs.key
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    allowed = allowed_pairs(inputs)
    # What no query may look at is replaced, so that a NaN there cannot survive as 0 * NaN.
    # The same for queries that look at nothing: their gradient is exactly 0.
    active = allowed.any(dim=3)[..., None]  # [B, H, T, 1]
    q = query.to(compute).masked_fill(~active, 0.0)
    k = key.to(compute).masked_fill(~seen_keys(inputs, allowed), 0.0)
    k = k.repeat_interleave(group_size(inputs), dim=1)
    logits = inputs.scale * (q @ k.transpose(-2, -1))
    if inputs.softcap > 0.0:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    if inputs.bias is not None:
        logits = logits + inputs.bias.to(compute)
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.to(compute)[..., None, None]
        logits = logits - slopes * right_of_diagonal(inputs).abs()
    return logits.masked_fill(~allowed, -math.inf), allowed


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, and the lse of each row: 0 and -inf for a row of -inf, or without elements."""
    if logits.size(-1) == 0:
        return logits, logits.sum(dim=-1) - math.inf
    # A row of -inf would give NaN: shift by 0 instead.
    peak = logits.detach().amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = torch.exp(logits - peak)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    lse = (peak + torch.log(total)).masked_fill(empty, -math.inf)
    return weights / total, lse.squeeze(-1)


def activated(logits: Tensor, activation: int) -> Tensor:
    """Weights other than softmax's; 0 where a logit is -inf."""
    return torch.sigmoid(logits) if activation == SIGMOID else torch.relu(logits)


def dropout_mask(seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """Boolean ``[B, H, T, S]``: True where dropout keeps a weight.

    The random numbers are those of a tensor whose rows are as long as the next multiple of 4, so
    that rows begin with a counter of their own.
    """
    B, H, T, S = shape
    return keep_mask(seed, (B, H, T, (S + 3) // 4 * 4), dropout_p)[..., :S]


def right_of_diagonal(inputs: AttentionInputs) -> Tensor:
    """How far key s is to the right of query t's diagonal: ``[T, S]``, or ``[B, 1, T, S]``."""
    _, _, T, S = inputs.logical_shape
    device = inputs.query.device
    distance = torch.arange(S, device=device) - torch.arange(T, device=device)[:, None]
    if not inputs.align_lower_right:
        return distance
    queries = clamped_lengths(inputs.query_lengths, T)
    keys = clamped_lengths(inputs.key_lengths, S)
    shift = keys - queries
    if isinstance(shift, Tensor):
        shift = shift[:, None, None, None]
    return distance - shift


def clamped_lengths(lengths: Tensor | None, size: int) -> Tensor | int:
    """Lengths within ``[0, size]``; the size itself where there are none."""
    return size if lengths is None else lengths.long().clamp(0, size)


def allowed_pairs(inputs: AttentionInputs) -> Tensor:
    """Boolean ``[B, H, T, S]``: True where query t may look at key s."""
    B, H, T, S = inputs.logical_shape
    device = inputs.query.device
    allowed = torch.ones(B, H, T, S, dtype=torch.bool, device=device)
    distance = right_of_diagonal(inputs)
    if inputs.left >= 0:
        allowed = allowed & (distance >= -inputs.left)
    if inputs.right >= 0:
        allowed = allowed & (distance <= inputs.right)
    if inputs.query_lengths is not None:
        row = torch.arange(T, device=device)
        allowed = allowed & (row < inputs.query_lengths[:, None])[:, None, :, None]
    if inputs.key_lengths is not None:
        column = torch.arange(S, device=device)
        allowed = allowed & (column < inputs.key_lengths[:, None])[:, None, None, :]
    if inputs.mask is not None:
        allowed = allowed & inputs.mask
    if inputs.block_mask:
        allowed = allowed & BlockMask.of((T, S), inputs.block_mask).dense()
    return allowed


def seen_keys(inputs: AttentionInputs, allowed: Tensor) -> Tensor:
    """``[B, Hk, S, 1]``: True where some query of some head of the group looks at the key."""
    seen = allowed.any(dim=2)
    heads, S = inputs.key.size(1), seen.size(2)
    return seen.view(seen.size(0), heads, group_size(inputs), S).any(dim=2)[..., None]


def group_size(inputs: AttentionInputs) -> int:
    """Query heads that share a head of keys and values."""
    return inputs.query.size(1) // max(inputs.key.size(1), 1)


# --- packed batches -----------------------------------------------------------------------------


def unpacked(inputs: AttentionInputs) -> AttentionInputs:
    """The same call on padded tensors."""
    assert inputs.query_offsets is not None
    assert inputs.key_offsets is not None
    queries, keys = inputs.query_offsets.long(), inputs.key_offsets.long()
    return inputs._replace(
        query=_padded(inputs.query, queries, inputs.max_queries),
        key=_padded(inputs.key, keys, inputs.max_keys),
        value=_padded(inputs.value, keys, inputs.max_keys),
        query_lengths=queries.diff(),
        key_lengths=keys.diff(),
        query_offsets=None,
        key_offsets=None,
    )


def _padded(rows: Tensor, offsets: Tensor, size: int) -> Tensor:
    """``[1, H, N, D]`` to ``[B, H, size, D]``, with zeros behind the lengths."""
    position = torch.arange(size, device=rows.device)
    index = offsets[:-1, None] + position
    N = rows.size(2)
    index = torch.where(position < offsets.diff()[:, None], index, N)
    with_zeros = torch.cat([rows[0], rows.new_zeros(rows.size(1), 1, rows.size(3))], dim=1)
    return with_zeros[:, index].transpose(0, 1)


def repacked(inputs: AttentionInputs, padded: Tensor, absent: float) -> Tensor:
    """``[B, H, T, D]`` to ``[1, H, N, D]``; rows of no sequence hold ``absent``."""
    assert inputs.query_offsets is not None
    offsets = inputs.query_offsets.long()
    B, H, T, D = padded.shape
    row = torch.arange(inputs.query.size(2), device=padded.device)
    b = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
    t = row - offsets[b]
    owned = (b < B) & (t >= 0) & (t < T)
    flat = torch.cat(
        [padded.transpose(1, 2).reshape(B * T, H, D), padded.new_full((1, H, D), absent)]
    )
    return flat[torch.where(owned, b * T + t, B * T)].transpose(0, 1)[None]


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """The reference runs every call."""
    return []
