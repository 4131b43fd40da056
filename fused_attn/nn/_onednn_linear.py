"""``F.linear`` in training on a CPU by oneDNN, where that is faster than PyTorch's choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .packed import PackedLinear, packing_unavailable_reason

# Below, laying out the weight takes longer than its layout saves.
_FEWEST_ROWS = 256


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight^T + bias`` of rows ``[N, in]``, whose weight is laid out for each call.

    The product and the gradient of ``rows`` are oneDNN's in fp32 on a CPU and with many rows; else
    this is ``F.linear``.
    """
    if (
        rows.size(0) < _FEWEST_ROWS
        or rows.device.type != "cpu"
        or rows.dtype != torch.float32
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or packing_unavailable_reason() != ""
    ):
        return F.linear(rows, weight, bias)
    return _OneDNNLinear.apply(rows, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return PackedLinear(weight, bias)(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        need_rows, need_weight, need_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            PackedLinear(weight.t())(grad) if need_rows else None,
            grad.t() @ rows if need_weight else None,
            grad.sum(0) if need_bias else None,
        )
