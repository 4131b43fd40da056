"""What the encoder's and the decoder's layers and stacks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._linear import Product, is_plain, leaves_bias
from ._masks import length_mask, padded_keys
from ._residual import needs_padding
from .multihead_attention import MultiheadAttention


def detect_causal(mask: Tensor | None, is_causal: bool | None) -> bool:
    """``is_causal`` where it is given; else whether the mask is the causal one.

    While torch.compile traces, nothing is detected, as the answer depends on data: the mask is
    then applied as it is, with the same result.
    """
    if is_causal is not None:
        return is_causal
    if mask is None or torch.compiler.is_compiling():
        return False
    if mask.dim() != 2 or mask.size(0) != mask.size(1):
        return False
    if mask.dtype == torch.bool:
        causal = torch.ones_like(mask).triu(1)
    else:
        causal = torch.full_like(mask, -torch.inf).triu(1)
    return torch.equal(mask, causal)


def clear_padding(x: Tensor, lengths: Tensor | None, layers: nn.ModuleList) -> Tensor:
    """Zero behind the lengths, so that no product meets a NaN there; ``x`` where there are none."""
    if lengths is None or x.dim() != 3 or len(layers) == 0:
        return x
    first: Any = layers[0]
    batch_first = first.self_attn.batch_first
    padding = ~length_mask(lengths, x.size(1 if batch_first else 0))
    return x.masked_fill((padding if batch_first else padding.T)[..., None], 0.0)


def attend(attention: Any, *inputs: Tensor, **masks: Any) -> Product:
    """An attention's output, the bias of its last projection left to the caller where it can be."""
    if is_plain(attention, MultiheadAttention) and leaves_bias(attention.out_proj):
        output, _ = attention(*inputs, need_weights=False, output_bias=False, **masks)
        return Product(output, attention.out_proj.bias)
    return Product(attention(*inputs, need_weights=False, **masks)[0])


def padding_for(
    norms: tuple[nn.Module | None, ...],
    x: Tensor,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    batch_first: bool,
) -> Tensor | None:
    """Which positions of ``x`` are padding, in its layout; None where no norm must know."""
    if (key_padding_mask is None and lengths is None) or not needs_padding(*norms):
        return None
    is_batched = x.dim() == 3
    if key_padding_mask is not None and not is_batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    size = x.size(1) if is_batched and batch_first else x.size(0)
    padding = padded_keys(size, key_padding_mask, lengths)  # [B, S]
    if not is_batched:
        return padding[0]
    return padding if batch_first else padding.T


def final_norm(
    norm: nn.Module | None,
    x: Tensor,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    layers: nn.ModuleList,
) -> Tensor:
    """A stack's last normalisation; ``x`` where there is none."""
    if norm is None:
        return x
    if not needs_padding(norm):
        return norm(x)
    first: Any = layers[0]
    batch_first = first.self_attn.batch_first
    return norm(x, padding=padding_for((norm,), x, key_padding_mask, lengths, batch_first))
