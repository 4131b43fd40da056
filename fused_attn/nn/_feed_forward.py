"""The feed-forward network of a Transformer layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.ops import bias_activation_dropout

from ._linear import Product, is_plain, product_of
from ._norm_inputs import flat_parameter

Activation = Callable[[Tensor], Tensor]
_Kernel = tuple[Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"], bool]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def glu(x: Tensor) -> Tensor:
    """``sigmoid(gate) * value``; like the others, the first half of ``[..., 2 F]`` is the gate."""
    gate, value = x.chunk(2, -1)
    return F.sigmoid(gate) * value


def reglu(x: Tensor) -> Tensor:
    """``relu(gate) * value``."""
    gate, value = x.chunk(2, -1)
    return F.relu(gate) * value


def geglu(x: Tensor) -> Tensor:
    """``gelu(gate) * value``."""
    gate, value = x.chunk(2, -1)
    return F.gelu(gate) * value


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * value``."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


NAMED: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "glu": glu,
    "reglu": reglu,
    "geglu": geglu,
    "swiglu": swiglu,
}
"""Activations by name, of which the last four are gated: Shazeer, 2020,
https://arxiv.org/abs/2002.05202"""

GATED = frozenset({"glu", "reglu", "geglu", "swiglu"})

# The kernel's arguments `activation` and `gated`.
_FUSED: tuple[tuple[Activation, _Kernel], ...] = (
    (F.relu, ("relu", False)),
    (F.gelu, ("gelu", False)),
    (gelu_tanh, ("gelu_tanh", False)),
    (F.silu, ("silu", False)),
    (glu, ("sigmoid", True)),
    (reglu, ("relu", True)),
    (geglu, ("gelu", True)),
    (swiglu, ("silu", True)),
)


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


def hidden_width(dim_feedforward: int, activation: Any) -> int:
    """Outputs of the first linear layer: twice as many where half of them are gates."""
    return 2 * dim_feedforward if activation in GATED else dim_feedforward


def feed_forward(
    linear1: nn.Module, activation: Activation, dropout_p: float, linear2: nn.Module, x: Tensor
) -> Product:
    """``linear2(dropout(activation(linear1(x))))``, with the last bias still to be added.

    The first bias, activation and dropout are one kernel where the activation is one that it knows.
    """
    fused = _fused_form(activation)
    if fused is None:
        return product_of(linear2, F.dropout(activation(linear1(x)), dropout_p))
    name, gated = fused
    product, bias = product_of(linear1, x)
    hidden = bias_activation_dropout(
        product,
        flat_parameter(bias, product.dtype),
        activation=name,
        gated=gated,
        dropout_p=dropout_p,
    )
    return product_of(linear2, hidden)


def _fused_form(activation: Activation) -> _Kernel | None:
    for function, kernel in _FUSED:
        if activation is function:
            return kernel
    if not isinstance(activation, nn.Module):
        return None
    if is_plain(activation, nn.ReLU):
        return "relu", False
    if is_plain(activation, nn.GELU):
        return ("gelu_tanh" if activation.approximate == "tanh" else "gelu"), False
    if is_plain(activation, nn.SiLU):
        return "silu", False
    return None
