"""Triton kernels of ``recurrent_cell``; the README beside this file has the derivation.

A program works on BLOCK_M rows by BLOCK_N columns of a state, WIDTH wide, and reads these columns
of each gate: gate g of a row of the gates begins at column g WIDTH.

A tensor of rows comes as a pointer and three numbers: row ``r`` begins at element
``(r // inner) * outer_stride + (r % inner) * inner_stride``. The strides are in units of
STRIDE_UNIT elements, so that the compiler knows how far they are aligned; so it does of WIDTH.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import row_offsets, sigmoid_with_slope, tanh, tile_mask

# Compiled once for all their values: the number of rows is another in every batch.
_NUMBERS = (
    "num_rows",
    *(
        f"{tensor}_{number}"
        for tensor in ("grad_hidden", "grad_cell", "input", "hidden", "state")
        for number in ("inner", "outer_stride", "inner_stride")
    ),
)


@triton.jit
def tile_of(num_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns and mask of this program. Programs in sequence have tiles side by side."""
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    rows = (pid // COLUMN_TILES).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, columns, tile_mask(rows, num_rows, columns, WIDTH, BLOCK_M, BLOCK_N)


@triton.jit
def load_rows(
    pointer,
    rows,
    columns,
    mask,
    inner,
    outer_stride,
    inner_stride,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Elements in fp32. # [BLOCK_M, BLOCK_N]"""
    offsets = row_offsets(
        rows, inner, outer_stride * STRIDE_UNIT, inner_stride * STRIDE_UNIT, ONE_STRIDE
    )
    return tl.load(pointer + offsets + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_NUMBERS)
def recurrent_cell_forward_kernel(
    input_ptr,
    hidden_ptr,
    state_ptr,
    new_hidden_ptr,
    new_cell_ptr,
    num_rows,
    input_inner,
    input_outer_stride,
    input_inner_stride,
    hidden_inner,
    hidden_outer_stride,
    hidden_inner_stride,
    state_inner,
    state_outer_stride,
    state_inner_stride,
    KIND: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the new states."""
    rows, columns, mask = tile_of(num_rows, WIDTH, BLOCK_M, BLOCK_N)
    input_rows = row_offsets(
        rows,
        input_inner,
        input_outer_stride * STRIDE_UNIT,
        input_inner_stride * STRIDE_UNIT,
        ONE_STRIDE,
    )
    hidden_rows = row_offsets(
        rows,
        hidden_inner,
        hidden_outer_stride * STRIDE_UNIT,
        hidden_inner_stride * STRIDE_UNIT,
        ONE_STRIDE,
    )
    from_input = input_ptr + input_rows + columns
    from_hidden = hidden_ptr + hidden_rows + columns
    out = (rows * WIDTH)[:, None] + columns
    if KIND == "lstm":
        state = load_rows(
            state_ptr,
            rows,
            columns,
            mask,
            state_inner,
            state_outer_stride,
            state_inner_stride,
            ONE_STRIDE,
            STRIDE_UNIT,
        )
        input_gate, _ = sigmoid_with_slope(load_sum(from_input, from_hidden, mask))
        forget, _ = sigmoid_with_slope(load_sum(from_input + WIDTH, from_hidden + WIDTH, mask))
        candidate, _ = tanh(load_sum(from_input + 2 * WIDTH, from_hidden + 2 * WIDTH, mask))
        output, _ = sigmoid_with_slope(
            load_sum(from_input + 3 * WIDTH, from_hidden + 3 * WIDTH, mask)
        )
        cell = forget * state + input_gate * candidate
        squashed, _ = tanh(cell)
        tl.store(new_cell_ptr + out, cell.to(new_cell_ptr.dtype.element_ty), mask=mask)
        new_hidden = output * squashed
    elif KIND == "gru":
        state = load_rows(
            state_ptr,
            rows,
            columns,
            mask,
            state_inner,
            state_outer_stride,
            state_inner_stride,
            ONE_STRIDE,
            STRIDE_UNIT,
        )
        reset, _ = sigmoid_with_slope(load_sum(from_input, from_hidden, mask))
        update, _ = sigmoid_with_slope(load_sum(from_input + WIDTH, from_hidden + WIDTH, mask))
        input_n = tl.load(from_input + 2 * WIDTH, mask=mask, other=0.0).to(tl.float32)
        hidden_n = tl.load(from_hidden + 2 * WIDTH, mask=mask, other=0.0).to(tl.float32)
        candidate, _ = tanh(input_n + reset * hidden_n)
        new_hidden = candidate + update * (state - candidate)
    else:
        total = load_sum(from_input, from_hidden, mask)
        if KIND == "tanh":
            new_hidden, _ = tanh(total)
        else:
            tl.static_assert(KIND == "relu")
            # NaN stays NaN, as in torch.
            new_hidden = tl.where(total <= 0.0, 0.0, total)
    tl.store(new_hidden_ptr + out, new_hidden.to(new_hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_sum(first_ptr, second_ptr, mask):
    """The sum of two gates in fp32. # [BLOCK_M, BLOCK_N]"""
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    return first + tl.load(second_ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_NUMBERS)
def recurrent_cell_backward_kernel(
    grad_hidden_ptr,
    grad_cell_ptr,
    input_ptr,
    hidden_ptr,
    state_ptr,
    grad_gates_ptr,
    grad_hidden_gates_ptr,
    grad_state_ptr,
    num_rows,
    grad_hidden_inner,
    grad_hidden_outer_stride,
    grad_hidden_inner_stride,
    grad_cell_inner,
    grad_cell_outer_stride,
    grad_cell_inner_stride,
    input_inner,
    input_outer_stride,
    input_inner_stride,
    hidden_inner,
    hidden_outer_stride,
    hidden_inner_stride,
    state_inner,
    state_outer_stride,
    state_inner_stride,
    KIND: tl.constexpr,
    HAS_GRAD_HIDDEN: tl.constexpr,
    HAS_GRAD_CELL: tl.constexpr,
    NEED_STATE: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the gradients, from the gates, which are computed again."""
    GATES: tl.constexpr = 4 if KIND == "lstm" else (3 if KIND == "gru" else 1)
    rows, columns, mask = tile_of(num_rows, WIDTH, BLOCK_M, BLOCK_N)
    input_rows = row_offsets(
        rows,
        input_inner,
        input_outer_stride * STRIDE_UNIT,
        input_inner_stride * STRIDE_UNIT,
        ONE_STRIDE,
    )
    hidden_rows = row_offsets(
        rows,
        hidden_inner,
        hidden_outer_stride * STRIDE_UNIT,
        hidden_inner_stride * STRIDE_UNIT,
        ONE_STRIDE,
    )
    from_input = input_ptr + input_rows + columns
    from_hidden = hidden_ptr + hidden_rows + columns
    grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_GRAD_HIDDEN:
        grad = load_rows(
            grad_hidden_ptr,
            rows,
            columns,
            mask,
            grad_hidden_inner,
            grad_hidden_outer_stride,
            grad_hidden_inner_stride,
            ONE_STRIDE,
            STRIDE_UNIT,
        )
    dtype: tl.constexpr = grad_gates_ptr.dtype.element_ty
    out = (rows * (GATES * WIDTH))[:, None] + columns
    grad_gates = grad_gates_ptr + out
    if GATES > 1:
        state = load_rows(
            state_ptr,
            rows,
            columns,
            mask,
            state_inner,
            state_outer_stride,
            state_inner_stride,
            ONE_STRIDE,
            STRIDE_UNIT,
        )
    if KIND == "lstm":
        input_gate, input_slope = sigmoid_with_slope(load_sum(from_input, from_hidden, mask))
        forget, forget_slope = sigmoid_with_slope(
            load_sum(from_input + WIDTH, from_hidden + WIDTH, mask)
        )
        candidate, candidate_slope = tanh(
            load_sum(from_input + 2 * WIDTH, from_hidden + 2 * WIDTH, mask)
        )
        output, output_slope = sigmoid_with_slope(
            load_sum(from_input + 3 * WIDTH, from_hidden + 3 * WIDTH, mask)
        )
        squashed, squashed_slope = tanh(forget * state + input_gate * candidate)
        grad_cell = grad * output * squashed_slope
        if HAS_GRAD_CELL:
            grad_cell += load_rows(
                grad_cell_ptr,
                rows,
                columns,
                mask,
                grad_cell_inner,
                grad_cell_outer_stride,
                grad_cell_inner_stride,
                ONE_STRIDE,
                STRIDE_UNIT,
            )
        tl.store(grad_gates, (grad_cell * candidate * input_slope).to(dtype), mask=mask)
        tl.store(grad_gates + WIDTH, (grad_cell * state * forget_slope).to(dtype), mask=mask)
        grad_candidate = grad_cell * input_gate * candidate_slope
        tl.store(grad_gates + 2 * WIDTH, grad_candidate.to(dtype), mask=mask)
        tl.store(grad_gates + 3 * WIDTH, (grad * squashed * output_slope).to(dtype), mask=mask)
        grad_state = grad_cell * forget
    elif KIND == "gru":
        reset, reset_slope = sigmoid_with_slope(load_sum(from_input, from_hidden, mask))
        update, update_slope = sigmoid_with_slope(
            load_sum(from_input + WIDTH, from_hidden + WIDTH, mask)
        )
        input_n = tl.load(from_input + 2 * WIDTH, mask=mask, other=0.0).to(tl.float32)
        hidden_n = tl.load(from_hidden + 2 * WIDTH, mask=mask, other=0.0).to(tl.float32)
        candidate, candidate_slope = tanh(input_n + reset * hidden_n)
        grad_update = (grad * (state - candidate) * update_slope).to(dtype)
        grad_n = (grad - grad * update) * candidate_slope
        grad_reset = (grad_n * hidden_n * reset_slope).to(dtype)
        grad_hidden_gates = grad_hidden_gates_ptr + out
        tl.store(grad_gates, grad_reset, mask=mask)
        tl.store(grad_gates + WIDTH, grad_update, mask=mask)
        tl.store(grad_gates + 2 * WIDTH, grad_n.to(dtype), mask=mask)
        tl.store(grad_hidden_gates, grad_reset, mask=mask)
        tl.store(grad_hidden_gates + WIDTH, grad_update, mask=mask)
        tl.store(grad_hidden_gates + 2 * WIDTH, (grad_n * reset).to(dtype), mask=mask)
        grad_state = grad * update
    else:
        total = load_sum(from_input, from_hidden, mask)
        if KIND == "tanh":
            _, slope = tanh(total)
            grad *= slope
        else:
            tl.static_assert(KIND == "relu")
            # NaN lets the gradient pass, as in torch.
            grad = tl.where(total <= 0.0, 0.0, grad)
        tl.store(grad_gates, grad.to(dtype), mask=mask)
    if NEED_STATE:
        out = (rows * WIDTH)[:, None] + columns
        tl.store(grad_state_ptr + out, grad_state.to(grad_state_ptr.dtype.element_ty), mask=mask)
