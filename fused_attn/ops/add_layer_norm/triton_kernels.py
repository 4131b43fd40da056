"""Triton kernels of ``add_layer_norm``; the README beside this file has the derivation.

A program works on tiles of BLOCK_M rows by BLOCK_N columns. Where a tile spans the row (WIDTH <=
BLOCK_N), a row is read once. Else the forward walks over it twice, the second time through the L2
cache, and the backward has a kernel of its own for the means of a row.

A tensor of rows comes as a pointer and three numbers: row ``r`` begins at element
``(r // inner) * outer_stride + (r % inner) * inner_stride``. The strides are in units of
STRIDE_UNIT elements, so that the compiler knows how far they are aligned; so it does of WIDTH.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import dropout_keep, row_offsets, tile_mask

# Compiled once for all their values: the number of rows is another in every batch.
_NUMBERS = (
    "num_rows",
    "keep_threshold",
    *(
        f"{tensor}_{number}"
        for tensor in ("grad_output", "grad_sum", "x", "residual")
        for number in ("inner", "outer_stride", "inner_stride")
    ),
)


@triton.jit
def tile_columns(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """0, 1, ... in each row. # [BLOCK_M, BLOCK_N]

    Parameters too are loaded in the shape of the tile: a row of them alone would be spread over
    all threads, and the tile, or the parameters, rearranged through shared memory to meet.
    """
    return tl.arange(0, BLOCK_N)[None, :] + tl.zeros((BLOCK_M, 1), tl.int32)


@triton.jit
def load_parameter(parameter_ptr, columns, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Elements of a weight or a bias; 0 beyond the width."""
    offsets = columns
    if WIDTH % 8 != 0:
        # Rows are not aligned to 16 bytes. Parameters are, and read so would have every thread
        # take 16 consecutive bytes of the rows too, an element at a time. The remainder hides it.
        offsets = columns % WIDTH
    if WIDTH % BLOCK_N != 0:
        values = tl.load(parameter_ptr + offsets, mask=columns < WIDTH, other=0.0)
    else:
        values = tl.load(parameter_ptr + offsets)
    return values


@triton.jit
def load_sum(
    x_ptr,
    residual_ptr,
    x_rows,
    residual_rows,
    columns,
    mask,
    x_bias,
    keep,
    keep_scale,
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """residual + dropout(x + x_bias) in fp32; 0 in columns beyond the width. # [M, N]"""
    total = tl.load(x_ptr + x_rows + columns, mask=mask, other=0.0, eviction_policy=EVICTION).to(
        tl.float32
    )
    if HAS_X_BIAS:
        total += x_bias.to(tl.float32)
    if HAS_DROPOUT:
        total = tl.where(keep, total * keep_scale, 0.0)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + residual_rows + columns,
            mask=mask,
            other=0.0,
            eviction_policy=EVICTION,
        )
        total += residual.to(tl.float32)
    return total


