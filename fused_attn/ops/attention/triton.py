"""The ``triton`` backend: launchers. The kernels are in ``triton_*kernels.py``, loaded on use."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import head_reasons
from .._philox import keep_threshold
from .._triton import (
    ceil_div,
    contiguous,
    device_guard,
    next_power_of_2,
    target,
    with_scratch_memory,
)
from .contract import SOFTMAX, AttentionInputs, empty_rows
from .triton_launches import HEAVY, MASKED, PLAIN, Launch, launches_for

# What tiles of neighbouring programs may read: half of the L2 cache of an H100.
_SHARED_BYTES = 25 << 20
# Rows from which on a program's loop is long enough to make descriptors first.
_DESCRIPTOR_ROWS = 512


class Rows(NamedTuple):
    """A tensor of rows ``[B, H, T, D]``, or ``[1, H, N, D]`` packed."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_t: int
    stride_d: int


class RowNumbers(NamedTuple):
    """A number for each row."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_t: int


class Pairs(NamedTuple):
    """Something for each pair; a stride of None is a dimension in which it is the same."""

    ptr: Tensor | None
    stride_b: int | None
    stride_h: int | None
    stride_t: int | None
    stride_s: int | None


class Blocks(NamedTuple):
    """A block mask, or nothing."""

    tiles: Tensor | None = None
    bits: Tensor | None = None
    key_tiles: Tensor | None = None
    key_counts: Tensor | None = None
    query_tiles: Tensor | None = None
    query_counts: Tensor | None = None
    stride_b: int | None = None
    """In heads; None: one for all."""
    stride_h: int | None = None
    query_blocks: int | None = None
    key_blocks: int | None = None


class Call(NamedTuple):
    """What says how logits and weights are made, the same for all kernels. None: absent."""

    H: int
    T: int
    S: int
    rows: int
    """Rows of queries of a head: T, or N packed."""
    heads_per_key: int
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    query_offsets: Tensor | None
    key_offsets: Tensor | None
    left: int | None
    right: int | None
    align_lower_right: Any
    mask: Pairs
    bias: Pairs
    slopes: Tensor | None
    stride_slopes: int
    blocks: Blocks
    scale: float
    fold_scale: Any
    """The scale is positive and comes last: maxima and exponentials may take it along."""
    softcap: float | None
    exact: Any
    """To the last bits of fp32."""
    activation: Any
    seed: Tensor | None
    keep_threshold: int
    keep_scale: float


class BiasSizes(NamedTuple):
    """Programs of the bias's gradient: its batches and heads, tiles of its rows and columns."""

    b: int
    h: int
    t: int
    s: int
    rows_reduced: Any = None
    columns_reduced: Any = None


