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
    differentiable: ClassVar[tuple[str, ...]] = ("x", "residual", "weight", "bias", "x_bias")

    leading: tuple[int, ...]
    width: int
    residual: bool = True
    weight: bool = True
    bias: bool = True
    x_bias: bool = False
    norm: str = "layer_norm"
    fp32_parameters: bool = False
    fp32_residual: bool = False
    fp32_sum: bool = False
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
            "norm": self.norm,
            "fp32_sum": self.fp32_sum,
        }
        fp32 = torch.promote_types(dtype, torch.float32)
        if self.residual:
            kind = fp32 if self.fp32_residual else dtype
            call["residual"] = self._lay_out(draw(*shape).to(device, kind))
        parameter = fp32 if self.fp32_parameters else dtype
        if self.weight:
            call["weight"] = (1.0 + 0.2 * draw(self.width)).to(device, parameter)
        if self.bias:
            call["bias"] = (0.2 * draw(self.width)).to(device, parameter)
        if self.x_bias:
            call["x_bias"] = (0.5 * draw(self.width)).to(device, parameter)
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
        """The sum, its statistics, normalisation, scale and shift; backward two more reductions.

        Forward, an element: an addition each for the residual and ``x_bias``, a product for
        dropout; the mean 1, squares of deviations 3 (of elements 2); normalised 1; weight 1, bias
        1. Backward: the sum again unless it was asked for, normalised 2 (1); the weight's product
        1; the reductions 3 (2); the gradient 4 (3); sums over rows 2 for the weight and 1 for each
        bias; dropout's product; the sum's own gradient 1.
        """
        layer_norm = int(self.norm == "layer_norm")
        dropped = int(self.dropout_p > 0.0)
        summed = self.residual + self.x_bias + dropped
        if not backward:
            normalised = 2 + 2 * layer_norm + 1
            return (summed + normalised + self.weight + self.bias) * self._elements
        again = (0 if self.return_sum else summed) + 1 + layer_norm
        gradient = (2 + layer_norm) + (3 + layer_norm) + self.return_sum + dropped
        parameters = 3 * self.weight + self.bias + self.x_bias
        return (again + gradient + parameters) * self._elements

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Each row tensor once; the parameters and statistics are small beside them.

        Forward reads x and the residual and writes the output, and the sum where it is asked
        for. Backward reads the gradients of the outputs and the sum, or x and the residual where
        there is none, and writes the gradient of x, and of the residual where dropout or its dtype
        makes it another.
        """
        residual = max(itemsize, 4) if self.fp32_residual else itemsize
        total = max(residual, 4) if self.fp32_sum else residual
        moved = 2 * itemsize + self.residual * residual + self.return_sum * total
        if backward:
            moved = 2 * itemsize
            if self.return_sum:
                moved += 2 * total
            else:
                moved += itemsize + self.residual * residual
            if self.residual and (self.dropout_p > 0.0 or residual != itemsize):
                moved += residual
        return moved * self._elements


def _benchmark(rows: int, width: int, suffix: str = "", **flags: Any) -> AddLayerNormCase:
    return AddLayerNormCase(
        name=f"{rows}x{width}{suffix}", kind="benchmark", leading=(rows,), width=width, **flags
    )


def _edge(name: str, *leading: int, width: int, **flags: Any) -> AddLayerNormCase:
    return AddLayerNormCase(name=name, kind="edge", leading=leading, width=width, **flags)


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
        x_bias=True,
        dropout_p=0.3,
        return_sum=True,
    ),
    AddLayerNormCase(
        name="typical_rms_norm",
        kind="typical",
        leading=(2, 5),
        width=64,
        norm="rms_norm",
        bias=False,
        return_sum=True,
        fp32_sum=True,
    ),
    AddLayerNormCase(
        name="plain_layer_norm", kind="typical", leading=(3, 5), width=33, residual=False
    ),
    _edge("plain_rms_norm", 3, 5, width=33, residual=False, bias=False, norm="rms_norm"),
    _edge("no_parameters", 2, 3, width=20, weight=False, bias=False),
    _edge("weight_only", 5, width=17, bias=False),
    _edge("bias_only", 5, width=17, weight=False),
    _edge("x_bias_only", 5, width=17, weight=False, bias=False, residual=False, x_bias=True),
    _edge("x_bias", 3, 4, width=40, x_bias=True),
    _edge("x_bias_dropout", 3, 4, width=37, x_bias=True, dropout_p=0.4),
    _edge("rms_everything", 4, 3, width=45, norm="rms_norm", x_bias=True, dropout_p=0.2, bias=True),
    _edge("small_smooth", 2, 3, width=5, return_sum=True, x_bias=True, gradcheck=True),
    _edge(
        "small_smooth_dropout",
        3,
        width=7,
        x_bias=True,
        dropout_p=0.4,
        return_sum=True,
        gradcheck=True,
    ),
    _edge("small_smooth_rms", 2, 3, width=6, norm="rms_norm", dropout_p=0.2, gradcheck=True),
    _edge("one_vector", width=31),
    _edge("width_1", 4, width=1),
    _edge("width_1_rms", 4, width=1, norm="rms_norm"),
    _edge("width_3", 4, width=3),
    _edge("width_prime", 3, width=1021, x_bias=True),
    _edge("width_4099", 2, width=4099, dropout_p=0.1),
    _edge("width_8195_rms", 2, width=8195, norm="rms_norm", x_bias=True, return_sum=True),
    _edge("width_65536", 2, width=65536),
    _edge("no_rows", 0, 4, width=16, return_sum=True, x_bias=True),
    _edge("many_rows", 257, width=12, return_sum=True, x_bias=True),
    _edge("transposed", 3, 4, width=24, layout="transposed"),
    _edge("sliced_rows", 3, 4, width=24, layout="sliced", dropout_p=0.2),
    _edge("fp32_parameters", 2, 5, width=40, fp32_parameters=True, x_bias=True),
    _edge("fp32_residual", 2, 5, width=40, fp32_residual=True),
    _edge(
        "fp32_residual_pre_norm",
        3,
        5,
        width=43,
        fp32_residual=True,
        fp32_parameters=True,
        return_sum=True,
        x_bias=True,
        dropout_p=0.1,
    ),
    _edge("fp32_sum", 2, 5, width=24, fp32_sum=True, return_sum=True),
    _edge("fp32_sum_of_x_alone", 2, 5, width=24, fp32_sum=True, return_sum=True, residual=False),
    # A variance taken as E[x^2] - E[x]^2 in fp32 has no correct digit here.
    _edge(
        "mean_1e4_deviations",
        4,
        width=512,
        residual=False,
        offset=1e4,
        dtypes=(torch.float32,),
    ),
    _edge(
        "mean_1e4_deviations_long_rows",
        2,
        width=9001,
        residual=False,
        offset=1e4,
        dtypes=(torch.float32,),
    ),
    _benchmark(512, 512),
    _benchmark(4096, 512),
    _benchmark(4096, 512, "_bias_dropout", x_bias=True, dropout_p=0.1),
    _benchmark(4096, 1024),
    _benchmark(4096, 1024, "_dropout", dropout_p=0.1),
    _benchmark(4096, 1024, "_pre_norm", x_bias=True, dropout_p=0.1, return_sum=True),
    _benchmark(4096, 1021),
    _benchmark(2048, 2048),
    _benchmark(1024, 4096),
    _benchmark(16384, 1024),
    _benchmark(4096, 1024, "_rms", norm="rms_norm", bias=False),
    _benchmark(512, 256, "_gpu", gpu_only=True),
    _benchmark(16384, 1024, "_gpu", gpu_only=True),
    _benchmark(16384, 2048, "_gpu", gpu_only=True),
    _benchmark(16384, 4096, "_gpu", gpu_only=True),
    _benchmark(16384, 4096, "_rms_gpu", gpu_only=True, norm="rms_norm", bias=False),
    _benchmark(
        16384, 4096, "_pre_norm_gpu", gpu_only=True, x_bias=True, dropout_p=0.1, return_sum=True
    ),
    _benchmark(16384, 8192, "_gpu", gpu_only=True),
)
