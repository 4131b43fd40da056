"""Schemas, fakes and autograd of ``additive_attention``, shared by the fused backends.

One pair of schemas serves both public functions. Without ``value`` the forward returns the scores
in place of the weights, -inf where a pair takes no part, and no context.

Residuals of every forward: the inputs and, where there are values, ``weights``, ``[B, H, T, S]``
fp32. A backward makes the hyperbolic tangents again; a tensor ``[B, H, T, S, E]`` exists in neither
direction. Which pairs take part it reads from ``mask`` and ``key_lengths``.

The gradients of ``score_weight`` and ``feature_weight`` leave the backends in fp32. A gradient that
was not asked for is an empty tensor, so that the arity is fixed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class AdditiveInputs(NamedTuple):
    """What both directions take, in the order of the schemas."""

    query: Tensor
    """``[B, H, T, E]``."""
    key: Tensor
    """``[B, H, S, E]``."""
    value: Tensor | None
    """``[B, H, S, D]``; None: scores only."""
    score_weight: Tensor
    """``[H, E]``, dtype of ``query`` or fp32."""
    features: Tensor | None
    """``[B, H, T, S, F]``."""
    feature_weight: Tensor | None
    """``[H, F, E]``, dtype of ``query`` or fp32."""
    mask: Tensor | None
    """Bool, broadcastable to ``[B, H, T, S]``; True takes part."""
    key_lengths: Tensor | None
    """``[B]``, int32 or int64."""


_INPUTS = (
    "Tensor query, Tensor key, Tensor? value, Tensor score_weight, Tensor? features, "
    "Tensor? feature_weight, Tensor? mask, Tensor? key_lengths"
)
_COUNT = len(AdditiveInputs._fields)
_DIFFERENTIABLE = ("query", "key", "value", "score_weight", "features", "feature_weight")

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    f"additive_attention_forward({_INPUTS}, str backend) -> (Tensor context, Tensor weights)"
)
_LIBRARY.define(
    "additive_attention_backward(Tensor? grad_context, Tensor? grad_weights, "
    f"{_INPUTS}, Tensor? weights, bool[6] needs, str backend) -> (Tensor grad_query, "
    "Tensor grad_key, Tensor grad_value, Tensor grad_score_weight, Tensor grad_features, "
    "Tensor grad_feature_weight)"
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of query, key, value, score_weight, features and feature_weight."""


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    return _backend(backend).forward(AdditiveInputs(*inputs))


def _backward(
    grad_context: Tensor | None, grad_weights: Tensor | None, *arguments: Any
) -> Gradients:
    weights, needs, backend = arguments[_COUNT:]
    inputs = AdditiveInputs(*arguments[:_COUNT])
    return _backend(backend).backward(grad_context, grad_weights, inputs, weights, needs)


_LIBRARY.impl("additive_attention_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("additive_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::additive_attention_forward", lib=_LIBRARY)
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(AdditiveInputs(*arguments[:_COUNT]))


@torch.library.register_fake("fused_attn::additive_attention_backward", lib=_LIBRARY)
def _backward_fake(
    grad_context: Tensor | None, grad_weights: Tensor | None, *arguments: Any
) -> Gradients:
    return empty_gradients(AdditiveInputs(*arguments[:_COUNT]), arguments[_COUNT + 1])


def empty_outputs(inputs: AdditiveInputs) -> tuple[Tensor, Tensor]:
    """Room for context and weights; without values the context has no elements."""
    query, value = inputs.query, inputs.value
    B, H, T, _ = query.shape
    shape = (0,) if value is None else (B, H, T, value.size(-1))
    return (
        query.new_empty(shape),
        query.new_empty((B, H, T, inputs.key.size(2)), dtype=torch.float32),
    )


def empty_gradients(inputs: AdditiveInputs, needs: list[bool]) -> Gradients:
    """Room for the gradients that ``needs`` asks for, in the order of :data:`Gradients`."""
    gradients = []
    for name, needed in zip(_DIFFERENTIABLE, needs, strict=True):
        tensor = getattr(inputs, name)
        dtype = torch.float32 if name.endswith("_weight") else inputs.query.dtype
        shape = tensor.shape if needed and tensor is not None else (0,)
        gradients.append(inputs.query.new_empty(shape, dtype=dtype))
    return tuple(gradients)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    call = AdditiveInputs(*inputs[:_COUNT])
    ctx.has_value = call.value is not None
    ctx.save_for_backward(*call, output[1] if ctx.has_value else None)
    ctx.backend = inputs[_COUNT]
    if not ctx.has_value:
        ctx.mark_non_differentiable(output[0])


def _autograd(ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> tuple:
    results: list[Tensor | None] = [None] * (_COUNT + 1)
    if not ctx.has_value:
        grad_context = None
    if grad_context is None and grad_weights is None:
        return tuple(results)
    *tensors, weights = ctx.saved_tensors
    inputs = AdditiveInputs(*tensors)
    places = [AdditiveInputs._fields.index(name) for name in _DIFFERENTIABLE]
    needs = [ctx.needs_input_grad[place] for place in places]
    gradients = torch.ops.fused_attn.additive_attention_backward(
        grad_context, grad_weights, *inputs, weights, needs, ctx.backend
    )
    for place, needed, gradient in zip(places, needs, gradients, strict=True):
        if needed:
            results[place] = gradient.to(inputs[place].dtype)  # type: ignore[union-attr]
    return tuple(results)


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "additive_attention: the fused backends have no second derivative; use backend='reference'"
    )


torch.library.register_autograd(
    "fused_attn::additive_attention_forward",
    _autograd,
    setup_context=_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "fused_attn::additive_attention_backward", _no_second_derivative, lib=_LIBRARY
)


class _Eager(torch.autograd.Function):
    """The registered gradient, for eager calls.

    ``torch.library`` has autograd of its own around an operator, which asks the schema for its
    arguments once for each of them: that takes longer than a small call's kernels.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = torch.ops.fused_attn.additive_attention_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


def additive_attention_fused(inputs: AdditiveInputs, backend: str) -> tuple[Tensor, Tensor]:
    """Context and weights by a fused backend; without values an empty tensor and scores."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    call: Any = torch.ops.fused_attn.additive_attention_forward
    if needs_grad and not torch.compiler.is_compiling():
        call = _Eager.apply
    return call(*inputs, backend)
