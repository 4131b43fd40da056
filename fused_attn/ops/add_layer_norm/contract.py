"""Schemas, fakes and autograd of ``add_layer_norm``, shared by the fused backends.

Residuals of every forward: ``sum`` in the dtype of ``x``, ``mean`` and ``rstd`` ``[rows]`` fp32.
An output that was not asked for is an empty tensor, so that the arity is fixed.
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
    "add_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor mean, "
    "Tensor rstd, Tensor? weight, Tensor? bias, Tensor? seed, float dropout_p, str backend) "
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
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backend(backend).backward(
        grad_output, grad_sum, sum, mean, rstd, weight, bias, seed, dropout_p
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
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        sum.new_empty(sum.shape),
        sum.new_empty(sum.shape if dropout_p > 0.0 else (0,)),
        sum.new_empty((0,)) if weight is None else weight.new_empty(weight.shape),
        sum.new_empty((0,)) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, residual, weight, bias, seed, _, dropout_p, _, backend = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, mean, rstd, weight, bias, seed)
    ctx.has_residual = residual is not None
    ctx.dropout_p = dropout_p
    ctx.backend = backend


def _autograd(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple:
    total, mean, rstd, weight, bias, seed = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(total)
    grad_x, grad_residual, grad_weight, grad_bias = torch.ops.fused_attn.add_layer_norm_backward(
        grad_output, grad_sum, total, mean, rstd, weight, bias, seed, ctx.dropout_p, ctx.backend
    )
    if ctx.dropout_p == 0.0:
        grad_residual = grad_x
    return (
        grad_x,
        grad_residual if ctx.has_residual else None,
        grad_weight if weight is not None else None,
        grad_bias if bias is not None else None,
        None,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "fused_attn::add_layer_norm_forward", _autograd, setup_context=_setup_context, lib=_LIBRARY
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
    """Output and sum by a fused backend; the sum is empty when neither caller nor autograd
    needs it."""
    need_sum = return_sum or (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, residual, weight, bias))
    )
    output, total, _, _ = torch.ops.fused_attn.add_layer_norm_forward(
        x, residual, weight, bias, seed, eps, dropout_p, need_sum, backend
    )
    return output, total
