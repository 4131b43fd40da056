"""Schemas, fakes and autograd of ``attention``, shared by the fused backends.

Residuals of every forward: the output, in the query's dtype, and ``lse``, ``[B, H, T]`` fp32, the
natural logarithm of the sum of exponentials of a row's logits; -inf for a query that looks at
nothing. From these and the inputs a backward makes the weights again, tile by tile.

The gradient of the bias has the bias's own shape and dtype; it is an empty tensor unless it is
needed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, "
    "Tensor? query_lengths, Tensor? key_lengths, bool is_causal, float scale, str backend) "
    "-> (Tensor output, Tensor lse)"
)
_LIBRARY.define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor? mask, Tensor? bias, Tensor? query_lengths, Tensor? key_lengths, Tensor output, "
    "Tensor lse, bool is_causal, float scale, bool need_grad_bias, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"
)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(
        query, key, value, mask, bias, query_lengths, key_lengths, is_causal, scale
    )


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    need_grad_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backend(backend).backward(
        grad_output,
        query,
        key,
        value,
        mask,
        bias,
        query_lengths,
        key_lengths,
        output,
        lse,
        is_causal,
        scale,
        need_grad_bias,
    )


_LIBRARY.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::attention_forward", lib=_LIBRARY)
def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty((*query.shape[:-1], value.shape[-1])),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    )


@torch.library.register_fake("fused_attn::attention_backward", lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    need_grad_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if bias is not None and need_grad_bias:
        grad_bias = bias.new_empty(bias.shape)
    else:
        grad_bias = query.new_empty((0,), dtype=torch.float32)
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        grad_bias,
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, is_causal, scale, backend = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)
    ctx.is_causal = is_causal
    ctx.scale = scale
    ctx.backend = backend


def _autograd(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 10
    need_query, need_key, need_value, _, need_bias, *_ = ctx.needs_input_grad
    grad_query, grad_key, grad_value, grad_bias = torch.ops.fused_attn.attention_backward(
        grad_output, *ctx.saved_tensors, ctx.is_causal, ctx.scale, need_bias, ctx.backend
    )
    return (
        grad_query if need_query else None,
        grad_key if need_key else None,
        grad_value if need_value else None,
        None,
        grad_bias if need_bias else None,
        None,
        None,
        None,
        None,
        None,
    )


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "attention: the fused backends have no second derivative; use backend='reference'"
    )


torch.library.register_autograd(
    "fused_attn::attention_forward", _autograd, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "fused_attn::attention_backward", _no_second_derivative, lib=_LIBRARY
)


def attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and lse by a fused backend."""
    return torch.ops.fused_attn.attention_forward(
        query, key, value, mask, bias, query_lengths, key_lengths, is_causal, scale, backend
    )
