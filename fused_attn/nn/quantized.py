"""Linear layers with 8-bit weights, for inference on a CPU."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# torch announces the end of its quantised tensors; the product itself has no other door yet.
_DEPRECATION = ".*quantized tensor creation functions.*"


def quantization_unavailable_reason() -> str:
    """Why :class:`QuantizedLinear` cannot work in this installation; empty if it can."""
    if torch.backends.quantized.engine in ("none", None):
        return "this torch has no engine for quantised products on this CPU"
    if not hasattr(torch, "quantize_per_channel"):
        return "this torch has no quantised tensors"
    return ""


class QuantizedLinear:
    """``F.linear`` with int8 weights, one scale for each output, and 8-bit activations.

    The weight is rounded to ``scale * q``, q in -127..127, with the scale that lets the largest
    weight of an output be 127. The activations of a call are rounded to 8 bits between their least
    and largest; so a row's result depends slightly on the other rows. Sums are exact integers.

    Args:
        weight: ``[out, in]`` fp32 on the CPU; copied.
        bias: ``[out]``; copied.

    Raises:
        RuntimeError: torch has no quantised products here.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        reason = quantization_unavailable_reason()
        if reason:
            raise RuntimeError(f"QuantizedLinear: weight cannot be quantised: {reason}")
        weight = weight.detach().contiguous()
        scales = weight.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / 127.0
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _DEPRECATION, UserWarning)
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if bias is None else bias.detach()
        self._packed = torch.ops.quantized.linear_prepack(rounded, bias)
        # Without these instructions pairs of products are added in 16 bits, which 8-bit
        # activations would overflow.
        self._seven_bits = not torch.cpu._is_vnni_supported()
        self._product = torch.ops.quantized.linear_dynamic.default
        self._relu_product = torch.ops.quantized.linear_relu_dynamic.default

    def __call__(self, rows: Tensor, activation: str = "none") -> Tensor:
        """``rows @ weight^T + bias``, then the activation.

        Args:
            rows: ``[M, in]`` fp32.
            activation: ``"none"`` or ``"relu"``.
        """
        product = self._relu_product if activation == "relu" else self._product
        return product(rows, self._packed, self._seven_bits)
