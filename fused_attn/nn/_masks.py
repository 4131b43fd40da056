"""From ``torch.nn``'s masks (True is ignored) to the attention op's (True takes part)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_attn.ops import BlockMask


class Visibility(NamedTuple):
    """What restricts one call of the attention op, under the names of its arguments."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    is_causal: bool = False
    block_mask: BlockMask | None = None
    alibi_slopes: Tensor | None = None
    window: tuple[int | None, int | None] | None = None
    align: Literal["upper_left", "lower_right"] = "upper_left"
    softcap: float | None = None

    @property
    def has_positions(self) -> bool:
        """Something depends on where a key is, apart from masks, lengths and causality."""
        places = (self.block_mask, self.alibi_slopes, self.window)
        return any(place is not None for place in places) or self.align != "upper_left"


def convert_masks(
    name: str,
    shape: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
) -> Visibility:
    """The op's arguments for ``torch.nn``'s masks.

    Boolean masks stay boolean and float masks stay additive, each as small as it came: a
    key-padding mask keeps a query dimension of 1.

    Args:
        name: Of the calling module, for messages.
        shape: ``(B, H, T, S)``.
        attn_mask: ``[T, S]`` or ``[B * H, T, S]``, bool or floating point.
        key_padding_mask: ``[B, S]``, bool or floating point.
        query_lengths: ``[B]``, as the op takes them.
        key_lengths: ``[B]``, as the op takes them.
        is_causal: Applied in place of ``attn_mask``, which it describes where both are given;
            beside it where the mask requires a gradient.

    Raises:
        TypeError: A mask is neither bool nor floating point.
        ValueError: A mask has a wrong shape.
    """
    B, H, T, S = shape
    mask: Tensor | None = None
    bias: Tensor | None = None
    if attn_mask is not None:
        _check_dtype(name, "attn_mask", attn_mask)
        if tuple(attn_mask.shape) not in ((T, S), (B * H, T, S)):
            raise ValueError(
                f"{name}: attn_mask must have shape [T, S] = {[T, S]} or [B * H, T, S] = "
                f"{[B * H, T, S]}, got {list(attn_mask.shape)}"
            )
        # A learned mask gets its gradient even where it happens to be causal.
        if not is_causal or attn_mask.requires_grad:
            pairs = attn_mask if attn_mask.dim() == 2 else attn_mask.view(B, H, T, S)
            if pairs.dtype == torch.bool:
                mask = ~pairs
            else:
                bias = pairs
    if key_padding_mask is not None:
        _check_dtype(name, "key_padding_mask", key_padding_mask)
        if tuple(key_padding_mask.shape) != (B, S):
            raise ValueError(
                f"{name}: key_padding_mask must have shape [B, S] = {[B, S]}, got "
                f"{list(key_padding_mask.shape)}"
            )
        padding = key_padding_mask.view(B, 1, 1, S)
        if padding.dtype == torch.bool:
            visible = ~padding
        else:
            # As a bias alone, -inf would let a NaN key through: NaN - inf is NaN.
            visible = padding != -math.inf
            bias = padding if bias is None else bias + padding
        mask = visible if mask is None else mask & visible
    return Visibility(mask, bias, query_lengths, key_lengths, is_causal)


def append_visible_keys(
    visibility: Visibility, T: int, S: int, count: int, device: torch.device
) -> Visibility:
    """Restrictions for ``S + count`` keys, the last ``count`` of them visible to every query.

    Neither causality nor key lengths can say that: they become a mask.

    Raises:
        ValueError: There are restrictions by position: the new keys have none.
    """
    if visibility.has_positions:
        raise ValueError(
            "MultiheadAttention: block_mask, alibi_slopes, window and align do not go with "
            "add_bias_kv or add_zero_attn, whose keys have no position"
        )
    mask, bias = visibility.mask, visibility.bias
    if visibility.is_causal:
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril()
        mask = causal if mask is None else mask & causal
    if visibility.key_lengths is not None:
        inside = length_mask(visibility.key_lengths, S)[:, None, None, :]
        mask = inside if mask is None else mask & inside
    if mask is not None:
        mask = F.pad(mask, (0, count), value=True)
    if bias is not None:
        bias = F.pad(bias, (0, count))
    return Visibility(mask, bias, visibility.query_lengths, softcap=visibility.softcap)


def padded_keys(S: int, key_padding_mask: Tensor | None, key_lengths: Tensor | None) -> Tensor:
    """``[B, S]`` bool, True where a key is hidden from every query by either; one must be given."""
    hidden = None if key_lengths is None else ~length_mask(key_lengths, S)
    if key_padding_mask is not None:
        padding = key_padding_mask
        if padding.dtype != torch.bool:
            padding = padding == -math.inf
        hidden = padding if hidden is None else hidden | padding
    if hidden is None:
        raise ValueError("padded_keys: key_padding_mask or key_lengths must be given, got neither")
    return hidden


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """``[B, size]`` bool, True in front of each length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _check_dtype(name: str, mask_name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        dtype = str(mask.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: {mask_name} must be bool or floating point, got {dtype}")
