"""The feed-forward network of a Transformer layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.ops import bias_activation_dropout

from ._linear import Product, is_plain, product_of
from ._norm_inputs import flat_parameter
from ._residual import active_p

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FusedActivation:
    """An activation that the kernel knows: ``unit(x)``, or gated, ``unit(gate) * value``.

    The first half of ``[..., 2 F]`` is the gate.
    """

    unit: Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"]
    gated: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The activation alone."""
        return bias_activation_dropout(x, activation=self.unit, gated=self.gated)


NAMED = {
    "relu": FusedActivation("relu"),
    "gelu": FusedActivation("gelu"),
    "gelu_tanh": FusedActivation("gelu_tanh"),
    "silu": FusedActivation("silu"),
    "glu": FusedActivation("sigmoid", gated=True),
    "reglu": FusedActivation("relu", gated=True),
    "geglu": FusedActivation("gelu", gated=True),
    "swiglu": FusedActivation("silu", gated=True),
}
"""Activations by name; the gated ones: Shazeer, 2020, https://arxiv.org/abs/2002.05202"""


class Layer(Protocol):
    """What :func:`feed_forward` reads of a layer."""

    linear1: nn.Linear
    activation: Activation
    dropout: nn.Dropout
    linear2: nn.Linear


def activation_function(name: str, activation: str | Activation) -> Activation:
    """The function itself, or the one that the string names.

    Raises:
        ValueError: No activation has that name.
    """
    if not isinstance(activation, str):
        return activation
    if activation not in NAMED:
        *names, last = (f"'{known}'" for known in NAMED)
        raise ValueError(
            f"{name}: activation must be {', '.join(names)}, {last} or a callable, got "
            f"{activation!r}"
        )
    return NAMED[activation]


def hidden_width(dim_feedforward: int, activation: Activation) -> int:
    """Outputs of the first linear layer: twice as many where half of them are gates."""
    fused = fused_activation(activation)
    return 2 * dim_feedforward if fused is not None and fused.gated else dim_feedforward


def feed_forward(layer: Layer, x: Tensor) -> Product:
    """``linear2(dropout(activation(linear1(x))))``, with the last bias still to be added.

    The first bias, activation and dropout are one kernel where the activation is one that it knows.
    """
    dropout_p = active_p(layer.dropout)
    fused = fused_activation(layer.activation)
    if fused is None:
        hidden = F.dropout(layer.activation(layer.linear1(x)), dropout_p)
        return product_of(layer.linear2, hidden)
    product, bias = product_of(layer.linear1, x)
    hidden = bias_activation_dropout(
        product,
        flat_parameter(bias, product.dtype),
        activation=fused.unit,
        gated=fused.gated,
        dropout_p=dropout_p,
    )
    return product_of(layer.linear2, hidden)


def fused_activation(activation: Activation) -> FusedActivation | None:
    """What the kernel knows the activation as; None where it does not."""
    if isinstance(activation, FusedActivation):
        return activation
    for function, name in ((F.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu")):
        if activation is function:
            return NAMED[name]
    if not isinstance(activation, nn.Module):
        return None
    if is_plain(activation, nn.ReLU):
        return NAMED["relu"]
    if is_plain(activation, nn.GELU):
        return NAMED["gelu_tanh" if activation.approximate == "tanh" else "gelu"]
    if is_plain(activation, nn.SiLU):
        return NAMED["silu"]
    return None
