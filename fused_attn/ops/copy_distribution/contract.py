"""Schemas, fakes and autograd of ``copy_distribution`` and ``copy_nll``, one pair for both.

Without ``targets`` the output is ``log_probs``, ``[..., extended_size]``, with them ``nll``,
``[...]``; both fp32. Residuals of every forward: the inputs and ``lse``, ``[...]`` fp32, the
natural logarithm of the sum that normalises a row: over the logits where there is a gate, else over
logits and copy scores; +inf where all of them are -inf, so that none has a share; 0 where the
target is ``ignore_index``. From these a backward has the softmax, and makes again what the few
words of a source are.

The gradients of ``copy`` and ``gate`` leave the backends in fp32; that of a gate that is not there
is an empty tensor.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "copy_distribution_forward(Tensor logits, Tensor copy, Tensor source_tokens, Tensor? gate, "
    "Tensor? source_lengths, Tensor? targets, SymInt extended_size, int ignore_index, str backend) "
    "-> (Tensor output, Tensor lse)"
)
_LIBRARY.define(
    "copy_distribution_backward(Tensor grad_output, Tensor logits, Tensor copy, "
    "Tensor source_tokens, Tensor? gate, Tensor? source_lengths, Tensor? targets, Tensor lse, "
    "int ignore_index, str backend) "
    "-> (Tensor grad_logits, Tensor grad_copy, Tensor grad_gate)"
)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    extended_size: int,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(
        logits, copy, source_tokens, gate, source_lengths, targets, extended_size, ignore_index
    )


def _backward(
    grad_output: Tensor,
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(backend).backward(
        grad_output,
        logits,
        copy,
        source_tokens,
        gate,
        source_lengths,
        targets,
        lse,
        ignore_index,
    )


_LIBRARY.impl("copy_distribution_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("copy_distribution_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::copy_distribution_forward", lib=_LIBRARY)
def _forward_fake(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    extended_size: int,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    shape = (*rows, extended_size) if targets is None else rows
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )


@torch.library.register_fake("fused_attn::copy_distribution_backward", lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty(logits.shape),
        copy.new_empty(copy.shape, dtype=torch.float32),
        logits.new_empty((0,) if gate is None else gate.shape, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, copy, source_tokens, gate, source_lengths, targets, _, ignore_index, backend = inputs
    ctx.save_for_backward(logits, copy, source_tokens, gate, source_lengths, targets, output[1])
    ctx.ignore_index = ignore_index
    ctx.backend = backend


def _autograd(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, copy, source_tokens, gate, source_lengths, targets, lse = ctx.saved_tensors
    grad_logits, grad_copy, grad_gate = torch.ops.fused_attn.copy_distribution_backward(
        grad_output,
        logits,
        copy,
        source_tokens,
        gate,
        source_lengths,
        targets,
        lse,
        ctx.ignore_index,
        ctx.backend,
    )
    return (
        grad_logits,
        grad_copy.to(copy.dtype),
        None,
        None if gate is None else grad_gate.to(gate.dtype),
        None,
        None,
        None,
        None,
        None,
    )


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "copy_distribution: the fused backends have no second derivative; use backend='reference'"
    )


torch.library.register_autograd(
    "fused_attn::copy_distribution_forward",
    _autograd,
    setup_context=_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "fused_attn::copy_distribution_backward", _no_second_derivative, lib=_LIBRARY
)


def copy_distribution_fused(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    extended_size: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Log-probabilities, or with targets their negative log-probabilities, by a fused backend."""
    output, _ = torch.ops.fused_attn.copy_distribution_forward(
        logits,
        copy,
        source_tokens,
        gate,
        source_lengths,
        targets,
        extended_size,
        ignore_index,
        backend,
    )
    return output
