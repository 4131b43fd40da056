"""Named cases of ``bias_activation_dropout``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._cases import ELEMENTARY, Case
from .api import bias_activation_dropout

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"] | None

# Operations of an activation; of its derivative, beside a product with it; of both.
_FLOPS: dict[str | None, tuple[int, int, int]] = {
    None: (0, 0, 0),
    "relu": (1, 0, 1),
    "sigmoid": (ELEMENTARY, ELEMENTARY, ELEMENTARY + 2),
    "silu": (ELEMENTARY, ELEMENTARY, ELEMENTARY + 4),
    "gelu": (ELEMENTARY, ELEMENTARY, 2 * ELEMENTARY),
    "gelu_tanh": (ELEMENTARY, ELEMENTARY, 2 * ELEMENTARY),
}


@dataclass(frozen=True, kw_only=True)
class BiasActivationDropoutCase(Case):
    """``bias_activation_dropout`` with an output ``[*leading, width]``."""

    op: ClassVar[str] = "bias_activation_dropout"
    differentiable: ClassVar[tuple[str, ...]] = ("x", "bias", "residual")

    leading: tuple[int, ...]
    width: int
    activation: Activation = "relu"
    gated: bool = False
    bias: bool = True
    residual: bool = False
    fp32_parameters: bool = False
    dropout_p: float = 0.0
    offset: float = 0.0
    """Added to every element of ``x``."""
    scale: float = 1.0
    """Of the elements of ``x``."""
    layout: str = "contiguous"
    """``contiguous``, ``transposed`` (leading dimensions), ``sliced`` (rows with gaps),
    ``columns_first`` or ``expanded`` (one row many times)."""

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Normal values; a bias of half their size."""
        columns = self.width * (2 if self.gated else 1)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        x = draw(*self.leading, columns) * self.scale + self.offset
        call: dict[str, Any] = {
            "x": self._lay_out(x.to(device, dtype)),
            "activation": self.activation,
            "gated": self.gated,
            "dropout_p": self.dropout_p,
        }
        if self.bias:
            wide = self.fp32_parameters and dtype != torch.float64
            call["bias"] = (0.5 * draw(columns)).to(device, torch.float32 if wide else dtype)
        if self.residual:
            call["residual"] = self._lay_out(draw(*self.leading, self.width).to(device, dtype))
        if self.dropout_p > 0.0:
            call["seed"] = torch.tensor([20261014], dtype=torch.int64, device=device)
        return call

    def _lay_out(self, tensor: Tensor) -> Tensor:
        if self.layout == "transposed":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "sliced":
            wide = tensor.new_zeros(*tensor.shape[:-1], tensor.size(-1) + 7)
            wide[..., : tensor.size(-1)] = tensor
            return wide[..., : tensor.size(-1)]
        if self.layout == "columns_first":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if self.layout == "expanded":
            return tensor[..., :1, :].expand_as(tensor)
        return tensor

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Output."""
        return (bias_activation_dropout(**inputs, backend=backend),)

    @property
    def _halves(self) -> int:
        return 2 if self.gated else 1

    @property
    def _elements(self) -> int:
        return math.prod(self.leading) * self.width

    def flops(self, backward: bool = False) -> int:
        """The additions, the activation, and a multiplication each for gate and dropout.

        Backward the derivative, with a gate the activation as well; a multiplication by each, one
        for dropout; the bias again and the sums of its gradient. Random numbers are integers and
        not counted.
        """
        forward, derivative, both = _FLOPS[self.activation]
        dropped = int(self.dropout_p > 0.0)
        bias = self._halves * self.bias
        if not backward:
            return self._elements * (forward + bias + self.gated + dropped + self.residual)
        if self.gated:
            return self._elements * (both + 3 + 2 * bias + dropped)
        if self.activation is None:
            return self._elements * (bias + dropped)
        return self._elements * (derivative + 1 + 2 * bias + dropped)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Each row tensor once; the bias and its gradient are small beside them.

        Forward reads x and the residual and writes the output. Backward reads the gradient of the
        output, and x where there is an activation or a gate, and writes the gradient of x, unless
        it is the output's.
        """
        passes = self.activation is None and not self.gated
        if not backward:
            tensors = self._halves + self.residual + 1
        elif not passes:
            tensors = 1 + 2 * self._halves
        elif self.dropout_p > 0.0:
            tensors = 2
        else:
            tensors = int(self.bias)
        return tensors * itemsize * self._elements


def _benchmark(
    rows: int, width: int, activation: Activation, **flags: Any
) -> BiasActivationDropoutCase:
    words = [f"{rows}x{width}", *(["gated"] if flags.get("gated") else []), str(activation)]
    words += ["dropout"] if flags.get("dropout_p") else []
    return BiasActivationDropoutCase(
        name="_".join(words),
        kind="benchmark",
        leading=(rows,),
        width=width,
        activation=activation,
        **flags,
    )


def _edge(name: str, leading: tuple[int, ...], width: int, **flags: Any) -> Any:
    return BiasActivationDropoutCase(name=name, kind="edge", leading=leading, width=width, **flags)


