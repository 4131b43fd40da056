"""The Triton kernel of attention's forward."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import (
    BLOCK,
    LN2,
    SOFTMAX,
    block_head,
    count_steps,
    exponential,
    has_bits,
    head_pointer,
    hide,
    is_cut,
    keep_pairs,
    key_steps,
    listed_steps,
    load_rows,
    logits,
    pair_pointer,
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
def forward_loop(
    acc,
    l_i,
    m_i,
    q,
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
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """The online softmax over some key tiles; other activations add up without it.

    l_i: a row's sum of exponentials, or for other activations 1 if it sees something.
    """
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    b = sequence.b
    bias_pointer = pair_pointer(call.bias, b, h)
    mask_pointer = pair_pointer(call.mask, b, h)
    slope = slope_of(call, b, h)
    absent = float("-inf")
    for i in tl.range(0, count_steps(call, steps, BLOCK_N), warp_specialize=SPECIALIZE):
        n0 = step_start(i, call, steps, BLOCK_N)
        columns = n0 + tl.arange(0, BLOCK_N)[None, :]
        shown = shown_keys(call, mask_pointer, n0 + tl.arange(0, BLOCK_N)[:, None])
        length = sequence.key_length
        k_tile = load_rows(k_source, k, n0, length, shown, D, BLOCK_N, HEAD_DIM, DESCRIPTORS)
        products = tl.dot(q, k_tile.T, input_precision="ieee")
        x, multiplier, _ = logits(products, call, bias_pointer, slope, sequence, rows, columns)
        # Warps cannot divide the work of a loop with a branch: there every tile is cut.
        if SPECIALIZE and BOUNDS:
            x = hide(x, absent, call, sequence, h, m0, n0, rows, columns, False, BOUNDS)
        elif BOUNDS or call.blocks.tiles is not None:
            if is_cut(i, n0, call, steps, BLOCK_N):
                with_bits = has_bits(i, call, steps, BLOCK_N)
                x = hide(x, absent, call, sequence, h, m0, n0, rows, columns, with_bits, BOUNDS)
        if call.mask.ptr is not None:
            x = tl.where(shown_pairs(call, mask_pointer, rows, columns), x, absent)
        if call.activation == SOFTMAX:
            m_new = tl.maximum(m_i, tl.max(x, 1) * multiplier)
            # A row that has seen nothing yet, or only NaN, is shifted by 0.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = weights(x, multiplier, shift[:, None], call)
            alpha = exponential(m_i - shift, call)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            m_i = m_new
        else:
            p = weights(x, multiplier, None, call)
            l_i = tl.maximum(l_i, tl.max((x != absent).to(tl.float32), 1))
        if call.seed is not None:
            keep = keep_pairs(call, seed, b, h, m0, n0, BLOCK_M, BLOCK_N, False)
            p = tl.where(keep, p, 0.0)
        v_tile = load_rows(v_source, v, n0, length, shown, DV, BLOCK_N, HEAD_DIM_V, DESCRIPTORS)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc, l_i, m_i


@triton.jit
def attention_forward_kernel(
    q,
    k,
    v,
    output,
    lse_ptr,
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
    SPECIALIZE: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """Output and lse of BLOCK_M queries of a head."""
    tile, head = tile_and_head(num_tiles, num_heads, group, REVERSED)
    b = head // call.H
    h = head % call.H
    m0 = tile * BLOCK_M
    sequence = sequence_of(call, b)
    query_length = sequence.query_length
    key_length = sequence.key_length
    q_source = source_of(
        q, call, b, h, sequence.query_start, query_length, D, BLOCK_M, HEAD_DIM, DESCRIPTORS
    )
    key_head = h // call.heads_per_key
    k_source = source_of(
        k, call, b, key_head, sequence.key_start, key_length, D, BLOCK_N, HEAD_DIM, DESCRIPTORS
    )
    v_source = source_of(
        v, call, b, key_head, sequence.key_start, key_length, DV, BLOCK_N, HEAD_DIM_V, DESCRIPTORS
    )
    q_tile = load_rows(q_source, q, m0, query_length, None, D, BLOCK_M, HEAD_DIM, DESCRIPTORS)
    seed = 0
    if call.seed is not None:
        seed = tl.load(call.seed)

    steps = key_steps(call, sequence, m0, BLOCK_M, BLOCK_N)
    if call.blocks.tiles is not None:
        row = block_head(call, b, h) * call.blocks.query_blocks + m0 // BLOCK
        lists, counts = call.blocks.key_tiles, call.blocks.key_counts
        steps = listed_steps(steps, lists, counts, row, call.blocks.key_blocks)

    acc = tl.zeros((BLOCK_M, HEAD_DIM_V), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, l_i, m_i = forward_loop(
        acc,
        l_i,
        m_i,
        q_tile,
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
        DESCRIPTORS,
        SPECIALIZE,
    )

    offs_m = m0 + tl.arange(0, BLOCK_M)
    # Not by m_i, where a maximum has lost a NaN.
    empty = (l_i == 0.0) | (offs_m >= query_length)
    factor = call.keep_scale
    lse = tl.zeros((BLOCK_M,), tl.float32)
    if call.activation == SOFTMAX:
        l_i = tl.where(empty, 1.0, l_i)
        if call.exact:
            lse = m_i + tl.math.log(l_i)
        else:
            lse = (m_i + tl.math.log2(l_i)) * LN2
        acc = acc * (factor / l_i)[:, None]
    else:
        acc = acc * factor
    acc = tl.where(empty[:, None], 0.0, acc)
    lse = tl.where(empty, float("-inf"), lse)
    # Rows behind the length of a packed sequence are the next one's.
    stop = query_length
    if call.query_offsets is None:
        stop = tl.cast(call.T, tl.int32)
    index = row_index(call, b, h, sequence.query_start)
    tl.store(lse_ptr + index + offs_m, lse, mask=offs_m < stop)
    if DESCRIPTORS:
        out = source_of(
            output, call, b, h, sequence.query_start, stop, DV, BLOCK_M, HEAD_DIM_V, True
        )
        out.store([m0, 0], acc.to(output.ptr.dtype.element_ty))
    else:
        pointer = head_pointer(output, call, b, h, sequence.query_start)
        store_rows(pointer, output, m0, stop, acc, DV, BLOCK_M, HEAD_DIM_V)
