"""The residual connections of a Transformer layer, post-norm and pre-norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from .layer_norm import AddLayerNorm


class Sublayer(NamedTuple):
    """A branch of a layer with the normalisation and dropout of its residual connection."""

    branch: Callable[[Tensor], Tensor]
    norm: AddLayerNorm
    dropout: nn.Dropout


def connect(x: Tensor, sublayers: Sequence[Sublayer], norm_first: bool) -> Tensor:
    """Run sublayers one after the other, each around a residual connection.

        post-norm: x = norm(x + dropout(branch(x)))
        pre-norm:  x = x + dropout(branch(norm(x)))

    Every addition but a pre-norm layer's last is fused with the normalisation that follows it.

    Reference: Xiong et al., 2020, figure 1. https://arxiv.org/abs/2002.04745
    """
    if not norm_first:
        for branch, norm, dropout in sublayers:
            x = norm(branch(x), x, dropout_p=active_p(dropout))
        return x
    hidden = sublayers[0].norm(x, dropout_p=0.0)
    for current, following in itertools.pairwise(sublayers):
        hidden, x = following.norm(
            current.branch(hidden), x, dropout_p=active_p(current.dropout), return_sum=True
        )
    last = sublayers[-1]
    return x + F.dropout(last.branch(hidden), last.dropout.p, last.dropout.training)


def active_p(dropout: nn.Dropout) -> float:
    """The probability that the module applies in its present mode."""
    return dropout.p if dropout.training else 0.0