_ACTIVATIONS: tuple[Activation, ...] = (None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid")
_SMOOTH: tuple[Activation, ...] = ("gelu", "gelu_tanh", "silu", "sigmoid")
_WIDE_RANGE = (torch.float32, torch.bfloat16)

CASES: tuple[BiasActivationDropoutCase, ...] = (
    BiasActivationDropoutCase(name="typical", kind="typical", leading=(2, 5), width=64),
    BiasActivationDropoutCase(
        name="typical_gelu_dropout",
        kind="typical",
        leading=(2, 7),
        width=48,
        activation="gelu",
        dropout_p=0.3,
    ),
    BiasActivationDropoutCase(
        name="typical_swiglu",
        kind="typical",
        leading=(3, 4),
        width=88,
        activation="silu",
        gated=True,
        bias=False,
    ),
    BiasActivationDropoutCase(
        name="typical_residual_dropout",
        kind="typical",
        leading=(3, 5),
        width=33,
        activation=None,
        residual=True,
        dropout_p=0.2,
    ),
    *(
        _edge(
            f"{'gated_' if gated else ''}{activation or 'identity'}",
            (3, 4),
            37,
            activation=activation,
            gated=gated,
            residual=True,
            dropout_p=0.25,
        )
        for activation in _ACTIVATIONS
        for gated in (False, True)
    ),
    *(
        _edge(f"smooth_{activation}", (2, 3), 5, activation=activation, gradcheck=True)
        for activation in _SMOOTH
    ),
    _edge(
        "smooth_gated_dropout",
        (3,),
        6,
        activation="silu",
        gated=True,
        residual=True,
        dropout_p=0.4,
        gradcheck=True,
    ),
    _edge("smooth_bilinear", (3,), 5, activation=None, gated=True, gradcheck=True),
    # Where 1 + erf(x) and 1 + tanh(x) have no correct digit.
    *(
        _edge(
            f"far_below_{activation}",
            (4,),
            200,
            activation=activation,
            offset=-8.0,
            dtypes=_WIDE_RANGE,
        )
        for activation in ("gelu", "gelu_tanh", "silu")
    ),
    *(
        _edge(f"large_{activation}", (4,), 96, activation=activation, scale=1e4)
        for activation in ("relu", "gelu", "gelu_tanh", "silu")
    ),
    _edge("large_sigmoid", (4,), 96, activation="sigmoid", scale=20.0),
    # Whose square is infinite in fp32.
    *(
        _edge(f"huge_{activation}", (4,), 96, activation=activation, scale=1e25, dtypes=_WIDE_RANGE)
        for activation in ("gelu", "gelu_tanh")
    ),
    _edge("no_bias", (2, 3), 20, bias=False, activation="gelu_tanh"),
    _edge("only_x", (2, 3), 20, bias=False, activation=None),
    _edge("only_residual", (2, 3), 20, bias=False, activation=None, residual=True),
    _edge("bias_and_residual", (2, 3), 21, activation=None, residual=True),
    _edge("fp32_parameters", (2, 5), 40, activation="gelu", fp32_parameters=True, dropout_p=0.1),
    _edge("fp32_parameters_gated", (2, 5), 40, gated=True, fp32_parameters=True),
    _edge("one_vector", (), 31, activation="silu"),
    _edge("width_1", (4,), 1, activation="gelu"),
    _edge("width_1_gated_dropout", (9,), 1, activation="sigmoid", gated=True, dropout_p=0.5),
    _edge("width_3", (4,), 3, dropout_p=0.3),
    _edge("width_prime", (3,), 1021, activation="gelu", dropout_p=0.1),
    _edge("width_4099", (2,), 4099, activation="silu", gated=True, dropout_p=0.1),
    _edge("width_16411", (1,), 16411, dropout_p=0.1),
    _edge("width_20480", (1,), 20480, activation="gelu_tanh"),
    _edge("no_rows", (0, 4), 16, activation="gelu", dropout_p=0.1),
    _edge("many_rows", (257,), 12, activation="gelu"),
    _edge("many_rows_gated", (1100,), 5, activation="silu", gated=True),
    _edge("transposed", (3, 4), 24, layout="transposed", residual=True),
    _edge("transposed_gated", (3, 4), 24, layout="transposed", gated=True, activation="sigmoid"),
    _edge("columns_first", (3, 4), 24, layout="columns_first", activation="silu"),
    _edge("expanded_rows", (3, 4), 24, layout="expanded", dropout_p=0.2, residual=True),
    _edge("sliced_rows", (3, 4), 24, layout="sliced", activation="gelu", dropout_p=0.2),
    _edge("sliced_rows_gated", (3, 4), 23, layout="sliced", gated=True, residual=True),
    _edge("mostly_dropped", (5,), 70, dropout_p=0.95, activation="gelu"),
    _benchmark(4096, 2048, "relu", dropout_p=0.1),
    _benchmark(2048, 4096, "relu", dropout_p=0.1),
    _benchmark(4096, 2048, "gelu", dropout_p=0.1),
    _benchmark(4096, 1376, "silu", gated=True),
    _benchmark(64, 2048, "relu", dropout_p=0.1),
    _benchmark(4096, 2048, "gelu"),
    *(
        _benchmark(16384, width, "gelu", dropout_p=0.1, gpu_only=True, dtypes=(torch.bfloat16,))
        for width in (4096, 8192)
    ),
    _benchmark(16384, 5504, "silu", gated=True, gpu_only=True, dtypes=(torch.bfloat16,)),
)