@triton.jit(do_not_specialize=_NUMBERS)
def add_layer_norm_forward_kernel(
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    output_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    eps,
    keep_scale,
    keep_threshold,
    IS_RMS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SUM: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows [pid * BLOCK_M, (pid + 1) * BLOCK_M): output, statistics and, with HAS_SUM, the sum."""
    WHOLE_COUNTERS: tl.constexpr = WIDTH % 4 == 0
    # Rows that are not read again leave the parameters, and what the next kernel reads, in the
    # caches.
    FIRST_WALK: tl.constexpr = "evict_first" if WIDTH <= BLOCK_N else ""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = row_offsets(
        rows,
        x_inner,
        x_outer_stride * STRIDE_UNIT,
        x_inner_stride * STRIDE_UNIT,
        ONE_STRIDE,
    )
    residual_rows = x_rows
    if HAS_RESIDUAL:
        residual_rows = row_offsets(
            rows,
            residual_inner,
            residual_outer_stride * STRIDE_UNIT,
            residual_inner_stride * STRIDE_UNIT,
            ONE_STRIDE,
        )
    out_rows = (rows * WIDTH)[:, None]
    offs = tile_columns(BLOCK_M, BLOCK_N)
    weight = 1.0
    bias = 0.0
    if WIDTH <= BLOCK_N:
        # On their way while the rows come.
        if HAS_WEIGHT:
            weight = load_parameter(weight_ptr, offs, WIDTH, BLOCK_N)
        if HAS_BIAS:
            bias = load_parameter(bias_ptr, offs, WIDTH, BLOCK_N)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    # Chan et al.: the mean and the squared deviations of a block join those of the blocks before
    # it. No square of a large mean is ever taken. RMSNorm has squares without a mean.
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_N):
        columns = start + offs
        mask = tile_mask(rows, num_rows, columns, WIDTH, BLOCK_M, BLOCK_N)
        x_bias = 0.0
        if HAS_X_BIAS:
            x_bias = load_parameter(x_bias_ptr, columns, WIDTH, BLOCK_N)
        keep = mask
        if HAS_DROPOUT:
            keep = dropout_keep(seed, keep_threshold, rows, start, WIDTH, BLOCK_N, WHOLE_COUNTERS)
        total = load_sum(
            x_ptr,
            residual_ptr,
            x_rows,
            residual_rows,
            columns,
            mask,
            x_bias,
            keep,
            keep_scale,
            HAS_X_BIAS,
            HAS_RESIDUAL,
            HAS_DROPOUT,
            FIRST_WALK,
        )
        if HAS_SUM:
            # What is normalised is the sum that the caller sees.
            rounded = total.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + out_rows + columns, rounded, mask=mask)
            total = rounded.to(tl.float32)
        if IS_RMS:
            squares += tl.sum(total * total, 1)
        else:
            count = tl.cast(tl.minimum(WIDTH - start, BLOCK_N), tl.float32)
            block_mean = tl.sum(total, 1) / count
            deviation = total - block_mean[:, None]
            if WIDTH % BLOCK_N != 0:
                deviation = tl.where(columns < WIDTH, deviation, 0.0)
            share = count / (start + count)
            delta = block_mean - mean
            squares += tl.sum(deviation * deviation, 1) + delta * delta * (start * share)
            mean += delta * share
    rstd = tl.rsqrt(squares / WIDTH + eps)

    if HAS_SUM and WIDTH > BLOCK_N:
        # The sum comes back from the cache, perhaps to another thread than wrote it.
        tl.debug_barrier()
    for start in tl.range(0, WIDTH, BLOCK_N):
        columns = start + offs
        mask = tile_mask(rows, num_rows, columns, WIDTH, BLOCK_M, BLOCK_N)
        if WIDTH > BLOCK_N:
            if HAS_SUM:
                total = tl.load(sum_ptr + out_rows + columns, mask=mask, other=0.0).to(tl.float32)
            else:
                x_bias = 0.0
                if HAS_X_BIAS:
                    x_bias = load_parameter(x_bias_ptr, columns, WIDTH, BLOCK_N)
                keep = mask
                if HAS_DROPOUT:
                    keep = dropout_keep(
                        seed, keep_threshold, rows, start, WIDTH, BLOCK_N, WHOLE_COUNTERS
                    )
                total = load_sum(
                    x_ptr,
                    residual_ptr,
                    x_rows,
                    residual_rows,
                    columns,
                    mask,
                    x_bias,
                    keep,
                    keep_scale,
                    HAS_X_BIAS,
                    HAS_RESIDUAL,
                    HAS_DROPOUT,
                    "evict_first",
                )
        output = total
        if not IS_RMS:
            output -= mean[:, None]
        output *= rstd[:, None]
        if HAS_WEIGHT:
            if WIDTH <= BLOCK_N:
                output *= weight.to(tl.float32)
            else:
                output *= load_parameter(weight_ptr, columns, WIDTH, BLOCK_N).to(tl.float32)
        if HAS_BIAS:
            if WIDTH <= BLOCK_N:
                output += bias.to(tl.float32)
            else:
                output += load_parameter(bias_ptr, columns, WIDTH, BLOCK_N).to(tl.float32)
        tl.store(output_ptr + out_rows + columns, output.to(output_ptr.dtype.element_ty), mask=mask)
    if not IS_RMS:
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


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
    x_bias,
    keep,
    keep_scale,
    mean,
    rstd,
    IS_RMS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """grad_output in fp32, 0 outside the mask, and y, the normalised sum. # [M, N] each"""
    y = load_sum(
        x_ptr,
        residual_ptr,
        x_rows,
        residual_rows,
        columns,
        mask,
        x_bias,
        keep,
        keep_scale,
        HAS_X_BIAS,
        HAS_RESIDUAL,
        HAS_DROPOUT,
        EVICTION,
    )
    if not IS_RMS:
        y -= mean[:, None]
    y *= rstd[:, None]
    grad_output = tl.load(
        grad_output_ptr + grad_output_rows + columns,
        mask=mask,
        other=0.0,
        eviction_policy=EVICTION,
    )
    return grad_output.to(tl.float32), y


@triton.jit
def fold(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDS: tl.constexpr):
    """With FOLDS, adds the rows of the lower half to those of the upper. # [BLOCK_M / 2, BLOCK_N]

    A thread then has both, and the sum of its rows takes half of the registers of a tile.
    """
    if FOLDS:
        tile = tl.sum(tl.reshape(tile, (2, BLOCK_M // 2, BLOCK_N)), 0)
    return tile


@triton.jit(do_not_specialize=_NUMBERS)
def add_layer_norm_means_kernel(
    grad_output_ptr,
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    mean_g_ptr,
    mean_gy_ptr,
    num_rows,
    grad_output_inner,
    grad_output_outer_stride,
    grad_output_inner_stride,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    keep_scale,
    keep_threshold,
    IS_RMS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Of a row that is too long for a tile: the means of g and of g * y."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    grad_output_rows = row_offsets(
        rows,
        grad_output_inner,
        grad_output_outer_stride * STRIDE_UNIT,
        grad_output_inner_stride * STRIDE_UNIT,
        ONE_STRIDE,
    )
    x_rows = row_offsets(
        rows,
        x_inner,
        x_outer_stride * STRIDE_UNIT,
        x_inner_stride * STRIDE_UNIT,
        ONE_STRIDE,
    )
    residual_rows = x_rows
    if HAS_RESIDUAL:
        residual_rows = row_offsets(
            rows,
            residual_inner,
            residual_outer_stride * STRIDE_UNIT,
            residual_inner_stride * STRIDE_UNIT,
            ONE_STRIDE,
        )
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    mean = tl.zeros((1,), tl.float32)
    if not IS_RMS:
        mean = tl.load(mean_ptr + rows)
    rstd = tl.load(rstd_ptr + rows)
    sum_g = tl.zeros((1, BLOCK_N), tl.float32)
    sum_gy = tl.zeros((1, BLOCK_N), tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_N, num_stages=NUM_STAGES):
        columns = start + tile_columns(1, BLOCK_N)
        mask = tile_mask(rows, num_rows, columns, WIDTH, 1, BLOCK_N)
        x_bias = 0.0
        if HAS_X_BIAS:
            x_bias = load_parameter(x_bias_ptr, columns, WIDTH, BLOCK_N)
        keep = mask
        if HAS_DROPOUT:
            keep = dropout_keep(seed, keep_threshold, rows, start, WIDTH, BLOCK_N, WIDTH % 4 == 0)
        g, y = backward_tile(
            grad_output_ptr,
            x_ptr,
            residual_ptr,
            grad_output_rows,
            x_rows,
            residual_rows,
            columns,
            mask,
            x_bias,
            keep,
            keep_scale,
            mean,
            rstd,
            IS_RMS,
            HAS_X_BIAS,
            HAS_RESIDUAL,
            HAS_DROPOUT,
            "",
        )
        if HAS_WEIGHT:
            g *= load_parameter(weight_ptr, columns, WIDTH, BLOCK_N).to(tl.float32)
        if not IS_RMS:
            sum_g += g
        sum_gy += g * y
    if not IS_RMS:
        tl.store(mean_g_ptr + rows, tl.sum(sum_g, 1) / WIDTH)
    tl.store(mean_gy_ptr + rows, tl.sum(sum_gy, 1) / WIDTH)


@triton.jit(do_not_specialize=_NUMBERS)
def add_layer_norm_backward_kernel(
    grad_output_ptr,
    grad_sum_ptr,
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    mean_g_ptr,
    mean_gy_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    x_bias_partial_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    num_rows,
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
    IS_RMS: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_GRAD_RESIDUAL: tl.constexpr,
    NEED_X_BIAS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    X_IS_SUM: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FOLDS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Gradients of the inputs, and this program's rows of the partial parameter gradients.

    Program p takes tiles p, p + programs, ... of rows, in the columns of its second index, and
    owns row p of each partial sum, fp32 [programs, WIDTH]: nothing is shared, so the sums are made
    in one order.
    """
    SINGLE_BLOCK: tl.constexpr = WIDTH <= BLOCK_N
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    start = 0
    if not SINGLE_BLOCK:
        start = tl.program_id(1) * BLOCK_N
    columns = start + tile_columns(BLOCK_M, BLOCK_N)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    x_bias = 0.0
    if HAS_X_BIAS:
        x_bias = load_parameter(x_bias_ptr, columns, WIDTH, BLOCK_N)
    weight = 1.0
    if HAS_WEIGHT:
        weight = load_parameter(weight_ptr, columns, WIDTH, BLOCK_N)
    # Summed over the rows of a tile once, after the last one.
    FOLDED: tl.constexpr = BLOCK_M // 2 if FOLDS else BLOCK_M
    grad_x_bias = tl.zeros((FOLDED, BLOCK_N), tl.float32)
    grad_weight = tl.zeros((FOLDED, BLOCK_N), tl.float32)
    grad_bias = tl.zeros((FOLDED, BLOCK_N), tl.float32)

    for tile in tl.range(pid, tl.cdiv(num_rows, BLOCK_M), programs, num_stages=NUM_STAGES):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = tile_mask(rows, num_rows, columns, WIDTH, BLOCK_M, BLOCK_N)
        grad_output_rows = row_offsets(
            rows,
            grad_output_inner,
            grad_output_outer_stride * STRIDE_UNIT,
            grad_output_inner_stride * STRIDE_UNIT,
            ONE_STRIDE,
        )
        x_rows = row_offsets(
            rows,
            x_inner,
            x_outer_stride * STRIDE_UNIT,
            x_inner_stride * STRIDE_UNIT,
            ONE_STRIDE,
        )
        residual_rows = x_rows
        if HAS_RESIDUAL:
            residual_rows = row_offsets(
                rows,
                residual_inner,
                residual_outer_stride * STRIDE_UNIT,
                residual_inner_stride * STRIDE_UNIT,
                ONE_STRIDE,
            )
        out_rows = (rows * WIDTH)[:, None]
        mean = tl.zeros((BLOCK_M,), tl.float32)
        if not IS_RMS:
            mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        keep = mask
        if HAS_DROPOUT and not X_IS_SUM:
            keep = dropout_keep(seed, keep_threshold, rows, start, WIDTH, BLOCK_N, WIDTH % 4 == 0)
        grad_output, y = backward_tile(
            grad_output_ptr,
            x_ptr,
            residual_ptr,
            grad_output_rows,
            x_rows,
            residual_rows,
            columns,
            mask,
            x_bias,
            keep,
            keep_scale,
            mean,
            rstd,
            IS_RMS,
            HAS_X_BIAS,
            HAS_RESIDUAL,
            HAS_DROPOUT and not X_IS_SUM,
            "evict_first",
        )
        if NEED_WEIGHT:
            grad_weight += fold(grad_output * y, BLOCK_M, BLOCK_N, FOLDS)
        if NEED_BIAS:
            grad_bias += fold(grad_output, BLOCK_M, BLOCK_N, FOLDS)
        g = grad_output
        if HAS_WEIGHT:
            g *= weight.to(tl.float32)
        if not SINGLE_BLOCK:
            mean_gy = tl.load(mean_gy_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            mean_g = mean_gy
            if not IS_RMS:
                mean_g = tl.load(mean_g_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        elif IS_RMS:
            mean_gy = (tl.sum(g * y, 1) / WIDTH)[:, None]
            mean_g = mean_gy
        else:
            # Both sums at once: half of the barriers.
            mean_g, mean_gy = tl.split(tl.sum(tl.join(g, g * y), 1) / WIDTH)
            mean_g, mean_gy = mean_g[:, None], mean_gy[:, None]
        if IS_RMS:
            grad = g - y * mean_gy
        else:
            grad = (g - mean_g) - y * mean_gy
        grad *= rstd[:, None]
        if HAS_GRAD_SUM:
            grad_sum_rows = row_offsets(
                rows,
                grad_sum_inner,
                grad_sum_outer_stride * STRIDE_UNIT,
                grad_sum_inner_stride * STRIDE_UNIT,
                ONE_STRIDE,
            )
            grad_sum = tl.load(grad_sum_ptr + grad_sum_rows + columns, mask=mask, other=0.0)
            grad += grad_sum.to(tl.float32)
        if HAS_GRAD_RESIDUAL:
            tl.store(
                grad_residual_ptr + out_rows + columns,
                grad.to(grad_residual_ptr.dtype.element_ty),
                mask=mask,
            )
        if HAS_DROPOUT:
            if X_IS_SUM:
                # Not before it is needed: it takes registers.
                keep = dropout_keep(
                    seed, keep_threshold, rows, start, WIDTH, BLOCK_N, WIDTH % 4 == 0
                )
            grad = tl.where(keep, grad * keep_scale, 0.0)
        if NEED_X_BIAS:
            grad_x_bias += fold(grad, BLOCK_M, BLOCK_N, FOLDS)
        tl.store(grad_x_ptr + out_rows + columns, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)

    own = pid.to(tl.int64) * WIDTH + start + tl.arange(0, BLOCK_N)
    inside = start + tl.arange(0, BLOCK_N) < WIDTH
    if NEED_X_BIAS:
        tl.store(x_bias_partial_ptr + own, tl.sum(grad_x_bias, 0), mask=inside)
    if NEED_WEIGHT:
        tl.store(weight_partial_ptr + own, tl.sum(grad_weight, 0), mask=inside)
    if NEED_BIAS:
        tl.store(bias_partial_ptr + own, tl.sum(grad_bias, 0), mask=inside)
