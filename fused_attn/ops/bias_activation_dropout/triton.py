"""The ``triton`` backend: launchers. The kernels are in ``triton_kernels.py``, loaded on use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._check import FLOATING
from .._philox import keep_threshold
from .._triton import (
    ceil_div,
    contiguous,
    device_guard,
    multiprocessor_count,
    next_power_of_2,
    reduce_partials,
    rows_of,
    target,
)

_THREADS = 256
"""Of a program."""
# A thread's share of a tile, in bytes of x: two accesses of 16 bytes.
_BYTES_PER_THREAD = 32
# Columns of a tile: the widest of these whose last tile leaves little empty.
_BLOCKS = (2048, 1024, 512, 256, 128)
# Registers of a multiprocessor, and in what steps a thread gets them.
_REGISTERS = 65536
_REGISTER_STEP = 8
# The backward's programs on a multiprocessor, each with a row of partial sums.
_BACKWARD_PROGRAMS = 2


class Tiling(NamedTuple):
    """How a kernel covers rows of a width."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


def tiling(width: int, itemsize: int, gated: bool, has_dropout: bool) -> Tiling:
    """The tile of the output for rows of this width."""
    per_thread = _BYTES_PER_THREAD // itemsize // (2 if gated else 1)
    if has_dropout and width % 4 != 0:
        per_thread //= 2  # each element draws a counter of Philox for itself
    elements = _THREADS * per_thread
    block_n = next_power_of_2(width)
    if block_n > _BLOCKS[-1]:
        spare = width // 10
        fitting = (n for n in _BLOCKS if n <= elements and -width % n <= spare)
        block_n = next(fitting, _BLOCKS[-1])
    return Tiling(elements // block_n, block_n, _THREADS // target().warp_size)


def registers(programs: int) -> int:
    """Of a thread, where so many programs run on a multiprocessor."""
    return _REGISTERS // (programs * _THREADS) // _REGISTER_STEP * _REGISTER_STEP


def unsupported_reasons(x: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if x.dtype not in FLOATING:
        reasons.append(f"dtype {x.dtype}: float32, float16 or bfloat16 only")
    return reasons


def forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
) -> Tensor:
    """Output."""
    from .triton_kernels import bias_activation_dropout_forward_kernel

    width = x.size(-1) // (2 if gated else 1)
    num_rows = x.shape[:-1].numel()
    output = x.new_empty((*x.shape[:-1], width))
    if num_rows == 0:
        return output

    tile = tiling(width, x.element_size(), gated, dropout_p > 0.0)
    # An address an element takes registers.
    programs_at_once = 2 if width % 4 != 0 else 4
    rows = rows_of(x, residual)
    with device_guard(output):
        programs = ceil_div(num_rows, tile.BLOCK_M) * ceil_div(width, tile.BLOCK_N)
        bias_activation_dropout_forward_kernel[(programs,)](
            *rows.tensors,
            contiguous(bias),
            seed,
            output,
            num_rows,
            *rows.numbers,
            1.0 / (1.0 - dropout_p),
            keep_threshold(dropout_p),
            ACTIVATION=activation,
            IS_GATED=gated,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            **rows.flags,
            WIDTH=width,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            num_warps=tile.num_warps,
            **target().register_options(registers(programs_at_once)),
        )
    return output


def backward(
    grad_output: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    need_grad_x: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    from .triton_kernels import bias_activation_dropout_backward_kernel

    width = grad_output.size(-1)
    columns = width * (2 if gated else 1)
    num_rows = grad_output.shape[:-1].numel()
    grad_x = grad_output.new_empty((*grad_output.shape[:-1], columns) if need_grad_x else (0,))
    grad_bias = grad_output.new_empty((columns if need_grad_bias else 0,), dtype=torch.float32)
    if num_rows == 0:
        return grad_x, grad_bias.zero_()

    tile = tiling(width, grad_output.element_size(), gated, dropout_p > 0.0)
    row_tiles = ceil_div(num_rows, tile.BLOCK_M)
    slices = ceil_div(width, tile.BLOCK_N)
    programs = min(
        row_tiles, ceil_div(_BACKWARD_PROGRAMS * multiprocessor_count(grad_output), slices)
    )
    # As many turns for everyone: fewer programs write fewer partial sums.
    programs = ceil_div(row_tiles, ceil_div(row_tiles, programs))
    partial = grad_bias
    if programs > 1 and need_grad_bias:
        partial = grad_output.new_empty((1, programs, columns), dtype=torch.float32)
    rows = rows_of(grad_output, x)
    with device_guard(grad_x):
        bias_activation_dropout_backward_kernel[(programs, slices)](
            *rows.tensors,
            contiguous(bias),
            seed,
            grad_x,
            partial,
            num_rows,
            *rows.numbers,
            1.0 / (1.0 - dropout_p),
            keep_threshold(dropout_p),
            ACTIVATION=activation,
            IS_GATED=gated,
            HAS_BIAS=bias is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            NEED_X=need_grad_x,
            NEED_BIAS=need_grad_bias,
            **rows.flags,
            WIDTH=width,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            NUM_STAGES=2,
            num_warps=tile.num_warps,
            **target().register_options(registers(_BACKWARD_PROGRAMS)),
        )
        if partial is not grad_bias:
            reduce_partials(partial, [grad_bias])
    return grad_x, grad_bias
