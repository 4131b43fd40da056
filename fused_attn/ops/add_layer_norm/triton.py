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

# A thread's share of a tile, in bytes of x: two accesses of 16 bytes. In elements, where other
# things take registers; and where, moreover, each element draws a counter of Philox for itself, or
# is copied to shared memory by itself.
_BYTES_PER_THREAD = 32
_SMALL_SHARE = 8
_SMALLEST_SHARE = 4
# Threads of a program that has short rows.
THREADS = 256
# Registers of a multiprocessor, and the threads that they are for.
_REGISTERS = 65536
_FORWARD_THREADS = 1024
_FORWARD_THREADS_DRAWING_ALONE = 512
_BACKWARD_THREADS = 512
# Rows of a tile at most: a thread has two, or one.
_MAX_ROWS = 512
# Columns that a program of the backward takes of a longer row.
_SLICES = (4096, 2048, 1024)
# Columns of a row of which the means are taken, at a time.
MEANS_BLOCK = 2048
# Bytes of rows that should be on their way to a multiprocessor while the backward works on others;
# tiles ahead at most; and the shared memory of a multiprocessor that they may take, where copies
# to it are asynchronous.
_BYTES_AHEAD = 32 << 10
_MAX_TILES_AHEAD = 3
_SHARED_MEMORY = {"sm_80": 144 << 10, "sm_90": 208 << 10, "sm_100": 208 << 10}


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
    """The tile of the forward, for rows of an item size; the README has the reasons."""
    is_odd = width % 4 != 0
    draws_alone = is_odd and has_dropout
    share = _share(itemsize, is_odd, draws_alone)
    threads = _FORWARD_THREADS_DRAWING_ALONE if draws_alone else _FORWARD_THREADS
    return _tiling(min(next_power_of_2(width), threads * share), share, threads)


def backward_tiling(width: int, itemsize: int, has_dropout: bool, sums: int) -> Tiling:
    """The tile of the backward, which makes up to three sums a column in registers."""
    is_odd = width % 4 != 0
    is_smallest = is_odd and (has_dropout or itemsize == 4)
    share = _share(itemsize, is_odd or has_dropout or sums == 3, is_smallest)
    block_n = next_power_of_2(width)
    if block_n > _BACKWARD_THREADS * share:
        # The widest slice that a tile has room for and of which the last one is nearly full.
        slices = [n for n in _SLICES if n <= _BACKWARD_THREADS * share]
        fitting = (n for n in slices if -width % n <= width // 10)
        block_n = next(fitting, slices[-1])
    return _tiling(block_n, share, _BACKWARD_THREADS)


def _share(itemsize: int, is_small: bool, is_smallest: bool) -> int:
    """Elements of a thread."""
    share = _BYTES_PER_THREAD // itemsize
    if is_smallest:
        return _SMALLEST_SHARE
    return min(share, _SMALL_SHARE) if is_small else share


def _tiling(block_n: int, share: int, resident_threads: int) -> Tiling:
    """The tile of so many columns, where so many threads fill a multiprocessor's registers."""
    threads = min(max(block_n // share, THREADS), resident_threads)
    block_m = min(max(threads * share // block_n, 1), _MAX_ROWS)
    return Tiling(
        block_m,
        block_n,
        threads // target().warp_size,
        _REGISTERS // resident_threads,
        resident_threads // threads,
    )


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

    rows = rows_of(x, residual)
    itemsize = max(tensor.element_size() for tensor in (*rows.tensors, total) if tensor is not None)
    tile = forward_tiling(width, itemsize, dropout_p > 0.0)
    x_rows, residual_rows = rows.tensors
    with device_guard(output):
        add_layer_norm_forward_kernel[(ceil_div(num_rows, tile.BLOCK_M),)](
            x_rows,
            contiguous(x_bias),
            residual_rows,
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
    from .triton_kernels import (
        add_layer_norm_backward_kernel,
        add_layer_norm_means_kernel,
    )

    width = x.size(-1)
    num_rows = x.shape[:-1].numel()
    grad_x = grad_output.new_empty(x.shape)
    if grad_residual_dtype is None:
        grad_residual = grad_output.new_empty((0,))
    else:
        grad_residual = x.new_empty(x.shape, dtype=grad_residual_dtype)
    needs = (need_x_bias, need_weight, need_bias)
    # Of x_bias, weight and bias.
    grad_x_bias, grad_weight, grad_bias = gradients = [
        x.new_empty((width if need else 0,), dtype=torch.float32) for need in needs
    ]
    if num_rows == 0:
        for gradient in gradients:
            gradient.zero_()
        return grad_x, grad_residual, grad_x_bias, grad_weight, grad_bias

    rows = rows_of(grad_output, grad_sum, x, residual)
    grad_output_rows, grad_sum_rows, x_rows, residual_rows = rows.tensors
    itemsizes = [tensor.element_size() for tensor in rows.tensors if tensor is not None]
    tile = backward_tiling(width, max(itemsizes), dropout_p > 0.0, sum(needs))
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

    x_bias, weight = contiguous(x_bias), contiguous(weight)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    tile_bytes = tile.BLOCK_M * tile.BLOCK_N * sum(itemsizes) * tile.programs
    ahead = min(ceil_div(_BYTES_AHEAD, tile_bytes), _MAX_TILES_AHEAD)
    has_room = (ahead + 1) * tile_bytes <= _SHARED_MEMORY.get(target().architecture, 0)
    # Of Triton's pipeline, which fills a buffer that it has just worked on.
    stages = ahead + 2 if has_room else 1
    # Consecutive elements that a thread has of a row.
    vector = min(16 // min(itemsizes), width & -width)
    threads = tile.num_warps * target().warp_size
    # g - mean(g) cancels, to 0 at width 1, only if the product in g is rounded.
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
            add_layer_norm_means_kernel[(num_rows,)](
                grad_output_rows,
                x_rows,
                x_bias,
                residual_rows,
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
                BLOCK_N=MEANS_BLOCK,
                NUM_STAGES=stages,
                num_warps=THREADS // target().warp_size,
                **options,
                **target().register_options(255),
            )
        add_layer_norm_backward_kernel[(programs, slices)](
            grad_output_rows,
            grad_sum_rows,
            x_rows,
            x_bias,
            residual_rows,
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
            FOLDS=tile.BLOCK_M > 1 and 2 * vector * threads <= tile.BLOCK_M * tile.BLOCK_N,
            NUM_STAGES=stages,
            num_warps=tile.num_warps,
            **options,
            **target().register_options(tile.registers),
        )
        if partials is not gradients:
            reduce_partials(partial, [g for need, g in zip(needs, gradients, strict=True) if need])
    return grad_x, grad_residual, grad_x_bias, grad_weight, grad_bias
