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

MAX_WIDTH = 65536

# A thread's share of a tile, in bytes of x: two accesses of 16 bytes.
_BYTES_PER_THREAD = 32
_THREADS = 256
"""Of a program, where a row does not need more."""
_MAX_THREADS = 1024
# Of a multiprocessor.
_REGISTERS = 65536
# Columns of a tile at most: beyond, the forward walks over its row in blocks, and the backward's
# programs take slices of it.
_MAX_FORWARD_BLOCK = 16384
_MAX_BACKWARD_BLOCK = 8192
_SLICES = (4096, 2048, 1024)


class Tiling(NamedTuple):
    """How a kernel covers rows of a width."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    registers: int
    """Of a thread at most."""
    programs: int
    """That a multiprocessor has registers for."""


def forward_tiling(width: int, itemsize: int, has_dropout: bool) -> Tiling:
    """The tile of the forward; the README has the reasons."""
    block_n = min(next_power_of_2(width), _MAX_FORWARD_BLOCK)
    return _tiling(block_n, width, itemsize, has_dropout, 4)


def backward_tiling(width: int, itemsize: int, has_dropout: bool) -> Tiling:
    """The tile of the backward, which sums up to three numbers a column in registers."""
    block_n = next_power_of_2(width)
    if block_n > _MAX_BACKWARD_BLOCK:
        # The widest of which the last slice leaves little empty.
        spare = width // 10
        fitting = (slice_ for slice_ in _SLICES if -width % slice_ <= spare)
        block_n = next(fitting, _SLICES[-1])
    return _tiling(block_n, width, itemsize, has_dropout, 2)


def _tiling(block_n: int, width: int, itemsize: int, has_dropout: bool, programs: int) -> Tiling:
    per_thread = _BYTES_PER_THREAD // itemsize
    if has_dropout and width % 4 != 0:
        per_thread //= 2  # each element draws a counter of Philox for itself
    threads = min(max(block_n // per_thread, _THREADS), _MAX_THREADS)
    block_m = max(threads * per_thread // block_n, 1)
    programs = max(programs * _THREADS // threads, 1)
    registers = min(_REGISTERS // (threads * programs), 255)
    return Tiling(block_m, block_n, threads // target().warp_size, registers, programs)


def unsupported_reasons(x: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if x.dtype not in FLOATING:
        reasons.append(f"dtype {x.dtype}: float32, float16 or bfloat16 only")
    if x.size(-1) > MAX_WIDTH:
        reasons.append(f"width {x.size(-1)} > {MAX_WIDTH}")
    return reasons


def forward(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, sum, mean, rstd."""
    from .triton_kernels import add_layer_norm_forward_kernel

    width = x.size(-1)
    num_rows = x.shape[:-1].numel()
    output = x.new_empty(x.shape)
    total = x.new_empty((0,)) if sum_dtype is None else x.new_empty(x.shape, dtype=sum_dtype)
    mean = x.new_empty((0 if is_rms else num_rows,), dtype=torch.float32)
    rstd = x.new_empty((num_rows,), dtype=torch.float32)
    if num_rows == 0:
        return output, total, mean, rstd

    tile = forward_tiling(width, x.element_size(), dropout_p > 0.0)
    rows = rows_of(x, residual)
    x, residual = rows.tensors
    with device_guard(output):
        add_layer_norm_forward_kernel[(ceil_div(num_rows, tile.BLOCK_M),)](
            x,
            contiguous(x_bias),
            residual,
            contiguous(weight),
            contiguous(bias),
            seed,
            output,
            total,
            mean,
            rstd,
            num_rows,
            *rows.numbers,
            eps,
            1.0 / (1.0 - dropout_p),
            keep_threshold(dropout_p),
            IS_RMS=is_rms,
            HAS_X_BIAS=x_bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            HAS_SUM=sum_dtype is not None,
            **rows.flags,
            WIDTH=width,
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
    x_bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_rms: bool,
    x_is_sum: bool,
    grad_residual_dtype: torch.dtype | None,
    need_x_bias: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, x_bias, weight and bias."""
    from .triton_kernels import add_layer_norm_backward_kernel, add_layer_norm_means_kernel

    width = x.size(-1)
    num_rows = x.shape[:-1].numel()
    grad_x = grad_output.new_empty(x.shape)
    if grad_residual_dtype is None:
        grad_residual = grad_output.new_empty((0,))
    else:
        grad_residual = x.new_empty(x.shape, dtype=grad_residual_dtype)
    needs = (need_x_bias, need_weight, need_bias)
    # Of x_bias, weight and bias.
    gradients = [x.new_empty((width if need else 0,), dtype=torch.float32) for need in needs]
    if num_rows == 0:
        return grad_x, grad_residual, *(gradient.zero_() for gradient in gradients)

    tile = backward_tiling(width, grad_output.element_size(), dropout_p > 0.0)
    row_tiles = ceil_div(num_rows, tile.BLOCK_M)
    slices = ceil_div(width, tile.BLOCK_N)
    programs = min(row_tiles, ceil_div(tile.programs * multiprocessor_count(x), slices))
    # As many turns for everyone: fewer programs write fewer partial sums.
    programs = ceil_div(row_tiles, ceil_div(row_tiles, programs))
    partials = gradients
    if programs > 1 and any(needs):
        partial = x.new_empty((sum(needs), programs, width), dtype=torch.float32)
        kinds = iter(partial)
        partials = [next(kinds) if need else g for need, g in zip(needs, gradients, strict=True)]

    rows = rows_of(grad_output, grad_sum, x, residual)
    grad_output, grad_sum, x, residual = rows.tensors
    x_bias, weight = contiguous(x_bias), contiguous(weight)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    options = {"enable_fp_fusion": False}
    numbers = (1.0 / (1.0 - dropout_p), keep_threshold(dropout_p))
    flags = {
        "IS_RMS": is_rms,
        "HAS_X_BIAS": x_bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        **rows.flags,
        "WIDTH": width,
    }
    with device_guard(grad_x):
        mean_g = mean_gy = None
        if slices > 1:
            mean_g, mean_gy = x.new_empty((2, num_rows), dtype=torch.float32)
            means_tile = forward_tiling(MAX_WIDTH, grad_output.element_size(), dropout_p > 0.0)
            add_layer_norm_means_kernel[(num_rows,)](
                grad_output,
                x,
                x_bias,
                residual,
                mean,
                rstd,
                weight,
                seed,
                mean_g,
                mean_gy,
                num_rows,
                *rows.numbers[:3],
                *rows.numbers[6:],
                *numbers,
                HAS_DROPOUT=dropout_p > 0.0 and not x_is_sum,
                **flags,
                BLOCK_N=means_tile.BLOCK_N,
                num_warps=means_tile.num_warps,
                **options,
                **target().register_options(means_tile.registers),
            )
        add_layer_norm_backward_kernel[(programs, slices)](
            grad_output,
            grad_sum,
            x,
            x_bias,
            residual,
            mean,
            rstd,
            weight,
            seed,
            mean_g,
            mean_gy,
            grad_x,
            grad_residual,
            *partials,
            num_rows,
            *rows.numbers,
            *numbers,
            HAS_GRAD_SUM=grad_sum is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            HAS_GRAD_RESIDUAL=grad_residual_dtype is not None,
            NEED_X_BIAS=need_x_bias,
            NEED_WEIGHT=need_weight,
            NEED_BIAS=need_bias,
            X_IS_SUM=x_is_sum,
            **flags,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            NUM_STAGES=2,
            num_warps=tile.num_warps,
            # g - mean(g) cancels, to 0 at width 1, only if the product in g is rounded.
            **options,
            **target().register_options(tile.registers),
        )
        if partials is not gradients:
            reduce_partials(partial, [g for need, g in zip(needs, gradients, strict=True) if need])
    return grad_x, grad_residual, *gradients
