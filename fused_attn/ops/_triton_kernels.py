"""What Triton kernels of several ops share. Imports triton: only kernels import it.

A tensor of rows comes as a pointer and three numbers (`StridedRows` in `_triton.py`): row ``r``
begins at element ``(r // inner) * outer_stride + (r % inner) * inner_stride``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride, ONE_STRIDE: tl.constexpr):
    """Where int64 rows begin, as a column. # [BLOCK_M, 1]"""
    if ONE_STRIDE:
        offsets = rows * inner_stride
    else:
        # A division in 64 bits is a call, and the registers around it are spilled.
        short = rows.to(tl.int32)
        offsets = (short // inner).to(tl.int64) * outer_stride
        offsets += (short % inner).to(tl.int64) * inner_stride
    return offsets[:, None]


@triton.jit
def tile_mask(
    rows,
    num_rows,
    columns,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where a tile lies in its tensor; constant where the shape says that it does. # [M, N]"""
    # Every program of one row has its row.
    in_rows = tl.full((BLOCK_M, 1), True, tl.int1)
    if BLOCK_M > 1:
        in_rows = (rows < num_rows)[:, None]
    in_columns = tl.full((1, BLOCK_N), True, tl.int1)
    if WIDTH % BLOCK_N != 0:
        in_columns = columns < WIDTH
    return in_rows & in_columns


@triton.jit
def dropout_keep(
    seed,
    keep_threshold,
    rows,
    start,
    width,
    BLOCK_N: tl.constexpr,
    WHOLE_COUNTERS: tl.constexpr,
):
    """Whether dropout keeps each element of a tile: the mask of ops/_philox.py, bit for bit.

    Element i takes word i % 4 of counter i // 4. With WHOLE_COUNTERS (a width divisible by 4) the
    tile's elements are all the words of its counters; else each element finds its own.
    """
    threshold = tl.cast(keep_threshold, tl.uint32)
    if WHOLE_COUNTERS:
        first = (rows * width + start) // 4
        counters = first[:, None] + tl.arange(0, BLOCK_N // 4)[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, counters)  # [BLOCK_M, BLOCK_N / 4]
        # The new dimension of a join is the last one: (w0, w1), (w2, w3) for each counter.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = words.reshape(w0.shape[0], BLOCK_N)
    else:
        elements = (rows * width + start)[:, None] + tl.arange(0, BLOCK_N)[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, elements >> 2)
        lane = elements.to(tl.int32) & 3
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return words >= threshold


@triton.jit
def sigmoid_with_slope(x):
    """1 / (1 + e^-x) and its derivative. Neither overflows nor cancels at either end."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    below = e * r
    return tl.where(x < 0.0, below, r), below * r


@triton.jit
def tanh(x):
    """Hyperbolic tangent and its derivative, to a few units in the last place, near 0 and 1 too."""
    # The polynomial is that of Cephes (Moshier).
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near_zero = p * z * x + x
    # e^-2|x|, in whose terms neither cancels near 1.
    e = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = 1.0 - 2.0 * e / (1.0 + e)
    far = tl.where(x < 0.0, -size, size)
    derivative = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(z < 0.390625, near_zero, far), derivative


@triton.jit(do_not_specialize=("programs",))
def reduce_partials_kernel(
    partial_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    programs,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums the programs' rows of partial_ptr[k], the program's second index, to gradient k."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, programs, BLOCK_M):
        rows = start + offs_m
        offsets = ((k.to(tl.int64) * programs + rows) * WIDTH)[:, None] + columns[None, :]
        mask = (rows < programs)[:, None] & (columns < WIDTH)[None, :]
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    gradient = tl.sum(total, 0)
    if k == 0:
        tl.store(first_ptr + columns, gradient, mask=columns < WIDTH)
    elif k == 1:
        tl.store(second_ptr + columns, gradient, mask=columns < WIDTH)
    else:
        tl.store(third_ptr + columns, gradient, mask=columns < WIDTH)