def unsupported_reasons(inputs: AttentionInputs) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    return head_reasons(inputs.query, inputs.value)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    from .triton_forward_kernels import attention_forward_kernel

    query, key, value = inputs.query, inputs.key, inputs.value
    B, H, T, S = inputs.logical_shape
    output = empty_rows(query, value.size(-1), inputs.is_packed)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if inputs.is_packed:
        # Rows of no sequence.
        output.zero_()
        lse.fill_(float("-inf"))
    if B * H * T == 0 or value.size(-1) == 0:
        return output, lse
    tensors = (query, key, value, output)
    launch = _launch("forward", inputs, S, *tensors)
    tiles = ceil_div(T, launch.BLOCK_M)
    _run(
        attention_forward_kernel,
        B * H * tiles,
        launch,
        *(_rows(tensor) for tensor in tensors),
        lse,
        _call(inputs),
        tiles,
        B * H,
        _heads_in_cache(inputs, S),
        BOUNDS=_has_key_bounds(inputs, launch.BLOCK_N),
        DESCRIPTORS=launch.DESCRIPTORS,
        SPECIALIZE=launch.SPECIALIZE and len(inputs.block_mask) == 0,
        REVERSED=_is_triangle(inputs),
        **_head_sizes(inputs),
    )
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is empty unless it is needed."""
    from .triton_backward_kernels import (
        attention_key_gradient_kernel,
        attention_query_gradient_kernel,
    )

    query, key, value = inputs.query, inputs.key, inputs.value
    B, H, T, S = inputs.logical_shape
    gradients = tuple(
        empty_rows(tensor, tensor.size(-1), inputs.is_packed) for tensor in (query, key, value)
    )
    if inputs.is_packed or B * H * T * S == 0 or query.size(-1) * value.size(-1) == 0:
        for gradient in gradients:
            gradient.zero_()
    if inputs.bias is not None and need_grad_bias:
        grad_bias = inputs.bias.new_empty(inputs.bias.shape)
    else:
        grad_bias = query.new_empty((0,), dtype=torch.float32)
    if B * H * T * S == 0 or query.size(-1) * value.size(-1) == 0:
        return (*gradients, grad_bias.zero_())  # type: ignore[return-value]

    is_softmax = inputs.activation == SOFTMAX
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    call, head_sizes, triangle = _call(inputs), _head_sizes(inputs), _is_triangle(inputs)
    rows = {
        "query": _rows(query),
        "key": _rows(key),
        "value": _rows(value),
        "grad_output": _rows(grad_output),
    }

    launch = _launch("query_gradient", inputs, S, key, value)
    tiles = ceil_div(T, launch.BLOCK_M)
    _run(
        attention_query_gradient_kernel,
        B * H * tiles,
        launch,
        rows["query"],
        rows["key"],
        rows["value"],
        _rows(output),
        rows["grad_output"],
        lse,
        _row_numbers(grad_lse) if is_softmax else None,
        _rows(gradients[0]),
        delta,
        call,
        tiles,
        B * H,
        _heads_in_cache(inputs, S),
        BOUNDS=_has_key_bounds(inputs, launch.BLOCK_N),
        # A sixteenth of what rounding does to dX.
        TOLERANCE=torch.finfo(query.dtype).eps / 16 if query.dtype.itemsize == 2 else 0.0,
        DESCRIPTORS=launch.DESCRIPTORS,
        REVERSED=triangle,
        **head_sizes,
    )

    launch = _launch("key_gradient", inputs, T, query, grad_output)
    tiles = ceil_div(S, launch.BLOCK_N)
    _run(
        attention_key_gradient_kernel,
        B * key.size(1) * tiles,
        launch,
        rows["query"],
        rows["key"],
        rows["value"],
        rows["grad_output"],
        lse,
        delta,
        _rows(gradients[1]),
        _rows(gradients[2]),
        call,
        tiles,
        B * key.size(1),
        max(_heads_in_cache(inputs, T) // call.heads_per_key, 1),
        # Queries behind a length are read as zeros, and keys there are left out at the end.
        BOUNDS=inputs.left >= 0 or inputs.right >= 0,
        DESCRIPTORS=launch.DESCRIPTORS,
        REVERSED=False,
        **head_sizes,
    )
    if inputs.bias is not None and need_grad_bias:
        _bias_gradient(rows, inputs, call, lse, delta, grad_bias)
    return (*gradients, grad_bias)  # type: ignore[return-value]


def _bias_gradient(
    rows: dict[str, Rows],
    inputs: AttentionInputs,
    call: Call,
    lse: Tensor,
    delta: Tensor,
    grad_bias: Tensor,
) -> None:
    from triton.language import constexpr

    from .triton_backward_kernels import attention_bias_gradient_kernel

    launch = _launch("bias_gradient", inputs, 0)
    B, H, T, S = inputs.logical_shape
    t, s = ceil_div(T, launch.BLOCK_M), ceil_div(S, launch.BLOCK_N)
    b, h, bias_t, bias_s = (1,) * (4 - grad_bias.dim()) + tuple(grad_bias.shape)
    by_row, by_column = bias_t == T, bias_s == S
    sizes = BiasSizes(
        b,
        h,
        t if by_row else 1,
        s if by_column else 1,
        constexpr(not by_row),
        constexpr(not by_column),
    )
    reduced = BiasSizes(B // b, H // h, 1 if by_row else t, 1 if by_column else s)
    _run(
        attention_bias_gradient_kernel,
        sizes.b * sizes.h * sizes.t * sizes.s,
        launch,
        rows["query"],
        rows["key"],
        rows["value"],
        rows["grad_output"],
        lse,
        delta,
        grad_bias,
        call,
        sizes,
        reduced,
        BOUNDS=_has_key_bounds(inputs, launch.BLOCK_N),
        **_head_sizes(inputs),
    )


# --- launches -----------------------------------------------------------------------------------


def _run(kernel: Any, programs: int, launch: Launch, *arguments: Any, **flags: Any) -> None:
    """Launch a kernel on the device of its first tensor."""
    tensor = arguments[0].ptr
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.registers > 0:
        options |= target().register_options(launch.registers)

    def start() -> None:
        kernel[(programs,)](
            *arguments,
            **flags,
            BLOCK_M=launch.BLOCK_M,
            BLOCK_N=launch.BLOCK_N,
            # Triton 3.10 leaves it out unless asked.
            enable_fp_fusion=True,
            **options,
        )

    with device_guard(tensor):
        if flags.get("DESCRIPTORS", False):
            with_scratch_memory(start, tensor)
        else:
            start()


def _launch(kernel: str, inputs: AttentionInputs, length: int, *described: Tensor) -> Launch:
    """The launch for a call; with descriptors only if these tensors of so many rows allow."""
    if inputs.dropout_p > 0.0 or inputs.softcap > 0.0 or inputs.activation != SOFTMAX:
        load = HEAVY
    elif (
        inputs.mask is not None
        or inputs.bias is not None
        or inputs.alibi_slopes is not None
        or len(inputs.block_mask) > 0
    ):
        load = MASKED
    else:
        load = PLAIN
    head_size = max(inputs.query.size(-1), inputs.value.size(-1))
    launches = launches_for(
        target().architecture, kernel, inputs.query.dtype.itemsize, head_size, load
    )
    can_describe = length >= _DESCRIPTOR_ROWS and _can_describe(inputs, described)
    return next(launch for launch in launches if can_describe or not launch.DESCRIPTORS)


def _head_sizes(inputs: AttentionInputs) -> dict[str, int]:
    D, DV = inputs.query.size(-1), inputs.value.size(-1)
    return {
        "D": D,
        "DV": DV,
        "HEAD_DIM": max(next_power_of_2(D), 16),
        "HEAD_DIM_V": max(next_power_of_2(DV), 16),
    }


def _heads_in_cache(inputs: AttentionInputs, length: int) -> int:
    """Query heads whose programs run together, since the cache holds the rows they read."""
    key, value = inputs.key, inputs.value
    heads_per_key = inputs.query.size(1) // key.size(1)
    size = length * (key.size(-1) + value.size(-1)) * key.dtype.itemsize
    return max(_SHARED_BYTES // max(size, 1), 1) * heads_per_key


def _has_key_bounds(inputs: AttentionInputs, BLOCK_N: int) -> bool:
    """Some key of some tile may be out of bounds for some query."""
    return (
        inputs.left >= 0
        or inputs.right >= 0
        or inputs.is_packed
        or inputs.key_lengths is not None
        or inputs.max_keys % BLOCK_N != 0
    )


def _is_triangle(inputs: AttentionInputs) -> bool:
    """Later queries see more keys."""
    return inputs.right >= 0 and inputs.left < 0


def _can_describe(inputs: AttentionInputs, tensors: tuple[Tensor, ...]) -> bool:
    """Whether tensor descriptors can describe the rows."""
    if not tensors or (inputs.mask is not None and _stride(inputs.mask, 2) is None):
        return False  # keys that it hides are read as zeros, one by one
    return all(
        (tensor.stride(-1) == 1 or tensor.size(-1) == 1)
        and tensor.data_ptr() % 16 == 0
        and all(
            stride * tensor.element_size() % 16 == 0
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            if size > 1
        )
        # A row's stride must be one even of a single row.
        and tensor.stride(-2) * tensor.element_size() % 16 == 0
        and tensor.stride(-2) > 0
        for tensor in tensors
    )


# --- arguments ----------------------------------------------------------------------------------


def _call(inputs: AttentionInputs) -> Call:
    from triton.language import constexpr

    _, H, T, S = inputs.logical_shape
    slopes = inputs.alibi_slopes
    # The gradient of a bias in fp32 is as exact as the bias.
    exact = torch.float32 in (inputs.query.dtype, _dtype(inputs.bias))
    is_last = inputs.softcap == 0.0 and inputs.bias is None and slopes is None and not exact
    # Beyond all queries and keys a bound is none; sums with it must not overflow.
    most = T + S
    return Call(
        H,
        T,
        S,
        inputs.query.size(2),
        H // inputs.key.size(1),
        contiguous(inputs.query_lengths),
        contiguous(inputs.key_lengths),
        contiguous(inputs.query_offsets),
        contiguous(inputs.key_offsets),
        min(inputs.left, most) if inputs.left >= 0 else None,
        min(inputs.right, most) if inputs.right >= 0 else None,
        constexpr(inputs.align_lower_right),
        _pairs(None if inputs.mask is None else inputs.mask.view(torch.uint8)),
        _pairs(inputs.bias),
        contiguous(slopes),
        H if slopes is not None and slopes.dim() == 2 else 0,
        _blocks(inputs),
        inputs.scale,
        constexpr(is_last and inputs.scale > 0.0),
        inputs.softcap if inputs.softcap > 0.0 else None,
        constexpr(exact),
        constexpr(inputs.activation),
        inputs.seed if inputs.dropout_p > 0.0 else None,
        keep_threshold(inputs.dropout_p),
        1.0 / (1.0 - inputs.dropout_p),
    )


def _rows(tensor: Tensor) -> Rows:
    return Rows(tensor, *tensor.stride())


def _row_numbers(tensor: Tensor | None) -> RowNumbers | None:
    return None if tensor is None else RowNumbers(tensor, *tensor.stride())


def _pairs(tensor: Tensor | None) -> Pairs:
    if tensor is None:
        return Pairs(None, None, None, None, None)
    return Pairs(tensor, *(_stride(tensor, dimension) for dimension in range(4)))


def _stride(tensor: Tensor, dimension: int) -> int | None:
    """Stride of a dimension of ``[B, H, T, S]``; None where the tensor is broadcast."""
    dimension -= 4 - tensor.dim()
    if dimension < 0 or tensor.size(dimension) == 1 or tensor.stride(dimension) == 0:
        return None
    return tensor.stride(dimension)


def _blocks(inputs: AttentionInputs) -> Blocks:
    if not inputs.block_mask:
        return Blocks()
    lists = [tensor.contiguous() for tensor in inputs.block_mask]
    b, h, query_blocks, key_blocks = lists[0].shape
    stride_b, stride_h = h if b > 1 else None, 1 if h > 1 else None
    tiles, bits, key_tiles, key_counts, query_tiles, query_counts = lists
    return Blocks(
        tiles,
        bits,
        key_tiles,
        key_counts,
        query_tiles,
        query_counts,
        stride_b,
        stride_h,
        query_blocks,
        key_blocks,
    )


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype
