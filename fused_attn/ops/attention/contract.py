"""Schemas, fakes and autograd of ``attention``, shared by the fused backends.

Residuals of every forward: the output, in the query's dtype, and ``lse``, ``[B, H, T]`` fp32, the
natural logarithm of the sum of exponentials of a row's logits; -inf for a query that looks at
nothing. From these and the inputs a backward makes the weights again, tile by tile. Activations
other than softmax have no such sum: their lse is 0, and -inf where a query looks at nothing.

The gradient of the bias has the bias's own shape and dtype; it is an empty tensor unless it is
needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOFTMAX, SIGMOID, RELU = range(3)


class AttentionInputs(NamedTuple):
    """What both directions take, in the order of the schemas.

    Packed batches have ``query_offsets`` and ``key_offsets``, ``[B + 1]``: the rows of sequence b
    are offsets[b] to offsets[b + 1] of tensors whose batch size is 1, its lengths are the
    differences, and ``max_queries`` and ``max_keys`` stand for T and S, which they are otherwise.
    """

    query: Tensor
    """``[B, H, T, D]``; packed ``[1, H, N, D]``."""
    key: Tensor
    """``[B, Hk, S, D]``, Hk a divisor of H; packed ``[1, Hk, M, D]``."""
    value: Tensor
    """``[B, Hk, S, Dv]``; packed ``[1, Hk, M, Dv]``."""
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    """``[H]`` or ``[B, H]``."""
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    query_offsets: Tensor | None
    key_offsets: Tensor | None
    block_mask: Sequence[Tensor]
    """Empty, or the tensors of a :class:`BlockMask`."""
    seed: Tensor | None
    left: int
    """Keys to the left of the diagonal that a query sees; -1: all."""
    right: int
    """Likewise to the right; 0 is causal."""
    align_lower_right: bool
    """The diagonal ends at the last key, and does not begin at the first."""
    scale: float
    softcap: float
    """0: none."""
    activation: int
    dropout_p: float
    max_queries: int
    max_keys: int

    @property
    def is_packed(self) -> bool:
        """The rows of all sequences lie one after the other."""
        return self.query_offsets is not None

    @property
    def batch_size(self) -> int:
        """B."""
        if self.query_offsets is not None:
            return self.query_offsets.size(0) - 1
        return self.query.size(0)

    @property
    def logical_shape(self) -> tuple[int, int, int, int]:
        """``(B, H, T, S)``, to which masks and bias are broadcast."""
        return self.batch_size, self.query.size(1), self.max_queries, self.max_keys


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, "
    "Tensor? query_lengths, Tensor? key_lengths, Tensor? query_offsets, Tensor? key_offsets, "
    "Tensor[] block_mask, Tensor? seed, int left, int right, bool align_lower_right, float scale, "
    "float softcap, int activation, float dropout_p, SymInt max_queries, SymInt max_keys"
)
_COUNT = len(AttentionInputs._fields)

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(f"attention_forward({_INPUTS}, str backend) -> (Tensor output, Tensor lse)")
_LIBRARY.define(
    f"attention_backward(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, "
    "Tensor lse, bool need_grad_bias, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"
)


def empty_rows(like: Tensor, width: int, is_packed: bool) -> Tensor:
    """Room for a result with the rows of ``like``: ``[B, H, T, width]``, contiguous.

    Packed rows are ``[1, H, N, width]``, a view of ``[N, H, width]`` contiguous, which is what the
    caller sees.
    """
    B, H, T, _ = like.shape
    if is_packed:
        return like.new_empty((T, H, width)).transpose(0, 1)[None]
    return like.new_empty((B, H, T, width))


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    return _backend(backend).forward(AttentionInputs(*inputs))


def _backward(
    grad_output: Tensor, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, lse, need_grad_bias, backend = arguments[_COUNT:]
    return _backend(backend).backward(
        grad_output,
        grad_lse,
        AttentionInputs(*arguments[:_COUNT]),
        output,
        lse,
        need_grad_bias,
    )


_LIBRARY.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::attention_forward", lib=_LIBRARY)
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = AttentionInputs(*arguments[:_COUNT])
    query = inputs.query
    return (
        empty_rows(query, inputs.value.size(-1), inputs.is_packed),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    )


@torch.library.register_fake("fused_attn::attention_backward", lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = AttentionInputs(*arguments[:_COUNT])
    _, _, need_grad_bias, _ = arguments[_COUNT:]
    if inputs.bias is not None and need_grad_bias:
        grad_bias = inputs.bias.new_empty(inputs.bias.shape)
    else:
        grad_bias = inputs.query.new_empty((0,), dtype=torch.float32)
    return (
        *(
            empty_rows(tensor, tensor.size(-1), inputs.is_packed)
            for tensor in (inputs.query, inputs.key, inputs.value)
        ),
        grad_bias,
    )  # type: ignore[return-value]


_TENSORS = 12  # the fields in front of `left`, one of them a list
_LIST = AttentionInputs._fields.index("block_mask")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    tensors = inputs[:_TENSORS]
    ctx.save_for_backward(*tensors[:_LIST], *tensors[_LIST + 1 :], *tensors[_LIST], *output)
    ctx.numbers = inputs[_TENSORS:_COUNT]
    ctx.backend = inputs[_COUNT]
    ctx.has_row_sums = inputs[AttentionInputs._fields.index("activation")] == SOFTMAX


def _autograd(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple:
    if not ctx.has_row_sums:
        grad_lse = None
    nothing: list = [None] * (_COUNT + 1)
    saved = ctx.saved_tensors
    singles, block_mask, (output, lse) = (
        saved[: _TENSORS - 1],
        saved[_TENSORS - 1 : -2],
        saved[-2:],
    )
    nothing[_LIST] = [None] * len(block_mask)
    if grad_output is None:
        if grad_lse is None:
            return tuple(nothing)
        grad_output = torch.zeros_like(output)
    need_query, need_key, need_value, _, need_bias, *_ = ctx.needs_input_grad
    gradients = torch.ops.fused_attn.attention_backward(
        grad_output,
        grad_lse,
        *singles[:_LIST],
        list(block_mask),
        *singles[_LIST:],
        *ctx.numbers,
        output,
        lse,
        need_bias,
        ctx.backend,
    )
    for name, needed, gradient in zip(
        ("query", "key", "value", "bias"),
        (need_query, need_key, need_value, need_bias),
        gradients,
        strict=True,
    ):
        if needed:
            nothing[AttentionInputs._fields.index(name)] = gradient
    return tuple(nothing)


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


def attention_fused(inputs: AttentionInputs, backend: str) -> tuple[Tensor, Tensor]:
    """Output and lse by a fused backend."""
    return torch.ops.fused_attn.attention_forward(*inputs, backend)
