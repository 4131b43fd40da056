"""The public function ``add_layer_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_same, check_seed, check_tensor
from .._philox import draw_seed
from . import cpu, reference, triton
from .contract import add_layer_norm_fused
from .reference import add_layer_norm_reference

_OP = "add_layer_norm"
BACKENDS = {"cpu": cpu, "triton": triton, "reference": reference}


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add & Norm: layer normalisation of a residual plus a dropped-out branch; differentiable.

        sum = residual + dropout(x)
        out = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias

    Post-norm layers use ``out``; pre-norm layers ask for the sum as well and carry it on.
    Statistics over the last dimension, in fp32, with the biased variance as in
    ``torch.nn.LayerNorm``. A sum that is returned is rounded to the dtype of ``x`` before it is
    normalised, so that ``out`` belongs to it; else it stays in fp32. A dropped element counts as
    0 whatever it held. Deterministic, the gradients too, for any number of threads.

    Args:
        x: ``[..., E]``, fp32, fp16 or bf16 (fp64: reference only), any strides.
        residual: Shape and dtype of ``x``; default: no residual.
        weight: ``[E]``, dtype of ``x`` or fp32; default: ones.
        bias: ``[E]``, dtype of ``x`` or fp32; default: zeros.
        eps: Added to the variance.
        dropout_p: Probability that an element of ``x`` is dropped, in [0, 1).
        seed: ``[1]`` int64 on the device of ``x``; default: drawn from PyTorch's generator.
        return_sum: Return the sum as well.
        backend: ``cpu``, ``triton``, ``cuda`` or ``reference``; default: the first that can.

    Returns:
        Shape and dtype of ``x``; with ``return_sum`` also the sum, likewise.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or a number is out of range.
        NotImplementedError: The named backend cannot run this call.

    Reference: Ba et al., 2016, https://arxiv.org/abs/1607.06450; post- and pre-norm: Xiong et
    al., 2020, https://arxiv.org/abs/2002.04745
    """
    _check(x, residual, weight, bias, eps, dropout_p, seed)
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        x.device.type,
        lambda module: module.unsupported_reasons(x, weight=weight, dropout_p=dropout_p),
        lambda: describe_tensor("x", x),
    )
    if name == "reference":
        output, total = add_layer_norm_reference(
            x,
            residual,
            weight,
            bias,
            eps=eps,
            dropout_p=dropout_p,
            seed=seed,
            return_sum=return_sum,
        )
    else:
        output, total = add_layer_norm_fused(
            x, residual, weight, bias, seed, eps, dropout_p, return_sum, name
        )
    return (output, total) if return_sum else output


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
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
        check_same(_OP, "residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(
                f"{_OP}: residual must have the shape of x, {list(x.shape)}, got "
                f"{list(residual.shape)}"
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensor(_OP, name, parameter)
            check_dtype(_OP, name, parameter, (x.dtype, torch.float32))
            check_device(_OP, name, parameter, "x", x)
            if parameter.dim() != 1 or parameter.size(0) != E:
                raise ValueError(
                    f"{_OP}: {name} must have shape [E] with E = {E} (from x), got "
                    f"{list(parameter.shape)}"
                )
    if eps < 0.0:
        raise ValueError(f"{_OP}: eps must not be negative, got {eps}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1), got {dropout_p}")
    check_seed(_OP, seed, "x", x)
