"""Named cases of ``add_layer_norm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._cases import Case
from .api import add_layer_norm


@dataclass(frozen=True, kw_only=True)
class AddLayerNormCase(Case):
    """``add_layer_norm`` on ``[*leading, width]``."""

    op: ClassVar[str] = "add_layer_norm"
    differentiable: ClassVar[tuple[str, ...]] = ("x", "residual", "weight", "bias")

    leading: tuple[int, ...]
    width: int
    residual: bool = True
    weight: bool = True
    bias: bool = True
    fp32_parameters: bool = False
    dropout_p: float = 0.0
    return_sum: bool = False
    offset: float = 0.0
    """Added to every element of ``x``: a mean far from zero."""
    layout: str = "contiguous"
    """``contiguous``, ``transposed`` (leading dimensions) or ``sliced`` (rows with gaps)."""
    eps: float = 1e-5

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Standard normal values; weights around 1."""
        shape = (*self.leading, self.width)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        call: dict[str, Any] = {
            "x": self._lay_out((draw(*shape) + self.offset).to(device, dtype)),
            "eps": self.eps,
            "dropout_p": self.dropout_p,
            "return_sum": self.return_sum,
        }
        if self.residual:
            call["residual"] = self._lay_out(draw(*shape).to(device, dtype))
        parameter = torch.float32 if self.fp32_parameters and dtype != torch.float64 else dtype
        if self.weight:
            call["weight"] = (1.0 + 0.2 * draw(self.width)).to(device, parameter)
        if self.bias:
            call["bias"] = (0.2 * draw(self.width)).to(device, parameter)
        if self.dropout_p > 0.0:
            call["seed"] = torch.tensor([20260806], dtype=torch.int64, device=device)
        return call

    def _lay_out(self, tensor: Tensor) -> Tensor:
        if self.layout == "transposed":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "sliced":
            wide = tensor.new_zeros(*tensor.shape[:-1], tensor.size(-1) + 7)
            wide[..., : tensor.size(-1)] = tensor
            return wide[..., : tensor.size(-1)]
        return tensor

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Output, and the sum where it is asked for."""
        result = add_layer_norm(**inputs, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    @property
    def _elements(self) -> int:
        count = self.width
        for size in self.leading:
            count *= size
        return count

    def flops(self, backward: bool = False) -> int:
        """About 8 an element forward (sum, mean, variance, scale, shift) and 14 backward."""
        return (14 if backward else 8) * self._elements

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Each row tensor once; the parameters and statistics are small beside them.

        Forward reads x and the residual and writes the output, and the sum where it is asked
        for. Backward reads the gradients of the outputs and the sum, or x and the residual where
        there is none, and writes the gradient of x, and of the residual where dropout makes it
        another.
        """
        tensors = 2 + self.residual + self.return_sum
        if backward:
            addends = 1 if self.return_sum else 1 + self.residual
            dropped = self.residual and self.dropout_p > 0.0
            tensors = 2 + self.return_sum + addends + dropped
        return tensors * itemsize * self._elements


def _benchmark(rows: int, width: int, **flags: Any) -> AddLayerNormCase:
    suffix = "_dropout" if flags.get("dropout_p") else ""
    return AddLayerNormCase(
        name=f"{rows}x{width}{suffix}", kind="benchmark", leading=(rows,), width=width, **flags
    )


CASES: tuple[AddLayerNormCase, ...] = (
    AddLayerNormCase(name="typical", kind="typical", leading=(2, 5), width=64),
    AddLayerNormCase(
        name="typical_pre_norm", kind="typical", leading=(3, 4), width=96, return_sum=True
    ),
    AddLayerNormCase(
        name="typical_dropout",
        kind="typical",
        leading=(2, 7),
        width=48,
        dropout_p=0.3,
        return_sum=True,
    ),
    AddLayerNormCase(
        name="plain_layer_norm", kind="typical", leading=(3, 5), width=33, residual=False
    ),
    AddLayerNormCase(
        name="no_parameters", kind="edge", leading=(2, 3), width=20, weight=False, bias=False
    ),
    AddLayerNormCase(name="weight_only", kind="edge", leading=(5,), width=17, bias=False),
    AddLayerNormCase(name="bias_only", kind="edge", leading=(5,), width=17, weight=False),
    AddLayerNormCase(
        name="small_smooth",
        kind="edge",
        leading=(2, 3),
        width=5,
        return_sum=True,
        gradcheck=True,
    ),
    AddLayerNormCase(
        name="small_smooth_dropout",
        kind="edge",
        leading=(3,),
        width=7,
        dropout_p=0.4,
        return_sum=True,
        gradcheck=True,
    ),
    AddLayerNormCase(name="one_vector", kind="edge", leading=(), width=31),
    AddLayerNormCase(name="width_1", kind="edge", leading=(4,), width=1),
    AddLayerNormCase(name="width_3", kind="edge", leading=(4,), width=3),
    AddLayerNormCase(name="width_prime", kind="edge", leading=(3,), width=1021),
    AddLayerNormCase(name="width_4099", kind="edge", leading=(2,), width=4099, dropout_p=0.1),
    AddLayerNormCase(name="width_65536", kind="edge", leading=(2,), width=65536),
    AddLayerNormCase(name="no_rows", kind="edge", leading=(0, 4), width=16, return_sum=True),
    AddLayerNormCase(name="many_rows", kind="edge", leading=(257,), width=12, return_sum=True),
    AddLayerNormCase(name="transposed", kind="edge", leading=(3, 4), width=24, layout="transposed"),
    AddLayerNormCase(
        name="sliced_rows", kind="edge", leading=(3, 4), width=24, layout="sliced", dropout_p=0.2
    ),
    AddLayerNormCase(
        name="fp32_parameters", kind="edge", leading=(2, 5), width=40, fp32_parameters=True
    ),
    # A variance taken as E[x^2] - E[x]^2 in fp32 has no correct digit here.
    AddLayerNormCase(
        name="mean_1e4_deviations",
        kind="edge",
        leading=(4,),
        width=512,
        residual=False,
        offset=1e4,
        dtypes=(torch.float32,),
    ),
    _benchmark(4096, 512),
    _benchmark(4096, 1024),
    _benchmark(4096, 1024, dropout_p=0.1),
    _benchmark(16384, 1024),
)
