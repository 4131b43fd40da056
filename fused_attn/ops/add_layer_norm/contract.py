"""Schemas, fakes and autograd of ``add_layer_norm``, shared by the fused backends.

Residuals of every forward: ``mean`` (empty for RMSNorm, which has none) and ``rstd``, ``[rows]``
fp32, and what the sum is made from. When the caller asked for the sum, that is the sum itself
(``x_is_sum``): it is kept alive anyway. Else it is ``x``, ``x_bias`` and ``residual``, from which a
backward makes the sum again in fp32: no more bytes are moved than by writing and reading a sum, and
nothing is rounded in between.

An output that was not asked for is an empty tensor, so that the arity is fixed. Without dropout,
and in one dtype, the gradients of ``x`` and ``residual`` are one tensor. Gradients of ``x_bias``,
``weight`` and ``bias`` leave the backends in fp32.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "add_layer_norm_forward(Tensor x, Tensor? x_bias, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor? seed, float eps, float dropout_p, bool is_rms, ScalarType? sum_dtype, "
    "str backend) -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)"
)
_LIBRARY.define(
    "add_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor x, Tensor? x_bias, "
    "Tensor? residual, Tensor mean, Tensor rstd, Tensor? weight, Tensor? seed, float dropout_p, "
    "bool is_rms, bool x_is_sum, ScalarType? grad_residual_dtype, bool need_x_bias, "
    "bool need_weight, bool need_bias, str backend) -> (Tensor grad_x, Tensor grad_residual, "
    "Tensor grad_x_bias, Tensor grad_weight, Tensor grad_bias)"
)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    return _backend(backend).forward(*inputs)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    return _backend(backend).backward(*inputs)


_LIBRARY.impl("add_layer_norm_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("add_layer_norm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::add_layer_norm_forward", lib=_LIBRARY)
def _forward_fake(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
    sum_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return (
        x.new_empty(x.shape),
        x.new_empty((0,)) if sum_dtype is None else x.new_empty(x.shape, dtype=sum_dtype),
        x.new_empty((0 if is_rms else rows,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.float32),
    )


@torch.library.register_fake("fused_attn::add_layer_norm_backward", lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_rms: bool,
    x_is_sum: bool,
    grad_residual_dtype: torch.dtype | None,
    need_x_bias: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def parameter(needed: bool) -> Tensor:
        return x.new_empty((x.shape[-1] if needed else 0,), dtype=torch.float32)

    grad_x = grad_output.new_empty(x.shape)
    if grad_residual_dtype is None:
        grad_residual = grad_output.new_empty((0,))
    else:
        grad_residual = x.new_empty(x.shape, dtype=grad_residual_dtype)
    return (
        grad_x,
        grad_residual,
        parameter(need_x_bias),
        parameter(need_weight),
        parameter(need_bias),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, x_bias, residual, weight, bias, seed, _, dropout_p, is_rms, sum_dtype, backend = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.x_is_sum = sum_dtype is not None
    saved = (total, None, None) if ctx.x_is_sum else (x, x_bias, residual)
    ctx.save_for_backward(*saved, mean, rstd, weight, seed)
    ctx.dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dropout_p = dropout_p
    ctx.is_rms = is_rms
    ctx.backend = backend


def _autograd(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, x_bias, residual, mean, rstd, weight, seed = ctx.saved_tensors
    _, need_x_bias, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    if grad_output is None:
        grad_output = torch.zeros(x.shape, dtype=ctx.dtype, device=x.device)
    is_separate = need_residual and (ctx.dropout_p > 0.0 or ctx.residual_dtype != ctx.dtype)
    grad_x, grad_residual, grad_x_bias, grad_weight, grad_bias = (
        torch.ops.fused_attn.add_layer_norm_backward(
            grad_output,
            grad_sum if ctx.x_is_sum else None,
            x,
            x_bias,
            residual,
            mean,
            rstd,
            weight,
            seed,
            ctx.dropout_p,
            ctx.is_rms,
            ctx.x_is_sum,
            ctx.residual_dtype if is_separate else None,
            need_x_bias,
            need_weight,
            need_bias,
            ctx.backend,
        )
    )
    if not is_separate:
        grad_residual = grad_x
    return (
        grad_x,
        grad_x_bias.to(ctx.x_bias_dtype) if need_x_bias else None,
        grad_residual if need_residual else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        *[None] * 6,
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


class _Eager(torch.autograd.Function):
    """The registered gradient, for eager calls.

    ``torch.library`` has autograd of its own around an operator, which asks the schema for its
    arguments once for each of them: for eleven, that takes longer than a small call's kernels.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.fused_attn.add_layer_norm_forward(*inputs)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd)


def add_layer_norm_fused(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
    sum_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and sum by a fused backend; the sum is empty unless it was asked for."""
    tensors = (x, x_bias, residual, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    call: Any = torch.ops.fused_attn.add_layer_norm_forward
    if needs_grad and not torch.compiler.is_compiling():
        call = _Eager.apply
    output, total, _, _ = call(*tensors, seed, eps, dropout_p, is_rms, sum_dtype, backend)
    return output, total
