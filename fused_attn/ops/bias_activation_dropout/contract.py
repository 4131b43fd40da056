"""Schemas, fakes and autograd of ``bias_activation_dropout``, shared by the fused backends.

Residuals of every forward: ``x``, ``bias`` and the seed, from which a backward computes the
activation, its derivative and the dropout mask again. What no gradient is made from is not saved:
nothing where only the residual wants one, and neither ``x`` nor ``bias`` where ``x`` passes
through, that is without an activation and a gate.

The gradient of the residual is the output's, without a copy, and so is that of an ``x`` that
passes through and is not dropped. The gradient of ``bias`` leaves the backends in fp32. A gradient
that was not asked for is an empty tensor, so that the arity is fixed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

IDENTITY = "identity"
"""The activation that None stands for."""

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "bias_activation_dropout_forward(Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, "
    "str activation, bool gated, float dropout_p, str backend) -> Tensor"
)
_LIBRARY.define(
    "bias_activation_dropout_backward(Tensor grad_output, Tensor? x, Tensor? bias, Tensor? seed, "
    "str activation, bool gated, float dropout_p, bool need_grad_x, bool need_grad_bias, "
    "str backend) -> (Tensor grad_x, Tensor grad_bias)"
)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    backend: str,
) -> Tensor:
    return _backend(backend).forward(x, bias, residual, seed, activation, gated, dropout_p)


def _backward(
    grad_output: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    need_grad_x: bool,
    need_grad_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _backend(backend).backward(
        grad_output,
        x,
        bias,
        seed,
        activation,
        gated,
        dropout_p,
        need_grad_x,
        need_grad_bias,
    )


_LIBRARY.impl("bias_activation_dropout_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("bias_activation_dropout_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::bias_activation_dropout_forward", lib=_LIBRARY)
def _forward_fake(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    backend: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // (2 if gated else 1)))


@torch.library.register_fake("fused_attn::bias_activation_dropout_backward", lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    need_grad_x: bool,
    need_grad_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    columns = grad_output.shape[-1] * (2 if gated else 1)
    return (
        grad_output.new_empty((*grad_output.shape[:-1], columns) if need_grad_x else (0,)),
        grad_output.new_empty((columns if need_grad_bias else 0,), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, _, seed, activation, gated, dropout_p, backend = inputs
    need_x, need_bias, *_ = ctx.needs_input_grad
    ctx.x_passes = activation == IDENTITY and not gated
    saves_x = (need_x or need_bias) and not ctx.x_passes
    ctx.save_for_backward(x if saves_x else None, bias if saves_x else None, seed)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.activation = activation
    ctx.gated = gated
    ctx.dropout_p = dropout_p
    ctx.backend = backend


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, seed = ctx.saved_tensors
    need_x, need_bias, need_residual, *_ = ctx.needs_input_grad
    is_same = ctx.x_passes and ctx.dropout_p == 0.0
    grad_x = grad_output
    grad_bias: Tensor | None = None
    if (need_x and not is_same) or need_bias:
        made_x, sums = torch.ops.fused_attn.bias_activation_dropout_backward(
            grad_output,
            x,
            bias,
            seed,
            ctx.activation,
            ctx.gated,
            ctx.dropout_p,
            need_x and not is_same,
            need_bias,
            ctx.backend,
        )
        grad_x = grad_output if is_same else made_x
        grad_bias = sums.to(ctx.bias_dtype) if need_bias else None
    return (
        grad_x if need_x else None,
        grad_bias,
        grad_output if need_residual else None,
        None,
        None,
        None,
        None,
        None,
    )


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "bias_activation_dropout: the fused backends have no second derivative; use "
        "backend='reference'"
    )


torch.library.register_autograd(
    "fused_attn::bias_activation_dropout_forward",
    _autograd,
    setup_context=_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "fused_attn::bias_activation_dropout_backward", _no_second_derivative, lib=_LIBRARY
)


class _Eager(torch.autograd.Function):
    """The registered gradient, for eager calls.

    ``torch.library`` has autograd of its own around an operator, which asks the schema for its
    arguments once for each of them: that takes longer than a small call's kernels.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = torch.ops.fused_attn.bias_activation_dropout_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


def bias_activation_dropout_fused(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Output by a fused backend; ``activation`` is ``IDENTITY`` where there is none."""
    tensors = (x, bias, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    call: Any = torch.ops.fused_attn.bias_activation_dropout_forward
    if needs_grad and not torch.compiler.is_compiling():
        call = _Eager.apply
    return call(*tensors, seed, activation, gated, dropout_p, backend)
