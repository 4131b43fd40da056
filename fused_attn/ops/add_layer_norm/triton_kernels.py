"""Triton kernels of ``add_layer_norm``; the README beside this file has the derivation.

A program works on tiles of BLOCK_M rows by BLOCK_N columns. With SINGLE_BLOCK the tile spans the
row, which is then read once; else the columns are a loop, and the second walk over a row reads it
from the L2 cache.

A tensor of rows comes as a pointer and three numbers: row ``r`` begins at element
``(r // inner) * outer_stride + (r % inner) * inner_stride``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import dropout_keep, row_offsets


@triton.jit
def load_sum(
    x_ptr,
    residual_ptr,
    x_rows,
    residual_rows,
    columns,
    mask,
    keep,
    keep_scale,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """residual + dropout(x) in fp32; 0 outside the mask. # [BLOCK_M, BLOCK_N]"""
    total = tl.load(x_ptr + x_rows + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        total = tl.where(keep, total * keep_scale, 0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + residual_rows + columns, mask=mask, other=0.0)
        total += residual.to(tl.float32)
    return total


@triton.jit
def add_layer_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    output_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    width,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    eps,
    keep_scale,
    keep_threshold,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SUM: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    WHOLE_COUNTERS: tl.constexpr,
    SINGLE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows [pid * BLOCK_M, (pid + 1) * BLOCK_M): output, statistics and, with HAS_SUM, the sum."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = (rows < num_rows)[:, None]
    x_rows = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride, ONE_STRIDE)
    residual_rows = x_rows
    if HAS_RESIDUAL:
        residual_rows = row_offsets(
            rows, residual_inner, residual_outer_stride, residual_inner_stride, ONE_STRIDE
        )
    out_rows = (rows * width)[:, None]
    offs = tl.arange(0, BLOCK_N)[None, :]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    # Chan et al.: the mean and the squared deviations of a block join those of the blocks before
    # it. No square of a large mean is ever taken.
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_N):
        columns = start + offs
        mask = row_mask & (columns < width)
        keep = mask
        if HAS_DROPOUT:
            keep = dropout_keep(seed, keep_threshold, rows, start, width, BLOCK_N, WHOLE_COUNTERS)
        total = load_sum(
            x_ptr,
            residual_ptr,
            x_rows,
            residual_rows,
            columns,
            mask,
            keep,
            keep_scale,
            HAS_RESIDUAL,
            HAS_DROPOUT,
        )
        if HAS_SUM:
            # What is normalised is the sum that the caller sees.
            rounded = total.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + out_rows + columns, rounded, mask=mask)
            total = rounded.to(tl.float32)
        count = tl.minimum(width - start, BLOCK_N).to(tl.float32)
        block_mean = tl.sum(total, 1) / count
        deviation = tl.where(columns < width, total - block_mean[:, None], 0.0)
        share = count / (start + count)
        delta = block_mean - mean
        squares += tl.sum(deviation * deviation, 1) + delta * delta * (start * share)
        mean += delta * share
    rstd = tl.rsqrt(squares / width + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)

    for start in range(0, width, BLOCK_N):
        columns = start + offs
        mask = row_mask & (columns < width)
        if not SINGLE_BLOCK:
            keep = mask
            if HAS_DROPOUT:
                keep = dropout_keep(
                    seed, keep_threshold, rows, start, width, BLOCK_N, WHOLE_COUNTERS
                )
            total = load_sum(
                x_ptr,
                residual_ptr,
                x_rows,
                residual_rows,
                columns,
                mask,
                keep,
                keep_scale,
                HAS_RESIDUAL,
                HAS_DROPOUT,
            )
            if HAS_SUM:
                total = total.to(sum_ptr.dtype.element_ty).to(tl.float32)
        output = (total - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            output *= tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        if HAS_BIAS:
            output += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(output_ptr + out_rows + columns, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def times_weight(grad_output, weight_ptr, columns, width, HAS_WEIGHT: tl.constexpr):
    """g = grad_output * weight in fp32. # [BLOCK_M, BLOCK_N]"""
    g = grad_output.to(tl.float32)
    if HAS_WEIGHT:
        g *= tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return g


@triton.jit
def backward_tile(
    grad_output_ptr,
    x_ptr,
    residual_ptr,
    grad_output_rows,
    x_rows,
    residual_rows,
    columns,
    mask,
    keep,
    keep_scale,
    mean,
    rstd,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    X_IS_SUM: tl.constexpr,
):
    """grad_output as it was loaded, and y, the normalised sum; both 0 outside the mask."""
    total = load_sum(
        x_ptr,
        residual_ptr,
        x_rows,
        residual_rows,
        columns,
        mask,
        keep,
        keep_scale,
        HAS_RESIDUAL,
        HAS_DROPOUT and not X_IS_SUM,
    )
    y = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
    grad_output = tl.load(grad_output_ptr + grad_output_rows + columns, mask=mask, other=0.0)
    return grad_output, y


@triton.jit
def add_layer_norm_backward_kernel(
    grad_output_ptr,
    grad_sum_ptr,
    x_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    partial_ptr,
    num_rows,
    width,
    grad_output_inner,
    grad_output_outer_stride,
    grad_output_inner_stride,
    grad_sum_inner,
    grad_sum_outer_stride,
    grad_sum_inner_stride,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    keep_scale,
    keep_threshold,
    HAS_GRAD_SUM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_GRAD_RESIDUAL: tl.constexpr,
    HAS_PARAMETERS: tl.constexpr,
    X_IS_SUM: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    WHOLE_COUNTERS: tl.constexpr,
    SINGLE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of the inputs, and this program's rows of the partial parameter gradients.

    Program p takes tiles p, p + programs, ... and owns partial_ptr[0, p] (weight) and
    partial_ptr[1, p] (bias), fp32 [2, programs, width]: nothing is shared, so the sums are made in
    one order.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    offs = tl.arange(0, BLOCK_N)[None, :]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    weight_partial_ptr = partial_ptr
    bias_partial_ptr = partial_ptr
    if HAS_PARAMETERS:
        weight_partial_ptr = partial_ptr + pid.to(tl.int64) * width
        bias_partial_ptr = partial_ptr + (programs + pid).to(tl.int64) * width
    grad_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    grad_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for tile in range(pid, tl.cdiv(num_rows, BLOCK_M), programs):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = (rows < num_rows)[:, None]
        grad_output_rows = row_offsets(
            rows, grad_output_inner, grad_output_outer_stride, grad_output_inner_stride, ONE_STRIDE
        )
        x_rows = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride, ONE_STRIDE)
        residual_rows = x_rows
        if HAS_RESIDUAL:
            residual_rows = row_offsets(
                rows, residual_inner, residual_outer_stride, residual_inner_stride, ONE_STRIDE
            )
        grad_sum_rows = x_rows
        if HAS_GRAD_SUM:
            grad_sum_rows = row_offsets(
                rows, grad_sum_inner, grad_sum_outer_stride, grad_sum_inner_stride, ONE_STRIDE
            )
        out_rows = (rows * width)[:, None]
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)

        mean_g = tl.zeros((BLOCK_M,), tl.float32)
        mean_gy = tl.zeros((BLOCK_M,), tl.float32)
        grad_output = tl.zeros((BLOCK_M, BLOCK_N), grad_output_ptr.dtype.element_ty)
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        keep = (offs < width) & row_mask
        for start in range(0, width, BLOCK_N):
            columns = start + offs
            mask = row_mask & (columns < width)
            if HAS_DROPOUT:
                keep = dropout_keep(
                    seed, keep_threshold, rows, start, width, BLOCK_N, WHOLE_COUNTERS
                )
            grad_output, y = backward_tile(
                grad_output_ptr,
                x_ptr,
                residual_ptr,
                grad_output_rows,
                x_rows,
                residual_rows,
                columns,
                mask,
                keep,
                keep_scale,
                mean,
                rstd,
                HAS_RESIDUAL,
                HAS_DROPOUT,
                X_IS_SUM,
            )
            g = times_weight(grad_output, weight_ptr, columns, width, HAS_WEIGHT)
            mean_g += tl.sum(g, 1)
            mean_gy += tl.sum(g * y, 1)
        mean_g = (mean_g / width)[:, None]
        mean_gy = (mean_gy / width)[:, None]

        for start in range(0, width, BLOCK_N):
            columns = start + offs
            mask = row_mask & (columns < width)
            if not SINGLE_BLOCK:
                if HAS_DROPOUT:
                    keep = dropout_keep(
                        seed, keep_threshold, rows, start, width, BLOCK_N, WHOLE_COUNTERS
                    )
                grad_output, y = backward_tile(
                    grad_output_ptr,
                    x_ptr,
                    residual_ptr,
                    grad_output_rows,
                    x_rows,
                    residual_rows,
                    columns,
                    mask,
                    keep,
                    keep_scale,
                    mean,
                    rstd,
                    HAS_RESIDUAL,
                    HAS_DROPOUT,
                    X_IS_SUM,
                )
            # Not kept from the first walk: grad_output takes half of the registers, or fewer.
            g = times_weight(grad_output, weight_ptr, columns, width, HAS_WEIGHT)
            grad = (g - mean_g - y * mean_gy) * rstd[:, None]
            if HAS_GRAD_SUM:
                grad_sum = tl.load(grad_sum_ptr + grad_sum_rows + columns, mask=mask, other=0.0)
                grad += grad_sum.to(tl.float32)
            if HAS_GRAD_RESIDUAL:
                tl.store(
                    grad_residual_ptr + out_rows + columns,
                    grad.to(grad_residual_ptr.dtype.element_ty),
                    mask=mask,
                )
            if HAS_DROPOUT:
                grad = tl.where(keep, grad * keep_scale, 0.0)
            tl.store(
                grad_x_ptr + out_rows + columns, grad.to(grad_x_ptr.dtype.element_ty), mask=mask
            )
            if HAS_PARAMETERS:
                if SINGLE_BLOCK:
                    # Summed over BLOCK_M once, after the last tile.
                    grad_weight += grad_output.to(tl.float32) * y
                    grad_bias += grad_output.to(tl.float32)
                else:
                    flat = start + tl.arange(0, BLOCK_N)
                    inside = flat < width
                    before = inside & (tile != pid)
                    weight_sum = tl.sum(grad_output.to(tl.float32) * y, 0)
                    weight_sum += tl.load(weight_partial_ptr + flat, mask=before, other=0.0)
                    bias_sum = tl.sum(grad_output.to(tl.float32), 0)
                    bias_sum += tl.load(bias_partial_ptr + flat, mask=before, other=0.0)
                    tl.store(weight_partial_ptr + flat, weight_sum, mask=inside)
                    tl.store(bias_partial_ptr + flat, bias_sum, mask=inside)
        if HAS_PARAMETERS and not SINGLE_BLOCK:
            # The next tile may read what another thread of this program wrote.
            tl.debug_barrier()

    if HAS_PARAMETERS and SINGLE_BLOCK:
        flat = tl.arange(0, BLOCK_N)
        tl.store(weight_partial_ptr + flat, tl.sum(grad_weight, 0), mask=flat < width)
        tl.store(bias_partial_ptr + flat, tl.sum(grad_bias, 0), mask=flat < width)


@triton.jit
def add_layer_norm_reduce_kernel(
    partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    programs,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums the programs' rows of partial_ptr[k], the program's second index, to a gradient."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, programs, BLOCK_M):
        rows = start + offs_m
        offsets = ((k * programs + rows) * width)[:, None] + columns[None, :]
        mask = (rows < programs)[:, None] & (columns < width)[None, :]
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    gradient = tl.sum(total, 0)
    if k == 0:
        tl.store(grad_weight_ptr + columns, gradient, mask=columns < width)
    else:
        tl.store(grad_bias_ptr + columns, gradient, mask=columns < width)
