"""Schemas, fakes and autograd of ``recurrent_layer``, shared by the fused backends.

Residuals of every forward that has to ``save``: the input gates, the states before each step and
the recurrent product of each step. The gates themselves are computed again, as in
``recurrent_cell``. The gradients of the recurrent weight and bias are one product and one sum over
all steps, made here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "recurrent_layer_forward(Tensor input_gates, Tensor hidden, Tensor? cell, Tensor weight, "
    "Tensor? bias, Tensor batch_sizes, str kind, bool reverse, bool save, str backend) -> "
    "(Tensor output, Tensor final_hidden, Tensor final_cell, Tensor hidden_before, "
    "Tensor cell_before, Tensor hidden_gates)"
)
_LIBRARY.define(
    "recurrent_layer_backward(Tensor? grad_output, Tensor? grad_final_hidden, "
    "Tensor? grad_final_cell, Tensor input_gates, Tensor hidden_before, Tensor cell_before, "
    "Tensor hidden_gates, Tensor weight, Tensor batch_sizes, SymInt sequences, str kind, "
    "bool reverse, bool need_grad_state, str backend) -> "
    "(Tensor grad_gates, Tensor grad_hidden_gates, Tensor grad_hidden, Tensor grad_cell)"
)

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(*arguments: Any) -> Results:
    return _backend(arguments[-1]).layer_forward(*arguments[:-1])


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backend(arguments[-1]).layer_backward(*arguments[:-1])


_LIBRARY.impl("recurrent_layer_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("recurrent_layer_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::recurrent_layer_forward", lib=_LIBRARY)
def _forward_fake(
    input_gates: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch_sizes: Tensor,
    kind: str,
    reverse: bool,
    save: bool,
    backend: str,
) -> Results:
    (N, columns), H = input_gates.shape, hidden.shape[1]
    is_lstm = kind == "lstm"
    new = input_gates.new_empty
    return (
        new((N, H)),
        new(hidden.shape),
        new(hidden.shape if is_lstm else (0,)),
        new((N if save else 0, H)),
        new((N if save and is_lstm else 0, H)),
        new((N if save else 0, columns)),
    )


@torch.library.register_fake("fused_attn::recurrent_layer_backward", lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor | None,
    grad_final_hidden: Tensor | None,
    grad_final_cell: Tensor | None,
    input_gates: Tensor,
    hidden_before: Tensor,
    cell_before: Tensor,
    hidden_gates: Tensor,
    weight: Tensor,
    batch_sizes: Tensor,
    sequences: int,
    kind: str,
    reverse: bool,
    need_grad_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = input_gates.new_empty
    states = (sequences, weight.shape[1])
    return (
        new(input_gates.shape),
        new((input_gates.shape[0] if kind == "gru" else 0, input_gates.shape[1])),
        new(states if need_grad_state else (0,)),
        new(states if need_grad_state and kind == "lstm" else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Results) -> None:
    input_gates, hidden, _, weight, _, batch_sizes, kind, reverse, save, backend = inputs
    if not save:
        raise RuntimeError("recurrent_layer: a forward that saves nothing has no gradient")
    _, _, final_cell, hidden_before, cell_before, hidden_gates = output
    residuals = (hidden_before, cell_before, hidden_gates)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*residuals, *(() if kind == "lstm" else (final_cell,)))
    ctx.save_for_backward(input_gates, *residuals, weight, batch_sizes)
    ctx.sequences = hidden.shape[0]
    ctx.kind = kind
    ctx.reverse = reverse
    ctx.backend = backend


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    input_gates, hidden_before, cell_before, hidden_gates, weight, batch_sizes = ctx.saved_tensors
    grad_output, grad_final_hidden, grad_final_cell, *_ = grads
    need_gates, need_hidden, need_cell, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_gates, of_product, grad_hidden, grad_cell = torch.ops.fused_attn.recurrent_layer_backward(
        grad_output,
        grad_final_hidden,
        grad_final_cell if ctx.kind == "lstm" else None,
        input_gates,
        hidden_before,
        cell_before,
        hidden_gates,
        weight,
        batch_sizes,
        ctx.sequences,
        ctx.kind,
        ctx.reverse,
        need_hidden or need_cell,
        ctx.backend,
    )
    if ctx.kind != "gru":
        of_product = grad_gates
    return (
        grad_gates if need_gates else None,
        grad_hidden if need_hidden else None,
        grad_cell if need_cell else None,
        of_product.t() @ hidden_before if need_weight else None,
        of_product.sum(0) if need_bias else None,
        None,
        None,
        None,
        None,
        None,
    )


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "recurrent_layer: the fused backends have no second derivative; use backend='reference'"
    )


torch.library.register_autograd(
    "fused_attn::recurrent_layer_forward",
    _autograd,
    setup_context=_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "fused_attn::recurrent_layer_backward", _no_second_derivative, lib=_LIBRARY
)


def recurrent_layer_fused(
    input_gates: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch_sizes: Tensor,
    kind: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final states by a fused backend."""
    inputs = (input_gates, hidden, cell, weight, bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    output, final_hidden, final_cell, *_ = torch.ops.fused_attn.recurrent_layer_forward(
        *inputs, batch_sizes, kind, reverse, save, backend
    )
    return output, final_hidden, final_cell
