"""The public function ``bias_activation_dropout``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_same, check_seed, check_tensor
from .._philox import draw_seed
from . import cpu, reference, triton
from .contract import IDENTITY, bias_activation_dropout_fused
from .reference import bias_activation_dropout_reference

_OP = "bias_activation_dropout"
BACKENDS = {"cpu": cpu, "triton": triton, "reference": reference}
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid")


def bias_activation_dropout(
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"] | None = "relu",
    gated: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What follows the first matrix product of a feed-forward layer; differentiable.

        out = residual + dropout(activation(x + bias))
        out = residual + dropout(activation(gate) * value)       gated: gate, value = x + bias

    With a gate the first half of ``x + bias`` is the gate and the second the value, as in the
    weights of SwiGLU; ``torch.nn.functional.glu`` has them the other way round. Computes in fp32
    and rounds once, at the store. A dropped element counts as 0 whatever it held, and has no
    gradient. Only ``x``, ``bias`` and the seed are kept for the backward, which computes the rest
    again. The derivative of relu at 0 is 0. Deterministic, the gradients too, for any number of
    threads.

    Args:
        x: ``[..., F]``, gated ``[..., 2 F]``; fp32, fp16 or bf16 (fp64: reference only), any
            strides.
        bias: ``[F]``, gated ``[2 F]``; dtype of ``x`` or fp32; default: zeros.
        residual: ``[..., F]``, dtype of ``x``; default: no residual.
        activation: ``"relu"``; ``"gelu"``, by the error function; ``"gelu_tanh"``, its
            approximation by tanh; ``"silu"``, x sigmoid(x); ``"sigmoid"``; None: the identity.
        gated: The activation of one half of ``x`` multiplies the other.
        dropout_p: Probability that an element is dropped, in [0, 1).
        seed: ``[1]`` int64 on the device of ``x``; default: drawn from PyTorch's generator.
        backend: ``cpu``, ``triton`` or ``reference``; default: the first that can.

    Returns:
        ``[..., F]`` in the dtype of ``x``.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, there is no activation of that name, or a number
            is out of range.
        NotImplementedError: The named backend cannot run this call.

    Reference: GELU: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415; gates: Shazeer,
    2020, https://arxiv.org/abs/2002.05202; dropout: Srivastava et al., 2014,
    https://jmlr.org/papers/v15/srivastava14a.html
    """
    _check(x, bias, residual, activation, gated, dropout_p, seed)
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        x,
        lambda module: module.unsupported_reasons(x),
        lambda: describe_tensor("x", x),
    )
    kind = IDENTITY if activation is None else activation
    if name == "reference":
        return bias_activation_dropout_reference(
            x, bias, residual, activation=kind, gated=gated, dropout_p=dropout_p, seed=seed
        )
    return bias_activation_dropout_fused(x, bias, residual, seed, kind, gated, dropout_p, name)


def _check(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    check_tensor(_OP, "x", x)
    check_floating(_OP, "x", x)
    halves = 2 if gated else 1
    columns = "2 F" if gated else "F"
    if x.dim() == 0 or x.size(-1) == 0 or x.size(-1) % halves != 0:
        raise ValueError(
            f"{_OP}: x must have shape [..., {columns}] with F >= 1, got {list(x.shape)}"
        )
    F = x.size(-1) // halves
    if bias is not None:
        check_tensor(_OP, "bias", bias)
        check_dtype(_OP, "bias", bias, (x.dtype, torch.float32))
        check_device(_OP, "bias", bias, "x", x)
        if bias.dim() != 1 or bias.size(0) != x.size(-1):
            raise ValueError(
                f"{_OP}: bias must have shape [{columns}] with F = {F} (from x), got "
                f"{list(bias.shape)}"
            )
    if residual is not None:
        check_tensor(_OP, "residual", residual)
        check_same(_OP, "residual", residual, "x", x)
        if residual.shape != (*x.shape[:-1], F):
            raise ValueError(
                f"{_OP}: residual must have the shape of the output, {[*x.shape[:-1], F]}, got "
                f"{list(residual.shape)}"
            )
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(
            f"{_OP}: activation must be one of {', '.join(_ACTIVATIONS)} or None, got "
            f"{activation!r}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1), got {dropout_p}")
    check_seed(_OP, seed, "x", x)
