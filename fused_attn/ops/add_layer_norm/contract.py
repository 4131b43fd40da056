"""Schemas, fakes and autograd of ``add_layer_norm``, shared by the fused backends.

Residuals of every forward: ``mean`` and ``rstd``, ``[rows]`` fp32, and what the sum is made from.
When the caller asked for the sum, that is the sum itself (``x_is_sum``): it is kept alive anyway.
Else it is ``x`` and ``residual``, from which a backward makes the sum again in fp32: no more bytes
are moved than by writing and reading a sum, and nothing is rounded in between.

An output that was not asked for is an empty tensor, so that the arity is fixed. Without dropout
the gradients of ``x`` and ``residual`` are one tensor. Gradients of ``weight`` and ``bias`` leave
the backends in fp32.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "add_layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor? seed, float eps, float dropout_p, bool need_sum, str backend) "
    "-> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)"
)
_LIBRARY.define(
    "add_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor x, Tensor? residual, "
    "Tensor mean, Tensor rstd, Tensor? weight, Tensor? seed, float dropout_p, bool x_is_sum, "
    "bool need_grad_residual, bool need_grad_parameters, str backend) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    need_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backend(backend).forward(x, residual, weight, bias, seed, eps, dropout_p, need_sum)


def _backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    x_is_sum: bool,
    need_grad_residual: bool,
    need_grad_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backend(backend).backward(
        grad_output,
        grad_sum,
        x,
        residual,
        mean,
        rstd,
        weight,
        seed,
        dropout_p,
        x_is_sum,
        need_grad_residual,
        need_grad_parameters,
    )


_LIBRARY.impl("add_layer_norm_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("add_layer_norm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::add_layer_norm_forward", lib=_LIBRARY)
def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    need_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if need_sum else (0,)),
        x.new_empty((rows,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.float32),
    )


@torch.library.register_fake("fused_attn::add_layer_norm_backward", lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    x_is_sum: bool,
    need_grad_residual: bool,
    need_grad_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = (x.shape[-1] if need_grad_parameters else 0,)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if need_grad_residual and dropout_p > 0.0 else (0,)),
        x.new_empty(parameters, dtype=torch.float32),
        x.new_empty(parameters, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, seed, _, dropout_p, need_sum, backend = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    saved = (total, None) if need_sum else (x, residual)
    ctx.save_for_backward(*saved, mean, rstd, weight, seed)
    ctx.x_is_sum = need_sum
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dropout_p = dropout_p
    ctx.backend = backend


def _autograd(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, residual, mean, rstd, weight, seed = ctx.saved_tensors
    _, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    if grad_output is None:
        grad_output = torch.zeros_like(x)
    grad_x, grad_residual, grad_weight, grad_bias = torch.ops.fused_attn.add_layer_norm_backward(
        grad_output,
        grad_sum if ctx.x_is_sum else None,
        x,
        residual,
        mean,
        rstd,
        weight,
        seed,
        ctx.dropout_p,
        ctx.x_is_sum,
        need_residual,
        need_weight or need_bias,
        ctx.backend,
    )
    if ctx.dropout_p == 0.0:
        grad_residual = grad_x
    return (
        grad_x,
        grad_residual if need_residual else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        None,
        None,
        None,
        None,
        None,
    )


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "add_layer_norm: the fused backends have no second derivative; use backend='reference'"
    )


torch.library.register_autograd(
    "fused_attn::add_layer_norm_forward", _autograd, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "fused_attn::add_layer_norm_backward", _no_second_derivative, lib=_LIBRARY
)


def add_layer_norm_fused(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    return_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and sum by a fused backend; the sum is empty unless it was asked for."""
    output, total, _, _ = torch.ops.fused_attn.add_layer_norm_forward(
        x, residual, weight, bias, seed, eps, dropout_p, return_sum, backend
    )
    return output, total
