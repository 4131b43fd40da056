"""The ``triton`` backend: launchers. The kernels are in ``triton_kernels.py``, loaded on use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._check import FLOATING
from .._philox import keep_threshold
from .._triton import (
    StridedRows,
    ceil_div,
    contiguous,
    device_guard,
    multiprocessor_count,
    next_power_of_2,
    strided_rows,
    target,
)

MAX_WIDTH = 65536

# Of a tensor that is absent.
_NO_ROWS = StridedRows(0, 0, 0)

# Columns of a tile at most: beyond, a program walks over its row twice.
_MAX_BLOCK = 8192
# Elements of a tile at least, and a thread's share of them: 16 bytes of bf16.
_MIN_TILE = 2048
_ELEMENTS_PER_THREAD = 8
_MAX_WARPS = 16
# Of a multiprocessor.
_REGISTERS = 65536
# Tiles that the backward keeps at work on a multiprocessor, each with a row of partial sums.
_PROGRAMS_PER_MULTIPROCESSOR = 2
# The reduction's tiles: narrow, so that there are enough of them, unless the rows are long.
_REDUCE_TILE = 2048
_REDUCE_MIN_COLUMNS = 64
_REDUCE_TILES = 128


@dataclass(frozen=True)
class Tiling:
    """How a kernel covers rows of a width."""

    BLOCK_M: int
    BLOCK_N: int
    SINGLE_BLOCK: bool
    num_warps: int
    registers: int
    """Of a thread at most."""


def tiling(width: int, dropout_p: float, is_backward: bool) -> Tiling:
    """The tile for rows of this width, as large as the registers allow.

    The backward holds two sums a column, and takes half of a forward's tile. So does dropout of
    rows whose width is no multiple of 4, where each element draws a counter of Philox for itself.
    Few registers, where they do, keep many rows in flight; an odd width takes an address an
    element.
    """
    is_odd = width % 4 != 0
    draws_alone = dropout_p > 0.0 and is_odd
    share = 2 if is_backward or draws_alone else 1
    block_n = min(max(next_power_of_2(width), 16), _MAX_BLOCK // share)
    block_m = max(_MIN_TILE // share // block_n, 1)
    per_thread = _ELEMENTS_PER_THREAD // 2 if draws_alone else _ELEMENTS_PER_THREAD
    num_warps = min(block_m * block_n // (per_thread * target().warp_size), _MAX_WARPS)
    single_block = width <= block_n
    if is_backward or is_odd or not single_block:
        registers = min(_REGISTERS // (32 * num_warps), 255)
    else:
        registers = 64
    return Tiling(block_m, block_n, single_block, num_warps, registers)


def unsupported_reasons(x: Tensor, *, weight: Tensor | None, dropout_p: float) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if x.dtype not in FLOATING:
        reasons.append(f"dtype {x.dtype}: float32, float16 or bfloat16 only")
    if x.size(-1) > MAX_WIDTH:
        reasons.append(f"width {x.size(-1)} > {MAX_WIDTH}")
    return reasons


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    need_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, sum, mean, rstd."""
    from .triton_kernels import add_layer_norm_forward_kernel

    width = x.size(-1)
    num_rows = x.shape[:-1].numel()
    output = x.new_empty(x.shape)
    total = x.new_empty(x.shape if need_sum else (0,))
    mean = x.new_empty((num_rows,), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if num_rows == 0:
        return output, total, mean, rstd

    x, x_layout = strided_rows(x)
    residual, residual_layout = _optional_rows(residual)
    tile = tiling(width, dropout_p, is_backward=False)
    with device_guard(x):
        add_layer_norm_forward_kernel[(ceil_div(num_rows, tile.BLOCK_M),)](
            x,
            residual,
            contiguous(weight),
            contiguous(bias),
            seed,
            output,
            total,
            mean,
            rstd,
            num_rows,
            width,
            *x_layout,
            *(residual_layout or _NO_ROWS),
            eps,
            1.0 / (1.0 - dropout_p),
            keep_threshold(dropout_p),
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            HAS_SUM=need_sum,
            ONE_STRIDE=_one_stride(x_layout, residual_layout),
            WHOLE_COUNTERS=width % 4 == 0,
            SINGLE_BLOCK=tile.SINGLE_BLOCK,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
            **target().register_options(tile.registers),
        )
    return output, total, mean, rstd


def backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    x_is_sum: bool,
    need_grad_residual: bool,
    need_grad_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias."""
    from .triton_kernels import add_layer_norm_backward_kernel, add_layer_norm_reduce_kernel

    width = x.size(-1)
    num_rows = x.shape[:-1].numel()
    separate = need_grad_residual and dropout_p > 0.0
    grad_x = x.new_empty(x.shape)
    grad_residual = x.new_empty(x.shape if separate else (0,))
    parameters = width if need_grad_parameters else 0
    grad_weight = x.new_zeros((parameters,), dtype=torch.float32)
    grad_bias = x.new_zeros((parameters,), dtype=torch.float32)
    if num_rows == 0:
        return grad_x, grad_residual, grad_weight, grad_bias

    tile = tiling(width, dropout_p, is_backward=True)
    programs = min(
        ceil_div(num_rows, tile.BLOCK_M), _PROGRAMS_PER_MULTIPROCESSOR * multiprocessor_count(x)
    )
    partial = x.new_empty((2, programs, parameters), dtype=torch.float32)
    grad_output, grad_output_layout = strided_rows(grad_output)
    grad_sum, grad_sum_layout = _optional_rows(grad_sum)
    x, x_layout = strided_rows(x)
    residual, residual_layout = _optional_rows(residual)
    with device_guard(x):
        add_layer_norm_backward_kernel[(programs,)](
            grad_output,
            grad_sum,
            x,
            residual,
            mean.contiguous(),
            rstd.contiguous(),
            contiguous(weight),
            seed,
            grad_x,
            grad_residual,
            partial,
            num_rows,
            width,
            *grad_output_layout,
            *(grad_sum_layout or _NO_ROWS),
            *x_layout,
            *(residual_layout or _NO_ROWS),
            1.0 / (1.0 - dropout_p),
            keep_threshold(dropout_p),
            HAS_GRAD_SUM=grad_sum is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            HAS_GRAD_RESIDUAL=separate,
            HAS_PARAMETERS=need_grad_parameters,
            X_IS_SUM=x_is_sum,
            ONE_STRIDE=_one_stride(grad_output_layout, grad_sum_layout, x_layout, residual_layout),
            WHOLE_COUNTERS=width % 4 == 0,
            SINGLE_BLOCK=tile.SINGLE_BLOCK,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            num_warps=tile.num_warps,
            # g - mean(g) cancels, to 0 at width 1, only if the product in g is rounded.
            enable_fp_fusion=False,
            **target().register_options(tile.registers),
        )
        if need_grad_parameters:
            block_n = max(_REDUCE_MIN_COLUMNS, next_power_of_2(width) // _REDUCE_TILES)
            add_layer_norm_reduce_kernel[(ceil_div(width, block_n), 2)](
                partial,
                grad_weight,
                grad_bias,
                programs,
                width,
                BLOCK_M=_REDUCE_TILE // block_n,
                BLOCK_N=block_n,
                num_warps=4,
            )
    return grad_x, grad_residual, grad_weight, grad_bias


def _optional_rows(tensor: Tensor | None) -> tuple[Tensor | None, StridedRows | None]:
    return (None, None) if tensor is None else strided_rows(tensor)


def _one_stride(*layouts: StridedRows | None) -> bool:
    return all(layout is None or layout.has_one_stride for layout in layouts)
