"""What the encoder's and the decoder's layers and stacks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._masks import length_mask

Activation = Callable[[Tensor], Tensor]


def activation_function(name: str, activation: str | Activation) -> Activation:
    """The function itself, or the one that the string names.

    Raises:
        ValueError: No activation has that name.
    """
    if not isinstance(activation, str):
        return activation
    if activation not in ("relu", "gelu"):
        raise ValueError(
            f"{name}: activation must be 'relu', 'gelu' or a callable, got {activation!r}"
        )
    return F.relu if activation == "relu" else F.gelu


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
