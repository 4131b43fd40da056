"""Triton kernels of ``bias_activation_dropout``; the README beside this file has the derivation.

A program works on tiles of BLOCK_M rows by BLOCK_N columns of the output. With a gate it reads the
same columns of both halves of a row of ``x``, which is 2 WIDTH long.

A tensor of rows comes as a pointer and three numbers: row ``r`` begins at element
``(r // inner) * outer_stride + (r % inner) * inner_stride``. The strides are in units of
STRIDE_UNIT elements, so that the compiler knows how far they are aligned; so it does of WIDTH.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import dropout_keep, row_offsets, sigmoid_with_slope, tile_mask

# Compiled once for all their values: the number of rows is another in every batch.
_NUMBERS = (
    "num_rows",
    "keep_threshold",
    *(
        f"{tensor}_{number}"
        for tensor in ("grad_output", "x", "residual")
        for number in ("inner", "outer_stride", "inner_stride")
    ),
)


@triton.jit
def load_parameter(parameter_ptr, columns, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Elements of a weight or a bias in fp32; 0 beyond the width. # [1, BLOCK_N]"""
    if WIDTH % BLOCK_N != 0:
        values = tl.load(parameter_ptr + columns, mask=columns < WIDTH, other=0.0)
    else:
        values = tl.load(parameter_ptr + columns)
    return values.to(tl.float32)


@triton.jit
def normal_distribution(x):
    """(1 + erf(x / sqrt(2))) / 2 without its cancellation below 0, and e^(-x^2 / 2).

    The form and the coefficients are those of csrc/common/vec.h.
    """
    bell = tl.exp(x * x * -0.5)
    # Beyond 14 the bell is 0, and powers would be infinite.
    a = tl.minimum(tl.abs(x), 14.0)
    p = 3.854847672e-3 * a + 3.891709544e-2
    p = p * a + 1.782163616e-1
    p = p * a + 4.316352405e-1
    p = p * a + 0.5
    q = 9.662505624e-3 * a + 9.755903536e-2
    q = q * a + 4.562013973e-1
    q = q * a + 1.181840834
    q = q * a + 1.661155168
    q = q * a + 1.0
    below = bell * (p / q)
    return tl.where(x < 0.0, below, 1.0 - below), bell


@triton.jit
def activate(x, gradient, ACTIVATION: tl.constexpr):
    """f(x), and the gradient of x, given that of f(x)."""
    if ACTIVATION == "relu":
        # NaN stays NaN, and lets the gradient pass, as in torch.
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, gradient)
    elif ACTIVATION == "gelu":
        probability, bell = normal_distribution(x)
        return x * probability, gradient * (probability + x * bell * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), and 2 sqrt(2 / pi) is 1.59...
        value, slope = sigmoid_with_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        # Beyond 20 the slope is 0, which an infinite square would turn into NaN.
        near = tl.minimum(tl.maximum(x, -20.0), 20.0)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
        return x * value, gradient * (value + near * slope * inner)
    elif ACTIVATION == "silu":
        value, slope = sigmoid_with_slope(x)
        return x * value, gradient * (value + x * slope)
    elif ACTIVATION == "sigmoid":
        value, slope = sigmoid_with_slope(x)
        return value, gradient * slope
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x, gradient


