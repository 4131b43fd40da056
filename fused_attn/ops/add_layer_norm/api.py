"""The public function ``add_layer_norm``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_seed, check_tensor
from .._philox import draw_seed
from . import cpu, cuda, reference, triton
from .contract import add_layer_norm_fused
from .reference import add_layer_norm_reference

_OP = "add_layer_norm"
BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_sum: bool = False,
    fp32_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add & Norm: normalisation of a residual plus a dropped-out branch; differentiable.

        sum = residual + dropout(x + x_bias)
        out = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias    (layer_norm)
        out = sum / sqrt(mean(sum ** 2) + eps) * weight + bias            (rms_norm)

    Post-norm layers use ``out``; pre-norm layers ask for the sum as well and carry it on.
    ``x_bias`` is the bias of the linear layer that made ``x``, which adds and differentiates it
    for nothing here. Statistics over the last dimension, in fp32, with the biased variance as in
    ``torch.nn.LayerNorm``. A sum that is returned is rounded to its dtype before it is
    normalised, so that ``out`` belongs to it; else it stays in fp32. A dropped element counts as
    0 whatever it held. Deterministic, the gradients too, for any number of threads.

    Args:
        x: ``[..., E]``, fp32, fp16 or bf16 (fp64: reference only), any strides.
        residual: Shape of ``x``, dtype of ``x`` or fp32; default: no residual.
        weight: ``[E]``, dtype of ``x`` or fp32; default: ones.
        bias: ``[E]``, dtype of ``x`` or fp32; default: zeros.
        x_bias: ``[E]``, dtype of ``x`` or fp32, added to ``x`` before dropout; default: zeros.
        norm: Which normalisation.
        eps: Added to the variance, or to the mean square.
        dropout_p: Probability that an element of ``x + x_bias`` is dropped, in [0, 1).
        seed: ``[1]`` int64 on the device of ``x``; default: drawn from PyTorch's generator.
        return_sum: Return the sum as well.
        fp32_sum: Return it in fp32: a residual stream that is not rounded layer by layer.
        backend: ``cpu``, ``triton``, ``cuda`` or ``reference``; default: the first that can.

    Returns:
        Shape and dtype of ``x``; with ``return_sum`` also the sum, in the wider dtype of ``x`` and
        ``residual``, or fp32.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, a number is out of range, or there is no such norm.
        NotImplementedError: The named backend cannot run this call.

    Reference: Ba et al., 2016, https://arxiv.org/abs/1607.06450; RMSNorm: Zhang and Sennrich,
    2019, https://arxiv.org/abs/1910.07467; post- and pre-norm: Xiong et al., 2020,
    https://arxiv.org/abs/2002.04745
    """
    _check(x, residual, weight, bias, x_bias, norm, eps, dropout_p, seed)
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    is_rms = norm == "rms_norm"
    sum_dtype = None
    if return_sum:
        sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if fp32_sum:
            sum_dtype = torch.promote_types(sum_dtype, torch.float32)
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        x,
        lambda module: module.unsupported_reasons(x),
        lambda: describe_tensor("x", x),
    )
    if name == "reference":
        output, total = add_layer_norm_reference(
            x,
            residual,
            weight,
            bias,
            x_bias=x_bias,
            is_rms=is_rms,
            eps=eps,
            dropout_p=dropout_p,
            seed=seed,
            sum_dtype=sum_dtype,
        )
    else:
        output, total = add_layer_norm_fused(
            x, x_bias, residual, weight, bias, seed, eps, dropout_p, is_rms, sum_dtype, name
        )
    return (output, total) if return_sum else output


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    norm: str,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    check_tensor(_OP, "x", x)
    check_floating(_OP, "x", x)
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"{_OP}: x must have shape [..., E] with E >= 1, got {list(x.shape)}")
    E = x.size(-1)
    if residual is not None:
        check_tensor(_OP, "residual", residual)
        check_dtype(_OP, "residual", residual, (x.dtype, torch.float32))
        check_device(_OP, "residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(
                f"{_OP}: residual must have the shape of x, {list(x.shape)}, got "
                f"{list(residual.shape)}"
            )
    for name, parameter in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if parameter is not None:
            check_tensor(_OP, name, parameter)
            check_dtype(_OP, name, parameter, (x.dtype, torch.float32))
            check_device(_OP, name, parameter, "x", x)
            if parameter.dim() != 1 or parameter.size(0) != E:
                raise ValueError(
                    f"{_OP}: {name} must have shape [E] with E = {E} (from x), got "
                    f"{list(parameter.shape)}"
                )
    if norm not in ("layer_norm", "rms_norm"):
        raise ValueError(f"{_OP}: norm must be 'layer_norm' or 'rms_norm', got {norm!r}")
    if not eps >= 0.0:
        raise ValueError(f"{_OP}: eps must not be negative, got {eps}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1), got {dropout_p}")
    check_seed(_OP, seed, "x", x)
