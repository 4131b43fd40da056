"""The feed-forward epilogue in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._philox import keep_mask


def bias_activation_dropout_reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    gated: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Output, ``[..., F]`` in the dtype of ``x``; see the public function.

    Computes in fp32 (fp64 for fp64 inputs) and rounds once. ``activation`` is ``"identity"``
    where the public function takes None.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden = x.to(compute)
    if bias is not None:
        hidden = hidden + bias.to(compute)
    parts = hidden.chunk(2, dim=-1) if gated else (hidden,)
    keep = None
    if dropout_p > 0.0:
        assert seed is not None  # the public function draws one
        keep = keep_mask(seed, parts[0].shape, dropout_p)
        # What is dropped is not seen: neither a NaN nor a derivative there reaches a result.
        parts = tuple(torch.where(keep, part, 0.0) for part in parts)
    output = _ACTIVATIONS[activation](parts[0])
    if gated:
        output = output * parts[1]
    if keep is not None:
        output = torch.where(keep, output / (1.0 - dropout_p), 0.0)
    if residual is not None:
        output = output + residual.to(compute)
    return output.to(x.dtype)


def _identity(x: Tensor) -> Tensor:
    return x


# The formulas of the two functions below lose every digit far below 0 when they are written with
# 1 + erf(...) and 1 + tanh(...), as they often are: the sum cancels.


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.erfc(-x * math.sqrt(0.5))


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
