"""The residual connections of a Transformer layer, post-norm and pre-norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ._linear import Product
from ._norm_inputs import add_residual
from .layer_norm import AddLayerNorm, LayerNorm, RMSNorm
from .masked_batch_norm import MaskedBatchNorm
from .power_norm import PowerNorm

NormName = Literal["layer_norm", "rms_norm", "power_norm", "batch_norm"]
Norm = NormName | Callable[[int], nn.Module]

# These take the residual, and add it in the kernel that normalises.
_ADDING = (LayerNorm, RMSNorm, MaskedBatchNorm, PowerNorm)
# These normalise over positions, and must know which count.
_OVER_POSITIONS = (MaskedBatchNorm, PowerNorm)


def make_norm(
    norm: Norm,
    width: int,
    eps: float = 1e-5,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    owner: str = "make_norm",
) -> nn.Module:
    """The normalisation that an argument ``norm`` of a layer stands for.

    Args:
        norm: ``"layer_norm"``, ``"rms_norm"``, ``"power_norm"``, ``"batch_norm"``, or a function
            that makes a module from the width, which is all that it is given.
        width: E.
        eps: Added to the variance or the mean square.
        bias: Learn a bias, where the normalisation can do without (not ``"batch_norm"``) and has
            one (not ``"rms_norm"``).
        device: Of the parameters.
        dtype: Of the parameters.
        owner: Whose argument it is, for messages.

    Raises:
        ValueError: No normalisation has that name.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if norm == "layer_norm":
        return AddLayerNorm(width, eps, True, bias, **options)
    if norm == "rms_norm":
        return RMSNorm(width, eps, **options)
    if norm == "power_norm":
        return PowerNorm(width, eps, bias=bias, **options)
    if norm == "batch_norm":
        return MaskedBatchNorm(width, eps, **options)
    if isinstance(norm, str):
        raise ValueError(
            f"{owner}: norm must be 'layer_norm', 'rms_norm', 'power_norm', 'batch_norm' or a "
            f"callable, got {norm!r}"
        )
    return norm(width)


def needs_padding(*norms: nn.Module | None) -> bool:
    """Whether one of them must know which positions are padding."""
    return any(isinstance(norm, _OVER_POSITIONS) for norm in norms)


class Sublayer(NamedTuple):
    """A branch of a layer with the normalisation and dropout of its residual connection."""

    branch: Callable[[Tensor], Product]
    norm: nn.Module
    dropout: nn.Dropout


def connect(
    x: Tensor, sublayers: Sequence[Sublayer], norm_first: bool, padding: Tensor | None
) -> Tensor:
    """Run sublayers one after the other, each around a residual connection.

        post-norm: x = norm(x + dropout(branch(x)))
        pre-norm:  x = x + dropout(branch(norm(x)))

    The bias of a branch's last projection, dropout, the addition and the normalisation that
    follows are one kernel; a pre-norm layer's last addition is one without a normalisation.

    Reference: Xiong et al., 2020, figure 1. https://arxiv.org/abs/2002.04745
    """
    if not norm_first:
        for branch, norm, dropout in sublayers:
            x = _add_and_normalise(norm, branch(x), x, active_p(dropout), padding, False)
        return x
    hidden = _add_and_normalise(sublayers[0].norm, Product(x), None, 0.0, padding, False)
    for current, following in itertools.pairwise(sublayers):
        hidden, x = _add_and_normalise(
            following.norm, current.branch(hidden), x, active_p(current.dropout), padding, True
        )
    last = sublayers[-1]
    product, bias = last.branch(hidden)
    return add_residual("connect", product, x, bias, active_p(last.dropout))


def _add_and_normalise(
    norm: nn.Module,
    branch: Product,
    residual: Tensor | None,
    dropout_p: float,
    padding: Tensor | None,
    return_sum: bool,
) -> Any:
    """The normalised sum; with ``return_sum`` also the sum."""
    x, x_bias = branch
    name = type(norm).__name__
    if isinstance(norm, _ADDING):
        return norm(
            x, residual, x_bias=x_bias, dropout_p=dropout_p, return_sum=return_sum, padding=padding
        )
    total = add_residual(name, x, residual, x_bias, dropout_p)
    return (norm(total), total) if return_sum else norm(total)


def active_p(dropout: nn.Dropout) -> float:
    """The probability that the module applies in its present mode."""
    return dropout.p if dropout.training else 0.0
