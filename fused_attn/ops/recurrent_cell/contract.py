"""Schemas, fakes and autograd of ``recurrent_cell``, shared by the fused backends.

``state`` is an LSTM's cell and a GRU's hidden state; the other kinds have none. Residuals of every
forward: its inputs, from which a backward computes the gates again. Saving activated gates would
write a tensor in the forward and read one less in the backward: the same bytes in all, twice that
in 16-bit dtypes, whose gates would be kept in fp32, and a forward without a gradient would need a
flag to write nothing.

Where the two products are only added (LSTM, tanh, relu) one gradient serves both. A GRU's differ in
the third of n. What there is no gradient of, or nobody asked for, is an empty tensor, so that the
arity is fixed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
"""How many gates a kind has."""

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "recurrent_cell_forward(Tensor input_gates, Tensor hidden_gates, Tensor? state, str kind, "
    "str backend) -> (Tensor new_hidden, Tensor new_cell)"
)
_LIBRARY.define(
    "recurrent_cell_backward(Tensor? grad_hidden, Tensor? grad_cell, Tensor input_gates, "
    "Tensor hidden_gates, Tensor? state, str kind, bool need_grad_state, str backend) -> "
    "(Tensor grad_gates, Tensor grad_hidden_gates, Tensor grad_state)"
)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(
    input_gates: Tensor, hidden_gates: Tensor, state: Tensor | None, kind: str, backend: str
) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(input_gates, hidden_gates, state, kind)


def _backward(
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: Tensor | None,
    kind: str,
    need_grad_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(backend).backward(
        grad_hidden, grad_cell, input_gates, hidden_gates, state, kind, need_grad_state
    )


_LIBRARY.impl("recurrent_cell_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("recurrent_cell_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::recurrent_cell_forward", lib=_LIBRARY)
def _forward_fake(
    input_gates: Tensor, hidden_gates: Tensor, state: Tensor | None, kind: str, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (*input_gates.shape[:-1], input_gates.shape[-1] // GATES[kind])
    new_hidden = (state if kind == "gru" and state is not None else input_gates).new_empty(shape)
    if kind == "lstm" and state is not None:
        return new_hidden, state.new_empty(shape)
    return new_hidden, input_gates.new_empty(0)


@torch.library.register_fake("fused_attn::recurrent_cell_backward", lib=_LIBRARY)
def _backward_fake(
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: Tensor | None,
    kind: str,
    need_grad_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gates = input_gates.new_empty(input_gates.shape)
    grad_hidden_gates = input_gates.new_empty(input_gates.shape if kind == "gru" else (0,))
    if state is None or not need_grad_state:
        return grad_gates, grad_hidden_gates, input_gates.new_empty(0)
    return grad_gates, grad_hidden_gates, state.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    input_gates, hidden_gates, state, kind, backend = inputs
    ctx.set_materialize_grads(False)
    if kind != "lstm":
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input_gates, hidden_gates, state)
    ctx.kind = kind
    ctx.backend = backend


def _autograd(
    ctx: Any, grad_hidden: Tensor | None, grad_cell: Tensor | None
) -> tuple[Tensor | None, ...]:
    input_gates, hidden_gates, state = ctx.saved_tensors
    if ctx.kind != "lstm":
        grad_cell = None
    if grad_hidden is None and grad_cell is None:
        return (None,) * 5
    need_input, need_hidden, need_state, *_ = ctx.needs_input_grad
    grad_gates, grad_hidden_gates, grad_state = torch.ops.fused_attn.recurrent_cell_backward(
        grad_hidden,
        grad_cell,
        input_gates,
        hidden_gates,
        state,
        ctx.kind,
        need_state,
        ctx.backend,
    )
    if ctx.kind != "gru":
        grad_hidden_gates = grad_gates
    return (
        grad_gates if need_input else None,
        grad_hidden_gates if need_hidden else None,
        grad_state if need_state else None,
        None,
        None,
    )


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "recurrent_cell: the fused backends have no second derivative; use backend='reference'"
    )


torch.library.register_autograd(
    "fused_attn::recurrent_cell_forward",
    _autograd,
    setup_context=_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "fused_attn::recurrent_cell_backward", _no_second_derivative, lib=_LIBRARY
)


class _Eager(torch.autograd.Function):
    """The registered gradient, for eager calls.

    ``torch.library`` has autograd of its own around an operator, which asks the schema for its
    arguments once for each of them: that takes longer than a small call's kernels.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = torch.ops.fused_attn.recurrent_cell_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


def recurrent_cell_fused(
    input_gates: Tensor, hidden_gates: Tensor, state: Tensor | None, kind: str, backend: str
) -> tuple[Tensor, Tensor]:
    """New states by a fused backend."""
    tensors = (input_gates, hidden_gates, state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    call: Any = torch.ops.fused_attn.recurrent_cell_forward
    if needs_grad and not torch.compiler.is_compiling():
        call = _Eager.apply
    return call(input_gates, hidden_gates, state, kind, backend)
