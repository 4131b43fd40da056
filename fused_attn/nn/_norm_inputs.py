"""What the normalisations do with their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_attn.ops import bias_activation_dropout


def check_trailing(name: str, x: Tensor, inner: Sequence[int]) -> None:
    """Raise ValueError unless the last dimensions are these."""
    if x.dim() < len(inner) or tuple(x.shape[x.dim() - len(inner) :]) != tuple(inner):
        raise ValueError(
            f"{name}: input must have shape [..., {', '.join(map(str, inner))}], got "
            f"{list(x.shape)}"
        )


def check_residual(name: str, x: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError unless the residual, where there is one, has the shape of ``x``."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{name}: residual must have the shape of x, {list(x.shape)}, got "
            f"{list(residual.shape)}"
        )


def promoted(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in the wider of their dtypes."""
    if residual is None or residual.dtype == x.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def flat_parameter(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The parameter as ``[E]``, in a dtype that the ops take beside an input of ``dtype``."""
    if parameter is None:
        return None
    if parameter.dtype not in (dtype, torch.float32):
        parameter = parameter.to(dtype)
    return parameter.flatten()


def check_padding(name: str, x: Tensor, padding: Tensor | None) -> None:
    """Raise unless the padding, where there is one, is bool and has the rows of ``x``."""
    if padding is None:
        return
    if padding.dtype != torch.bool:
        dtype = str(padding.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: padding must have dtype bool, got {dtype}")
    if padding.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: padding must have the rows of x, {list(x.shape[:-1])}, got "
            f"{list(padding.shape)}"
        )


def add_residual(
    name: str, x: Tensor, residual: Tensor | None, x_bias: Tensor | None, dropout_p: float
) -> Tensor:
    """``residual + dropout(x + x_bias)`` in one kernel, in the wider dtype.

    Raises:
        ValueError: The residual has another shape.
    """
    check_residual(name, x, residual)
    if residual is None and x_bias is None and dropout_p == 0.0:
        return x
    x, residual = promoted(x, residual)
    return bias_activation_dropout(
        x, flat_parameter(x_bias, x.dtype), residual, activation=None, dropout_p=dropout_p
    )
