"""The Triton kernels of attention's backward: dq (with delta), then dk and dv, then dbias."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import (
    BLOCK,
    SOFTMAX,
    block_head,
    count_steps,
    has_bits,
    head_pointer,
    hide,
    is_cut,
    keep_pairs,
    key_steps,
    listed_steps,
    load_lse,
    load_rows,
    logit_gradient,
    logits,
    pair_pointer,
    query_steps,
    row_index,
    sequence_of,
    shown_keys,
    shown_pairs,
    slope_of,
    source_of,
    step_start,
    store_rows,
    tile_and_head,
    weights,
)


@triton.jit
def query_gradient_loop(
    dq,
    error,
    size,
    q,
    grad_output,
    lse,
    delta,
    k_source,
    v_source,
    k,
    v,
    call,
    sequence,
    h,
    m0,
    steps,
    seed,
    D: tl.constexpr,
    DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDS: tl.constexpr,
    CORRECTED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds dZ k over some key tiles; with CORRECTED also sum dX and sum |dX| of each row."""
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    b = sequence.b
    bias_pointer = pair_pointer(call.bias, b, h)
    mask_pointer = pair_pointer(call.mask, b, h)
    slope = slope_of(call, b, h)
    for i in tl.range(0, count_steps(call, steps, BLOCK_N)):
        n0 = step_start(i, call, steps, BLOCK_N)
        columns = n0 + tl.arange(0, BLOCK_N)[None, :]
        shown = shown_keys(call, mask_pointer, n0 + tl.arange(0, BLOCK_N)[:, None])
        length = sequence.key_length
        k_tile = load_rows(k_source, k, n0, length, shown, D, BLOCK_N, HEAD_DIM, DESCRIPTORS)
        v_tile = load_rows(v_source, v, n0, length, shown, DV, BLOCK_N, HEAD_DIM_V, DESCRIPTORS)
        products = tl.dot(q, k_tile.T, input_precision="ieee")
        dp = tl.dot(grad_output, v_tile.T, input_precision="ieee")
        x, multiplier, derivative = logits(
            products, call, bias_pointer, slope, sequence, rows, columns
        )
        p = weights(x, multiplier, lse[:, None], call)
        if BOUNDS or call.blocks.tiles is not None:
            if is_cut(i, n0, call, steps, BLOCK_N):
                with_bits = has_bits(i, call, steps, BLOCK_N)
                p = hide(p, 0.0, call, sequence, h, m0, n0, rows, columns, with_bits, BOUNDS)
        if call.mask.ptr is not None:
            p = tl.where(shown_pairs(call, mask_pointer, rows, columns), p, 0.0)
        if call.seed is not None:
            keep = keep_pairs(call, seed, b, h, m0, n0, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * call.keep_scale, 0.0)
        dx = logit_gradient(p, dp, delta[:, None], call)
        if CORRECTED:
            error += tl.sum(dx, 1)
            size += tl.sum(tl.abs(dx), 1)
        if call.softcap is not None:
            dx = dx * derivative
        dq = tl.dot(dx.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq, error, size


@triton.jit
def attention_query_gradient_kernel(
    q,
    k,
    v,
    output,
    grad_output,
    lse_ptr,
    grad_lse,
    grad_q,
    delta_ptr,
    call,
    num_tiles,
    num_heads,
    group,
    D: tl.constexpr,
    DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDS: tl.constexpr,
    TOLERANCE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """dq of BLOCK_M queries of a head, and delta of each, which the other kernels read.

    delta is first made from the output. If that was rounded, what delta lacks is the sum of dX.
    Where it is more than TOLERANCE of sum |dX| in some row of the tile, the loops run again.
    """
    CORRECTED: tl.constexpr = TOLERANCE > 0.0 and call.activation == SOFTMAX
    tile, head = tile_and_head(num_tiles, num_heads, group, REVERSED)
    b = head // call.H
    h = head % call.H
    m0 = tile * BLOCK_M
    sequence = sequence_of(call, b)
    query_start = sequence.query_start
    query_length = sequence.query_length
    key_length = sequence.key_length
    key_head = h // call.heads_per_key
    k_source = source_of(
        k, call, b, key_head, sequence.key_start, key_length, D, BLOCK_N, HEAD_DIM, DESCRIPTORS
    )
    v_source = source_of(
        v, call, b, key_head, sequence.key_start, key_length, DV, BLOCK_N, HEAD_DIM_V, DESCRIPTORS
    )
    # Read once: through pointers, which need no alignment.
    q_pointer = head_pointer(q, call, b, h, query_start)
    q_tile = load_rows(q_pointer, q, m0, query_length, None, D, BLOCK_M, HEAD_DIM, False)
    do_pointer = head_pointer(grad_output, call, b, h, query_start)
    do_tile = load_rows(
        do_pointer, grad_output, m0, query_length, None, DV, BLOCK_M, HEAD_DIM_V, False
    )
    offs_m = m0 + tl.arange(0, BLOCK_M)
    index = row_index(call, b, h, query_start)
    # Rows behind the length of a packed sequence are the next one's.
    stop = query_length
    if call.query_offsets is None:
        stop = tl.cast(call.T, tl.int32)
    lse = tl.zeros((BLOCK_M,), tl.float32)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if call.activation == SOFTMAX:
        lse = load_lse(lse_ptr, call, index, offs_m, query_length)
        out_pointer = head_pointer(output, call, b, h, query_start)
        out_tile = load_rows(
            out_pointer, output, m0, query_length, None, DV, BLOCK_M, HEAD_DIM_V, False
        )
        delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
        if grad_lse is not None:
            pointers = grad_lse.ptr + tl.cast(h, tl.int64) * grad_lse.stride_h
            if call.query_offsets is None:
                pointers += tl.cast(b, tl.int64) * grad_lse.stride_b
            pointers += (query_start + offs_m) * grad_lse.stride_t
            row_sum = tl.load(pointers, mask=offs_m < query_length, other=0.0)
            row_sum = tl.where(lse == float("inf"), 0.0, row_sum)
            delta -= row_sum
    seed = 0
    if call.seed is not None:
        seed = tl.load(call.seed)

    steps = key_steps(call, sequence, m0, BLOCK_M, BLOCK_N)
    if call.blocks.tiles is not None:
        row = block_head(call, b, h) * call.blocks.query_blocks + m0 // BLOCK
        lists, counts = call.blocks.key_tiles, call.blocks.key_counts
        steps = listed_steps(steps, lists, counts, row, call.blocks.key_blocks)

    dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    rounds = 1
    done = 0
    while done < rounds:
        dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        error = tl.zeros((BLOCK_M,), tl.float32)
        size = tl.zeros((BLOCK_M,), tl.float32)
        dq, error, size = query_gradient_loop(
            dq,
            error,
            size,
            q_tile,
            do_tile,
            lse,
            delta,
            k_source,
            v_source,
            k,
            v,
            call,
            sequence,
            h,
            m0,
            steps,
            seed,
            D,
            DV,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_M,
            BLOCK_N,
            BOUNDS,
            CORRECTED,
            DESCRIPTORS,
        )
        done += 1
        if CORRECTED:
            # The rows' dX add up to grad_lse, if delta is right.
            error -= row_sum
            delta += tl.where(done == 1, error, 0.0)
            wrong = tl.max((tl.abs(error) > TOLERANCE * size).to(tl.int32), 0)
            rounds = tl.where(done == 1, 1 + wrong, rounds)

    seen = (offs_m < query_length)[:, None]
    if call.activation == SOFTMAX:
        tl.store(delta_ptr + index + offs_m, delta, mask=offs_m < stop)
        seen = seen & (lse != float("inf"))[:, None]
    dq = tl.where(seen, dq * call.scale, 0.0)
    pointer = head_pointer(grad_q, call, b, h, query_start)
    store_rows(pointer, grad_q, m0, stop, dq, D, BLOCK_M, HEAD_DIM)


@triton.jit
def key_gradient_loop(
    dk,
    dv,
    k,
    v,
    q_source,
    do_source,
    q,
    grad_output,
    lse_ptr,
    delta_ptr,
    call,
    sequence,
    h,
    n0,
    steps,
    seed,
    D: tl.constexpr,
    DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds dZ^T q and P^T grad_output over some query tiles. The tiles of pairs are transposed."""
    columns = n0 + tl.arange(0, BLOCK_N)[:, None]
    b = sequence.b
    bias_pointer = pair_pointer(call.bias, b, h)
    mask_pointer = pair_pointer(call.mask, b, h)
    slope = slope_of(call, b, h)
    index = row_index(call, b, h, sequence.query_start)
    length = sequence.query_length
    for i in tl.range(0, count_steps(call, steps, BLOCK_M)):
        m0 = step_start(i, call, steps, BLOCK_M)
        offs_m = m0 + tl.arange(0, BLOCK_M)
        rows = offs_m[None, :]
        q_tile = load_rows(q_source, q, m0, length, None, D, BLOCK_M, HEAD_DIM, DESCRIPTORS)
        lse = tl.zeros((BLOCK_M,), tl.float32)
        delta = lse
        if call.activation == SOFTMAX:
            lse = load_lse(lse_ptr, call, index, offs_m, length)
        if q_tile.dtype == tl.float32:
            # Summed in the forward's order: a rounding of large logits must match that of the lse.
            products = tl.dot(q_tile, k.T, input_precision="ieee").T
        else:
            products = tl.dot(k, q_tile.T)
        x, multiplier, derivative = logits(
            products, call, bias_pointer, slope, sequence, rows, columns
        )
        p = weights(x, multiplier, lse[None, :], call)
        if BOUNDS or call.blocks.tiles is not None:
            if is_cut(i, m0, call, steps, BLOCK_M):
                with_bits = has_bits(i, call, steps, BLOCK_M)
                p = hide(p, 0.0, call, sequence, h, m0, n0, rows, columns, with_bits, BOUNDS)
        shown = shown_pairs(call, mask_pointer, rows, columns)
        if call.mask.ptr is not None:
            p = tl.where(shown, p, 0.0)
        # What is needed late is loaded late, and dv made before dp: fewer registers at once.
        do_tile = load_rows(
            do_source, grad_output, m0, length, None, DV, BLOCK_M, HEAD_DIM_V, DESCRIPTORS
        )
        keep = None
        if call.seed is not None:
            keep = keep_pairs(call, seed, b, h, m0, n0, BLOCK_M, BLOCK_N, True)
            kept = tl.where(keep, p, 0.0).to(do_tile.dtype)
        else:
            kept = p.to(do_tile.dtype)
        dv = tl.dot(kept, do_tile, dv, input_precision="ieee")
        dp = tl.dot(v, do_tile.T, input_precision="ieee")
        if call.seed is not None:
            dp = tl.where(keep, dp * call.keep_scale, 0.0)
        if call.activation == SOFTMAX:
            delta = tl.load(delta_ptr + index + offs_m, mask=offs_m < length, other=0.0)
        dx = logit_gradient(p, dp, delta[None, :], call)
        if call.mask.ptr is not None:
            # What a mask hides from every query may be NaN in k and v.
            dx = tl.where(shown, dx, 0.0)
        if call.softcap is not None:
            dx = dx * derivative
        dk = tl.dot(dx.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_key_gradient_kernel(
    q,
    k,
    v,
    grad_output,
    lse_ptr,
    delta_ptr,
    grad_k,
    grad_v,
    call,
    num_tiles,
    num_heads,
    group,
    D: tl.constexpr,
    DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of a head, from all query heads that share it, in their order."""
    tile, head = tile_and_head(num_tiles, num_heads, group, REVERSED)
    key_heads = call.H // call.heads_per_key
    b = head // key_heads
    key_head = head % key_heads
    n0 = tile * BLOCK_N
    sequence = sequence_of(call, b)
    key_start = sequence.key_start
    key_length = sequence.key_length
    k_pointer = head_pointer(k, call, b, key_head, key_start)
    v_pointer = head_pointer(v, call, b, key_head, key_start)
    k_tile = load_rows(k_pointer, k, n0, key_length, None, D, BLOCK_N, HEAD_DIM, False)
    v_tile = load_rows(v_pointer, v, n0, key_length, None, DV, BLOCK_N, HEAD_DIM_V, False)
    seed = 0
    if call.seed is not None:
        seed = tl.load(call.seed)
    steps = query_steps(call, sequence, n0, BLOCK_M, BLOCK_N)

    dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_DIM_V), tl.float32)
    for shared in range(0, call.heads_per_key):
        h = key_head * call.heads_per_key + shared
        if call.blocks.tiles is not None:
            row = block_head(call, b, h) * call.blocks.key_blocks + n0 // BLOCK
            lists, counts = call.blocks.query_tiles, call.blocks.query_counts
            head_steps = listed_steps(steps, lists, counts, row, call.blocks.query_blocks)
        else:
            head_steps = steps
        query_start = sequence.query_start
        query_length = sequence.query_length
        q_source = source_of(
            q, call, b, h, query_start, query_length, D, BLOCK_M, HEAD_DIM, DESCRIPTORS
        )
        do_source = source_of(
            grad_output, call, b, h, query_start, query_length, DV, BLOCK_M, HEAD_DIM_V, DESCRIPTORS
        )
        dk, dv = key_gradient_loop(
            dk,
            dv,
            k_tile,
            v_tile,
            q_source,
            do_source,
            q,
            grad_output,
            lse_ptr,
            delta_ptr,
            call,
            sequence,
            h,
            n0,
            head_steps,
            seed,
            D,
            DV,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_M,
            BLOCK_N,
            BOUNDS,
            DESCRIPTORS,
        )

    seen = (n0 + tl.arange(0, BLOCK_N) < key_length)[:, None]
    dk = tl.where(seen, dk * call.scale, 0.0)
    dv = tl.where(seen, dv * call.keep_scale, 0.0)
    # Rows behind the length of a packed sequence are the next one's.
    stop = key_length
    if call.key_offsets is None:
        stop = tl.cast(call.S, tl.int32)
    pointer = head_pointer(grad_k, call, b, key_head, key_start)
    store_rows(pointer, grad_k, n0, stop, dk, D, BLOCK_N, HEAD_DIM)
    pointer = head_pointer(grad_v, call, b, key_head, key_start)
    store_rows(pointer, grad_v, n0, stop, dv, DV, BLOCK_N, HEAD_DIM_V)


@triton.jit
def attention_bias_gradient_kernel(
    q,
    k,
    v,
    grad_output,
    lse_ptr,
    delta_ptr,
    grad_bias_ptr,
    call,
    sizes,
    reduced,
    D: tl.constexpr,
    DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """A tile of the bias's gradient, added up over the dimensions in which the bias is broadcast.

    ``sizes`` are the bias's, of T and S in tiles; ``reduced`` says likewise how much of each
    dimension one element of the bias serves: one of the two is 1.
    """
    pid = tl.program_id(0)
    own_n = pid % sizes.s
    own_m = pid // sizes.s % sizes.t
    own_h = pid // (sizes.s * sizes.t) % sizes.h
    own_b = pid // (sizes.s * sizes.t * sizes.h)
    seed = 0
    if call.seed is not None:
        seed = tl.load(call.seed)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, reduced.b * reduced.h * reduced.t * reduced.s):
        n0 = (own_n + i % reduced.s) * BLOCK_N
        m0 = (own_m + i // reduced.s % reduced.t) * BLOCK_M
        h = own_h + i // (reduced.s * reduced.t) % reduced.h
        b = own_b + i // (reduced.s * reduced.t * reduced.h)
        sequence = sequence_of(call, b)
        steps = key_steps(call, sequence, m0, BLOCK_M, BLOCK_N)
        taken = (n0 // BLOCK_N >= steps.first) & (n0 // BLOCK_N < steps.last)
        kind = 0
        if call.blocks.tiles is not None:
            row = block_head(call, b, h) * call.blocks.query_blocks + m0 // BLOCK
            kind = tl.load(call.blocks.tiles + row * call.blocks.key_blocks + n0 // BLOCK)
            taken = taken & (kind != 0)
        if taken:
            query_start = sequence.query_start
            query_length = sequence.query_length
            key_length = sequence.key_length
            key_head = h // call.heads_per_key
            rows = m0 + tl.arange(0, BLOCK_M)[:, None]
            columns = n0 + tl.arange(0, BLOCK_N)[None, :]
            offs_m = m0 + tl.arange(0, BLOCK_M)
            mask_pointer = pair_pointer(call.mask, b, h)
            shown = shown_keys(call, mask_pointer, n0 + tl.arange(0, BLOCK_N)[:, None])
            pointer = head_pointer(q, call, b, h, query_start)
            q_tile = load_rows(pointer, q, m0, query_length, None, D, BLOCK_M, HEAD_DIM, False)
            pointer = head_pointer(k, call, b, key_head, sequence.key_start)
            k_tile = load_rows(pointer, k, n0, key_length, shown, D, BLOCK_N, HEAD_DIM, False)
            products = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            pointer = head_pointer(grad_output, call, b, h, query_start)
            do_tile = load_rows(
                pointer, grad_output, m0, query_length, None, DV, BLOCK_M, HEAD_DIM_V, False
            )
            pointer = head_pointer(v, call, b, key_head, sequence.key_start)
            v_tile = load_rows(pointer, v, n0, key_length, shown, DV, BLOCK_N, HEAD_DIM_V, False)
            dp = tl.dot(do_tile, v_tile.T, input_precision="ieee")
            lse = tl.zeros((BLOCK_M,), tl.float32)
            delta = lse
            if call.activation == SOFTMAX:
                index = row_index(call, b, h, query_start)
                lse = load_lse(lse_ptr, call, index, offs_m, query_length)
                delta = tl.load(delta_ptr + index + offs_m, mask=offs_m < query_length, other=0.0)
            bias_pointer = pair_pointer(call.bias, b, h)
            slope = slope_of(call, b, h)
            x, multiplier, _ = logits(products, call, bias_pointer, slope, sequence, rows, columns)
            p = weights(x, multiplier, lse[:, None], call)
            if BOUNDS or call.blocks.tiles is not None:
                p = hide(p, 0.0, call, sequence, h, m0, n0, rows, columns, kind > 1, BOUNDS)
            if call.mask.ptr is not None:
                p = tl.where(shown_pairs(call, mask_pointer, rows, columns), p, 0.0)
            if call.seed is not None:
                keep = keep_pairs(call, seed, b, h, m0, n0, BLOCK_M, BLOCK_N, False)
                dp = tl.where(keep, dp * call.keep_scale, 0.0)
            total += logit_gradient(p, dp, delta[:, None], call)

    # Rows and columns that the bias lacks are added up; what is behind a length is 0 in either.
    bias_rows = own_m * BLOCK_M + tl.arange(0, BLOCK_M)
    bias_columns = own_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_count = call.T
    column_count = call.S
    if sizes.rows_reduced:
        total = tl.sum(total, 0)[None, :]
        bias_rows = tl.arange(0, 1)
        row_count = 1
    if sizes.columns_reduced:
        total = tl.sum(total, 1)[:, None]
        bias_columns = tl.arange(0, 1)
        column_count = 1
    start = (tl.cast(own_b, tl.int64) * sizes.h + own_h) * row_count * column_count
    pointers = grad_bias_ptr + start + bias_rows.to(tl.int64)[:, None] * column_count
    inside = (bias_rows < row_count)[:, None] & (bias_columns < column_count)[None, :]
    tl.store(
        pointers + bias_columns[None, :], total.to(grad_bias_ptr.dtype.element_ty), mask=inside
    )
