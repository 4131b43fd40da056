"""The Triton kernels of ``decode_attention``.

A program holds queries that read the same rows of the cache: of the beams that share it, of the
heads of a group and of the T new positions, in this order with the position last. It walks over
its split of the keys with an online softmax. Where there are several splits each leaves a
normalised output and its lse, which a second kernel merges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import tanh


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    ancestry_ptr,
    mask_ptr,
    slopes_ptr,
    output_ptr,
    lse_ptr,
    stride_qr,
    stride_qh,
    stride_qt,
    stride_kr,
    stride_kh,
    stride_ks,
    stride_vr,
    stride_vh,
    stride_vs,
    stride_ab,
    stride_ak,
    stride_as,
    stride_mr,
    stride_mh,
    stride_mt,
    stride_ms,
    num_queries,
    kv_heads,
    group,
    beams,
    rows_per_length,
    positions,
    keys,
    keys_per_split,
    rows,
    window,
    scale,
    softcap,
    HAS_LENGTHS: tl.constexpr,
    HAS_ANCESTRY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Queries [pid_m * BLOCK_M, ...) of one cache row (of one beam with an ancestry) and key head.

    ``num_queries`` is how many share the rows; ``beams`` how many rows of queries do, or, with an
    ancestry, are in a sentence. Split ``pid_s`` writes output[pid_s] and lse[pid_s], of all rows.
    """
    pid = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_s = tl.program_id(2)
    cache_row = pid // kv_heads
    kv_head = pid % kv_heads
    heads = kv_heads * group

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = offs_m < num_queries
    t = offs_m % positions
    head = kv_head * group + (offs_m // positions) % group
    if HAS_ANCESTRY:
        row = cache_row + tl.zeros((BLOCK_M,), tl.int32)
    else:
        row = cache_row * beams + offs_m // (positions * group)
    length = keys + tl.zeros((BLOCK_M,), tl.int32)
    if HAS_LENGTHS:
        given = tl.load(lengths_ptr + row // rows_per_length, mask=exists, other=0)
        length = tl.minimum(tl.maximum(given, 0), keys).to(tl.int32)
    position = length - positions + t
    last = length
    if IS_CAUSAL:
        last = tl.minimum(length, position + 1)
    last = tl.where(exists, last, 0)
    first = tl.zeros((BLOCK_M,), tl.int32)
    if HAS_WINDOW:
        first = tl.maximum(position - window, 0)
    # No query looks at a key outside of [start, stop).
    start = tl.maximum(tl.min(tl.where(exists, first, keys), 0), pid_s * keys_per_split)
    stop = tl.minimum(tl.max(last, 0), (pid_s + 1) * keys_per_split)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row64 = row.to(tl.int64)
    head64 = head.to(tl.int64)
    q_rows = row64 * stride_qr + head64 * stride_qh + t.to(tl.int64) * stride_qt
    q = tl.load(
        q_ptr + q_rows[:, None] + offs_d[None, :],
        mask=exists[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    slope = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head, mask=exists, other=0.0)
    mask_rows = row64
    if HAS_MASK:
        mask_rows = row64 * stride_mr + head64 * stride_mh + t.to(tl.int64) * stride_mt
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for begin in range(start, stop, BLOCK_N):
        s = begin + offs_n
        inside = s < stop
        source = cache_row.to(tl.int64) + tl.zeros((BLOCK_N,), tl.int64)
        if HAS_ANCESTRY:
            sentence = (cache_row // beams).to(tl.int64)
            beam = (cache_row % beams).to(tl.int64)
            entries = sentence * stride_ab + beam * stride_ak + s.to(tl.int64) * stride_as
            parent = tl.load(ancestry_ptr + entries, mask=inside, other=0).to(tl.int64)
            source = sentence * beams + tl.minimum(tl.maximum(parent, 0), beams - 1)
        k_rows = source * stride_kr + s.to(tl.int64) * stride_ks
        k = tl.load(
            k_ptr + k_rows[:, None] + offs_d[None, :],
            mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        if BLOCK_M == 1:
            # One query: no matrix product to fill.
            x = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :] * scale
        else:
            x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if HAS_SOFTCAP:
            bounded, _ = tanh(x / softcap)
            x = softcap * bounded
        if HAS_ALIBI:
            distance = tl.abs(position[:, None] - s[None, :]).to(tl.float32)
            x -= slope[:, None] * distance
        allowed = (s[None, :] < last[:, None]) & (s[None, :] >= first[:, None]) & inside[None, :]
        if HAS_MASK:
            shown = tl.load(
                mask_ptr + mask_rows[:, None] + s.to(tl.int64)[None, :] * stride_ms,
                mask=allowed,
                other=0,
            )
            allowed = allowed & (shown != 0)
        x = tl.where(allowed, x, float("-inf"))

        peak = tl.maximum(m_i, tl.max(x, 1))
        # A row of -inf would give NaN: shift by 0 instead.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        factor = tl.exp(m_i - shift)
        p = tl.exp(x - shift[:, None])
        l_i = l_i * factor + tl.sum(p, 1)
        m_i = peak
        # Values that none of the queries may look at are not read: 0 * NaN would be NaN.
        visible = tl.max(allowed.to(tl.int32), 0) != 0
        v_rows = source * stride_vr + s.to(tl.int64) * stride_vs
        v = tl.load(
            v_ptr + v_rows[:, None] + offs_dv[None, :],
            mask=visible[:, None] & (offs_dv < VALUE_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_DV]
        acc *= factor[:, None]
        if BLOCK_M == 1:
            weight = tl.sum(p, 0)  # [BLOCK_N]
            acc += tl.sum(weight[:, None] * v.to(tl.float32), 0)[None, :]
        else:
            acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")

    empty = l_i == 0.0
    total = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), m_i + tl.log(total))
    out_rows = (pid_s.to(tl.int64) * rows + row64) * heads + head64
    out_rows = out_rows * positions + t.to(tl.int64)
    tl.store(lse_ptr + out_rows, lse, mask=exists)
    tl.store(
        output_ptr + (out_rows * VALUE_DIM)[:, None] + offs_dv[None, :],
        (acc / total[:, None]).to(output_ptr.dtype.element_ty),
        mask=exists[:, None] & (offs_dv < VALUE_DIM)[None, :],
    )


@triton.jit
def decode_attention_merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    output_ptr,
    lse_ptr,
    queries,
    splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Output and lse of one query, from those of all splits: ``[splits, queries, VALUE_DIM]``."""
    query = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = tl.arange(0, BLOCK_DV)
    slots = offs_s.to(tl.int64) * queries + query
    exists = offs_s < splits
    lse = tl.load(partial_lse_ptr + slots, mask=exists, other=float("-inf"))
    peak = tl.max(lse, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(lse - shift)  # [BLOCK_S]
    total = tl.sum(weight, 0)
    partial = tl.load(
        partial_ptr + (slots * VALUE_DIM)[:, None] + offs_dv[None, :],
        mask=exists[:, None] & (offs_dv < VALUE_DIM)[None, :],
        other=0.0,
    )
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output = tl.sum(weight[:, None] * partial, 0) / total
    tl.store(lse_ptr + query, tl.where(empty, float("-inf"), shift + tl.log(total)))
    tl.store(
        output_ptr + query * VALUE_DIM + offs_dv,
        output.to(output_ptr.dtype.element_ty),
        mask=offs_dv < VALUE_DIM,
    )