@triton.jit
def load_hidden(x_ptr, x_rows, columns, mask, bias, HAS_BIAS: tl.constexpr):
    """x + bias in fp32. # [BLOCK_M, BLOCK_N]"""
    hidden = tl.load(x_ptr + x_rows + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        hidden += bias
    return hidden


@triton.jit(do_not_specialize=_NUMBERS)
def bias_activation_dropout_forward_kernel(
    x_ptr,
    residual_ptr,
    bias_ptr,
    seed_ptr,
    output_ptr,
    num_rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    keep_scale,
    keep_threshold,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the output. Programs that follow each other have tiles beside each other."""
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    rows = (pid // COLUMN_TILES).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (pid % COLUMN_TILES) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)[None, :]
    mask = tile_mask(rows, num_rows, columns, WIDTH, BLOCK_M, BLOCK_N)
    x_rows = row_offsets(
        rows, x_inner, x_outer_stride * STRIDE_UNIT, x_inner_stride * STRIDE_UNIT, ONE_STRIDE
    )
    bias = 0.0
    if HAS_BIAS:
        bias = load_parameter(bias_ptr, columns, WIDTH, BLOCK_N)
    hidden = load_hidden(x_ptr, x_rows, columns, mask, bias, HAS_BIAS)
    output, _ = activate(hidden, 0.0, ACTIVATION)
    if IS_GATED:
        if HAS_BIAS:
            bias = load_parameter(bias_ptr + WIDTH, columns, WIDTH, BLOCK_N)
        output *= load_hidden(x_ptr + WIDTH, x_rows, columns, mask, bias, HAS_BIAS)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(seed, keep_threshold, rows, start, WIDTH, BLOCK_N, WIDTH % 4 == 0)
        output = tl.where(keep, output * keep_scale, 0.0)
    if HAS_RESIDUAL:
        residual_rows = row_offsets(
            rows,
            residual_inner,
            residual_outer_stride * STRIDE_UNIT,
            residual_inner_stride * STRIDE_UNIT,
            ONE_STRIDE,
        )
        residual = tl.load(residual_ptr + residual_rows + columns, mask=mask, other=0.0)
        output += residual.to(tl.float32)
    out = output_ptr + (rows * WIDTH)[:, None] + columns
    tl.store(out, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_partial(partial_ptr, sums, columns, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of a tile over its rows, which are a program's own."""
    flat = tl.reshape(columns, (BLOCK_N,))
    if WIDTH % BLOCK_N != 0:
        tl.store(partial_ptr + flat, tl.sum(sums, 0), mask=flat < WIDTH)
    else:
        tl.store(partial_ptr + flat, tl.sum(sums, 0))


@triton.jit(do_not_specialize=_NUMBERS)
def bias_activation_dropout_backward_kernel(
    grad_output_ptr,
    x_ptr,
    bias_ptr,
    seed_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    grad_output_inner,
    grad_output_outer_stride,
    grad_output_inner_stride,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    keep_scale,
    keep_threshold,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The gradient of x, and this program's row of the partial sums of the gradient of the bias.

    Program p takes tiles p, p + programs, ... of rows, in the columns of its second index, and owns
    row p of the partial sums, fp32 [programs, columns of x]: nothing is shared, so the sums are
    made in one order.
    """
    X_PASSES: tl.constexpr = ACTIVATION == "identity" and not IS_GATED
    COLUMNS: tl.constexpr = 2 * WIDTH if IS_GATED else WIDTH
    pid = tl.program_id(0)
    start = tl.program_id(1) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)[None, :]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    bias = 0.0
    value_bias = 0.0
    if HAS_BIAS:
        bias = load_parameter(bias_ptr, columns, WIDTH, BLOCK_N)
        if IS_GATED:
            value_bias = load_parameter(bias_ptr + WIDTH, columns, WIDTH, BLOCK_N)
    # Summed over BLOCK_M once, after the last tile.
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    value_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for tile in tl.range(
        pid, tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES
    ):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = tile_mask(rows, num_rows, columns, WIDTH, BLOCK_M, BLOCK_N)
        grad_output_rows = row_offsets(
            rows,
            grad_output_inner,
            grad_output_outer_stride * STRIDE_UNIT,
            grad_output_inner_stride * STRIDE_UNIT,
            ONE_STRIDE,
        )
        # 0 beyond the tensor, and so are the gradients there, which go into the sums.
        grad = tl.load(grad_output_ptr + grad_output_rows + columns, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        keep = mask
        if HAS_DROPOUT:
            keep = dropout_keep(seed, keep_threshold, rows, start, WIDTH, BLOCK_N, WIDTH % 4 == 0)
            grad *= keep_scale
        value_grad = grad
        if not X_PASSES:
            x_rows = row_offsets(
                rows,
                x_inner,
                x_outer_stride * STRIDE_UNIT,
                x_inner_stride * STRIDE_UNIT,
                ONE_STRIDE,
            )
            hidden = load_hidden(x_ptr, x_rows, columns, mask, bias, HAS_BIAS)
            if IS_GATED:
                value = load_hidden(x_ptr + WIDTH, x_rows, columns, mask, value_bias, HAS_BIAS)
                gate, grad = activate(hidden, grad * value, ACTIVATION)
                value_grad *= gate
            else:
                _, grad = activate(hidden, grad, ACTIVATION)
        if HAS_DROPOUT:
            # Last, since what is dropped may have a derivative of NaN.
            grad = tl.where(keep, grad, 0.0)
            value_grad = tl.where(keep, value_grad, 0.0)
        out = grad_x_ptr + (rows * COLUMNS)[:, None] + columns
        if NEED_X:
            tl.store(out, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if NEED_BIAS:
            sums += grad
        if IS_GATED:
            if NEED_X:
                tl.store(out + WIDTH, value_grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
            if NEED_BIAS:
                value_sums += value_grad

    if NEED_BIAS:
        partial_ptr += pid.to(tl.int64) * COLUMNS
        store_partial(partial_ptr, sums, columns, WIDTH, BLOCK_N)
        if IS_GATED:
            store_partial(partial_ptr + WIDTH, value_sums, columns, WIDTH, BLOCK_N)
