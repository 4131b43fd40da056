"""The Triton kernels of ``additive_attention``; the README beside this file has the derivation.

What is made of pairs of a query and a key has tiles of BLOCK_M queries, BLOCK_N keys and BLOCK_E
components, which lie in the lanes of a program's one warp: sums over queries and over keys stay
within a lane, and a sum over components is carried out once, after the last of them.

Lengths, batches and strides are numbers that nothing is compiled for; those of rows are in units of
STRIDE_UNIT elements, so that the compiler knows how far they are aligned. Nor is anything compiled
for the numbers of features and columns: it would unroll their loops until it runs out of registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import LOG2E, tanh

# Below it numbers are moderate: the square of e^(2 (8 + 8)) is finite in fp32, and exp2 is right to
# a few units in the last place.
_MOST = tl.constexpr(8.0)

# Compiled once for all their values: every batch has others.
_NUMBERS = (
    "H",
    "T",
    "S",
    "num_features",
    "num_columns",
    "splits",
    "tiles_per_split",
    "elements",
    *(f"stride_q{i}" for i in "bht"),
    *(f"stride_k{i}" for i in "bhs"),
    *(f"stride_v{i}" for i in "bhs"),
    *(f"stride_c{i}" for i in "bht"),
    *(f"stride_f{i}" for i in "bhtsf"),
    *(f"stride_m{i}" for i in "bhts"),
    *(f"stride_d{i}" for i in "bhts"),
)


@triton.jit
def key_length(lengths_ptr, b, S, HAS_LENGTHS: tl.constexpr):
    """How many keys sequence b has."""
    length = tl.cast(S, tl.int32)
    if HAS_LENGTHS:
        given = tl.load(lengths_ptr + b)
        length = tl.minimum(tl.maximum(given, 0), S).to(tl.int32)
    return length


@triton.jit
def allowed_pairs(mask_ptr, t, s, T, length, stride_mt, stride_ms, HAS_MASK: tl.constexpr):
    """Which pairs of a tile take part. # [BLOCK_M, BLOCK_N]"""
    allowed = (t < T)[:, None] & (s < length)[None, :]
    if HAS_MASK:
        offsets = t.to(tl.int64)[:, None] * stride_mt + s.to(tl.int64)[None, :] * stride_ms
        allowed = allowed & (tl.load(mask_ptr + offsets, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def seen_keys(allowed):
    """The keys of a tile that some query of it looks at. # [BLOCK_N]"""
    return tl.max(allowed.to(tl.int32), 0) != 0


@triton.jit
def first_key(s, seen, S):
    """The first key of a tile that is seen; some other if none is."""
    return tl.min(tl.where(seen, s, S - 1), 0).to(tl.int64)


@triton.jit
def looking_queries(allowed):
    """The queries of a tile that look at some key of it. # [BLOCK_M]"""
    return tl.max(allowed.to(tl.int32), 1) != 0


@triton.jit
def load_vector(pointer, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """These columns of a vector in fp32; 0 beyond it. # [BLOCK]"""
    if WIDTH % BLOCK == 0:
        vector = tl.load(pointer + columns)
    else:
        vector = tl.load(pointer + columns, mask=columns < WIDTH, other=0.0)
    return vector.to(tl.float32)


@triton.jit
def load_rows(pointer, rows, exist, stride, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """These columns of rows; 0 where there is no row or column. # [rows, BLOCK]"""
    mask = exist[:, None]
    if WIDTH % BLOCK != 0 or WIDTH == 0:
        mask = mask & (columns < WIDTH)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def exponentials(x):
    """e^2x, and e^2x - 1 without its cancellation near 0."""
    y = 2.0 * x
    e = tl.math.exp2(x * (2.0 * LOG2E))
    # The Taylor series of (e^y - 1) / y.
    p = 1.3888888889e-3 * y + 8.3333333333e-3
    p = p * y + 4.1666666667e-2
    p = p * y + 1.6666666667e-1
    p = p * y + 0.5
    p = p * y + 1.0
    return e, tl.where(tl.abs(y) < 0.25, p * y, e - 1.0)


@triton.jit
def tangents_of_rows(q, k, origin):
    """tanh(q + k). # [BLOCK_M, BLOCK_N, BLOCK_E]

    Where numbers are moderate it is made of e^2q and e^2k, which a row needs once, in two thirds of
    the instructions. A key of the tile, the origin, goes from the keys to the queries first: then
    neither is much larger than the sums, which would lose digits to it.
    """
    moved_q = q + origin[None, :]
    moved_k = k - origin[None, :]
    most = tl.maximum(tl.max(tl.max(tl.abs(moved_q), 1), 0), tl.max(tl.max(tl.abs(moved_k), 1), 0))
    # A maximum does not see NaN, which would spread from one key to all.
    infinite = tl.max(tl.where(tl.abs(origin) < float("inf"), 0.0, float("inf")), 0)
    if tl.maximum(most, infinite) < _MOST:
        q_exp, q_less = exponentials(moved_q)
        k_exp, k_less = exponentials(moved_k)
        # N = e^2(q + k) - 1 is (e^2q - 1) e^2k + (e^2k - 1), but for a q far below 0, where a large
        # e^2k would multiply the rounding of the first factor, e^2q e^2k - 1.
        near = tl.where(moved_q > -0.25, 1.0, 0.0)
        factor = tl.where(moved_q > -0.25, q_less, q_exp)
        rest = near[:, None, :] * k_less[None, :, :] + (near - 1.0)[:, None, :]
        numerator = factor[:, None, :] * k_exp[None, :, :] + rest
        denominator = numerator + 2.0
        # A reciprocal by Newton's method, in half of the instructions of a division.
        guess = tl.math.rsqrt(denominator * denominator)
        reciprocal = guess * (1.0 - denominator * guess) + guess
        tangent = numerator * reciprocal
    else:
        tangent, _ = tanh(q[:, None, :] + k[None, :, :])
    return tangent


@triton.jit
def tangents_of_pairs(
    q,
    k,
    features_ptr,
    feature_weight_ptr,
    feature_offsets,
    allowed,
    stride_ff,
    num_features,
    e,
    HAS_FEATURES: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """tanh(q + k + features @ feature_weight), each by itself; # [BLOCK_M, BLOCK_N, BLOCK_E]"""
    hidden = q[:, None, :] + k[None, :, :]
    if HAS_FEATURES:
        for f in range(0, num_features):
            feature = load_feature(features_ptr, feature_offsets, allowed, f, stride_ff)
            weight = load_vector(feature_weight_ptr + f * E, e, E, BLOCK_E)
            hidden += feature[:, :, None] * weight[None, None, :]
    tangent, _ = tanh(hidden)
    return tangent


@triton.jit
def load_feature(features_ptr, offsets, allowed, f, stride_ff):
    """Feature f of a tile of pairs in fp32; 0 where a pair takes no part. # [BLOCK_M, BLOCK_N]"""
    pointers = features_ptr + offsets + tl.cast(f, tl.int64) * stride_ff
    return tl.load(pointers, mask=allowed, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_NUMBERS)
def additive_scores_kernel(
    q_ptr,
    k_ptr,
    score_weight_ptr,
    features_ptr,
    feature_weight_ptr,
    mask_ptr,
    lengths_ptr,
    scores_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_fb,
    stride_fh,
    stride_ft,
    stride_fs,
    stride_ff,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    H,
    T,
    S,
    num_features,
    HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Scores of a tile of pairs, ``[B, H, T, S]`` fp32; -inf where a pair takes no part."""
    key_tiles = tl.cdiv(S, BLOCK_N)
    query_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % key_tiles
    pid_m = pid // key_tiles % query_tiles
    head = pid // key_tiles // query_tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    s = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    length = key_length(lengths_ptr, b, S, HAS_LENGTHS)
    mask_ptr += b * stride_mb + h * stride_mh
    allowed = allowed_pairs(mask_ptr, t, s, T, length, stride_mt, stride_ms, HAS_MASK)
    seen = seen_keys(allowed)
    first = first_key(s, seen, S)
    looking = looking_queries(allowed)
    q_ptr += (b * stride_qb + h * stride_qh) * STRIDE_UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * STRIDE_UNIT
    features_ptr += b * stride_fb + h * stride_fh
    feature_offsets = t.to(tl.int64)[:, None] * stride_ft + s.to(tl.int64)[None, :] * stride_fs
    offs_e = tl.arange(0, BLOCK_E)

    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_E), tl.float32)
    # Tiles behind a length have no components to go through. Rows come while the last are computed.
    for start in tl.range(0, tl.where(pid_n * BLOCK_N < length, E, 0), BLOCK_E, num_stages=3):
        e = start + offs_e
        q = load_rows(q_ptr, t, looking, stride_qt * STRIDE_UNIT, e, E, BLOCK_E).to(tl.float32)
        k = load_rows(k_ptr, s, seen, stride_ks * STRIDE_UNIT, e, E, BLOCK_E).to(tl.float32)
        weight = load_vector(score_weight_ptr + h * E, e, E, BLOCK_E)
        if BY_PAIR:
            tangent = tangents_of_pairs(
                q,
                k,
                features_ptr,
                feature_weight_ptr + h * num_features * E,
                feature_offsets,
                allowed,
                stride_ff,
                num_features,
                e,
                HAS_FEATURES,
                E,
                BLOCK_E,
            )
        else:
            origin = load_vector(k_ptr + first * stride_ks * STRIDE_UNIT, e, E, BLOCK_E)
            tangent = tangents_of_rows(q, k, origin)
        sums += tangent * weight[None, None, :]
    scores = tl.where(allowed, tl.sum(sums, 2), float("-inf"))
    rows = head.to(tl.int64) * T + t
    tl.store(
        scores_ptr + rows[:, None] * S + s[None, :],
        scores,
        mask=(t < T)[:, None] & (s < S)[None, :],
    )


@triton.jit
def product(a, b, ROWS: tl.constexpr):
    """a @ b in fp32; of a single row without a matrix product, which takes 16."""
    if ROWS == 1:
        result = tl.sum(tl.trans(a).to(tl.float32) * b.to(tl.float32), 0)[None, :]
    else:
        result = tl.dot(a, b, input_precision="ieee")
    return result


@triton.jit(do_not_specialize=_NUMBERS)
def additive_context_kernel(
    scores_ptr,
    v_ptr,
    weights_ptr,
    context_ptr,
    stride_vb,
    stride_vh,
    stride_vs,
    H,
    T,
    S,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns of the context of BLOCK_M queries; the programs of the first ones store the weights.

    A score of -inf is a pair that takes no part.
    """
    query_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    pid_d = pid % COLUMN_TILES
    pid_m = pid // COLUMN_TILES % query_tiles
    head = pid // COLUMN_TILES // query_tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = head.to(tl.int64) * T + t
    d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    v_ptr += (b * stride_vb + h * stride_vh) * STRIDE_UNIT

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, S, BLOCK_N):
        s = start + offs_n
        exist = (t < T)[:, None] & (s < S)[None, :]
        scores = tl.load(
            scores_ptr + rows[:, None] * S + s[None, :], mask=exist, other=-float("inf")
        )
        peak = tl.maximum(m_i, tl.max(scores, 1))
        # A row of -inf would give NaN: shift by 0 instead.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        l_i = l_i * tl.exp(m_i - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        m_i = peak
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    total = tl.where(l_i == 0.0, 1.0, l_i)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, S, BLOCK_N):
        s = start + offs_n
        exist = (t < T)[:, None] & (s < S)[None, :]
        offsets = rows[:, None] * S + s[None, :]
        scores = tl.load(scores_ptr + offsets, mask=exist, other=-float("inf"))
        weights = tl.exp(scores - shift[:, None]) / total[:, None]
        tl.store(weights_ptr + offsets, weights, mask=exist & (pid_d == 0))
        # Values that no query looks at are not read: 0 * NaN would be NaN.
        seen = seen_keys(scores != float("-inf"))
        v = load_rows(v_ptr, s, seen, stride_vs * STRIDE_UNIT, d, D, BLOCK_D)
        acc += product(weights.to(v.dtype), v, BLOCK_M)
    tl.store(
        context_ptr + rows[:, None] * D + d[None, :],
        acc.to(context_ptr.dtype.element_ty),
        mask=(t < T)[:, None] & (d < D)[None, :],
    )


@triton.jit
def weight_gradients(
    grad_context_ptr,
    v_ptr,
    grad_weights_ptr,
    t,
    s,
    T,
    shown,
    stride_ct,
    stride_vs,
    stride_dt,
    stride_ds,
    num_columns,
    HAS_CONTEXT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the weights of a tile, those through the context too; 0 where not shown."""
    gradients = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_CONTEXT:
        seen = seen_keys(shown)
        for start in range(0, num_columns, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            grad_context = load_rows(
                grad_context_ptr, t, t < T, stride_ct * STRIDE_UNIT, d, D, BLOCK_D
            )
            v = load_rows(v_ptr, s, seen, stride_vs * STRIDE_UNIT, d, D, BLOCK_D)
            gradients += product(grad_context, tl.trans(v), BLOCK_M)
    if HAS_WEIGHTS:
        offsets = t.to(tl.int64)[:, None] * stride_dt + s.to(tl.int64)[None, :] * stride_ds
        gradients += tl.load(grad_weights_ptr + offsets, mask=shown, other=0.0)
    return gradients


@triton.jit(do_not_specialize=_NUMBERS)
def additive_score_gradient_kernel(
    weights_ptr,
    v_ptr,
    grad_context_ptr,
    grad_weights_ptr,
    grad_scores_ptr,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_db,
    stride_dh,
    stride_dt,
    stride_ds,
    H,
    T,
    S,
    num_columns,
    HAS_CONTEXT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The softmax's gradient: dX = P * (dP - sum of P * dP), for BLOCK_M queries."""
    query_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % query_tiles
    head = pid // query_tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = head.to(tl.int64) * T + t
    offs_n = tl.arange(0, BLOCK_N)
    v_ptr += (b * stride_vb + h * stride_vh) * STRIDE_UNIT
    grad_context_ptr += (b * stride_cb + h * stride_ch) * STRIDE_UNIT
    grad_weights_ptr += b * stride_db + h * stride_dh

    delta = tl.zeros((BLOCK_M,), tl.float32)
    # The sum, then the gradients: dP is made twice and kept nowhere.
    for phase in tl.static_range(2):
        for start in range(0, S, BLOCK_N):
            s = start + offs_n
            exist = (t < T)[:, None] & (s < S)[None, :]
            offsets = rows[:, None] * S + s[None, :]
            weights = tl.load(weights_ptr + offsets, mask=exist, other=0.0)
            gradients = weight_gradients(
                grad_context_ptr,
                v_ptr,
                grad_weights_ptr,
                t,
                s,
                T,
                weights != 0.0,
                stride_ct,
                stride_vs,
                stride_dt,
                stride_ds,
                num_columns,
                HAS_CONTEXT,
                HAS_WEIGHTS,
                STRIDE_UNIT,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
            if phase == 0:
                delta += tl.sum(weights * gradients, 1)
            else:
                gradients = weights * (gradients - delta[:, None])
                tl.store(grad_scores_ptr + offsets, gradients, mask=exist)


@triton.jit(do_not_specialize=_NUMBERS)
def additive_value_gradient_kernel(
    weights_ptr,
    grad_context_ptr,
    grad_v_ptr,
    stride_cb,
    stride_ch,
    stride_ct,
    H,
    T,
    S,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dV = P^T dC, for columns of BLOCK_N keys."""
    key_tiles = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    pid_d = pid % COLUMN_TILES
    pid_n = pid // COLUMN_TILES % key_tiles
    head = pid // COLUMN_TILES // key_tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    s = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_context_ptr += (b * stride_cb + h * stride_ch) * STRIDE_UNIT
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, T, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        rows = head.to(tl.int64) * T + t
        weights = tl.load(
            weights_ptr + rows[:, None] * S + s[None, :],
            mask=(t < T)[:, None] & (s < S)[None, :],
            other=0.0,
        )
        grad_context = load_rows(grad_context_ptr, t, t < T, stride_ct * STRIDE_UNIT, d, D, BLOCK_D)
        acc += tl.dot(
            tl.trans(weights.to(grad_context.dtype)), grad_context, input_precision="ieee"
        )
    rows = head.to(tl.int64) * S + s
    tl.store(
        grad_v_ptr + rows[:, None] * D + d[None, :],
        acc.to(grad_v_ptr.dtype.element_ty),
        mask=(s < S)[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=_NUMBERS)
def additive_pair_gradient_kernel(
    q_ptr,
    k_ptr,
    score_weight_ptr,
    features_ptr,
    feature_weight_ptr,
    mask_ptr,
    lengths_ptr,
    grad_scores_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_score_weight_ptr,
    grad_feature_weight_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_fb,
    stride_fh,
    stride_ft,
    stride_fs,
    stride_ff,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    stride_db,
    stride_dh,
    stride_dt,
    stride_ds,
    H,
    T,
    S,
    num_features,
    splits,
    tiles_per_split,
    HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BY_PAIR: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    NEED_QUERY: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_SCORE_WEIGHT: tl.constexpr,
    NEED_FEATURE_WEIGHT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradients of BLOCK_E components of a head, from ``tiles_per_split`` tiles of keys.

    With Y = 1 - tanh^2: dK = w * sum over queries of dX * Y, which this program alone makes of its
    keys; dQ = w * sum over keys, which it leaves in its slice of fp32 ``[splits, B, H, T, E]``; and
    its row of the partial sums of the weights' gradients, fp32 ``[B * splits, H, E]`` and
    ``[B * splits, H, F, E]``.
    """
    COLUMN_TILES: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    pid_e = pid % COLUMN_TILES
    split = pid // COLUMN_TILES % splits
    head = pid // COLUMN_TILES // splits
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    heads = tl.num_programs(0) // COLUMN_TILES // splits

    e = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_f = tl.arange(0, BLOCK_F)
    length = key_length(lengths_ptr, b, S, HAS_LENGTHS)
    mask_ptr += b * stride_mb + h * stride_mh
    q_ptr += (b * stride_qb + h * stride_qh) * STRIDE_UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * STRIDE_UNIT
    features_ptr += b * stride_fb + h * stride_fh
    feature_weight_ptr += h * num_features * E
    grad_scores_ptr += b * stride_db + h * stride_dh
    grad_q_ptr += (split.to(tl.int64) * heads + head) * T * E
    grad_k_ptr += head.to(tl.int64) * S * E
    weight = load_vector(score_weight_ptr + h * E, e, E, BLOCK_E)
    weight_sums = tl.zeros((BLOCK_E,), tl.float32)
    feature_sums = tl.zeros((BLOCK_F, BLOCK_E), tl.float32)

    begin = split * tiles_per_split * BLOCK_N
    end = tl.minimum(begin + tiles_per_split * BLOCK_N, S)
    for n0 in range(begin, end, BLOCK_N):
        s = n0 + offs_n
        key_sums = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for m0 in range(0, T, BLOCK_M):
            t = m0 + offs_m
            allowed = allowed_pairs(mask_ptr, t, s, T, length, stride_mt, stride_ms, HAS_MASK)
            seen = seen_keys(allowed)
            q = load_rows(
                q_ptr, t, looking_queries(allowed), stride_qt * STRIDE_UNIT, e, E, BLOCK_E
            ).to(tl.float32)
            k = load_rows(k_ptr, s, seen, stride_ks * STRIDE_UNIT, e, E, BLOCK_E).to(tl.float32)
            t64 = t.to(tl.int64)[:, None]
            s64 = s.to(tl.int64)[None, :]
            feature_offsets = t64 * stride_ft + s64 * stride_fs
            grad_scores = tl.load(
                grad_scores_ptr + t64 * stride_dt + s64 * stride_ds, mask=allowed, other=0.0
            )[:, :, None]
            if BY_PAIR:
                tangent = tangents_of_pairs(
                    q,
                    k,
                    features_ptr,
                    feature_weight_ptr,
                    feature_offsets,
                    allowed,
                    stride_ff,
                    num_features,
                    e,
                    HAS_FEATURES,
                    E,
                    BLOCK_E,
                )
            else:
                first = first_key(s, seen, S)
                origin = load_vector(k_ptr + first * stride_ks * STRIDE_UNIT, e, E, BLOCK_E)
                tangent = tangents_of_rows(q, k, origin)
            if NEED_SCORE_WEIGHT:
                weight_sums += tl.sum(tl.sum(tangent * grad_scores, 1), 0)
            gradient = grad_scores * (1.0 - tangent * tangent)
            if NEED_KEY:
                key_sums += tl.sum(gradient, 0)
            if NEED_FEATURE_WEIGHT:
                for f in range(0, num_features):
                    feature = load_feature(features_ptr, feature_offsets, allowed, f, stride_ff)
                    sums = tl.sum(tl.sum(gradient * feature[:, :, None], 1), 0)
                    feature_sums += tl.where((offs_f == f)[:, None], sums[None, :], 0.0)
            if NEED_QUERY:
                pointers = grad_q_ptr + t64 * E + e[None, :]
                mask = (t < T)[:, None] & (e < E)[None, :]
                before = tl.load(pointers, mask=mask & (n0 > begin), other=0.0)
                tl.store(pointers, before + tl.sum(gradient, 1) * weight[None, :], mask=mask)
        if NEED_KEY:
            tl.store(
                grad_k_ptr + s.to(tl.int64)[:, None] * E + e[None, :],
                (key_sums * weight[None, :]).to(grad_k_ptr.dtype.element_ty),
                mask=(s < S)[:, None] & (e < E)[None, :],
            )
        # Other lanes may read the sums of the queries next.
        tl.debug_barrier()

    row = (b * splits + split) * H + h
    if NEED_SCORE_WEIGHT:
        tl.store(grad_score_weight_ptr + row * E + e, weight_sums, mask=e < E)
    if NEED_FEATURE_WEIGHT:
        tl.store(
            grad_feature_weight_ptr + (row * num_features + offs_f)[:, None] * E + e[None, :],
            feature_sums * weight[None, :],
            mask=(offs_f < num_features)[:, None] & (e < E)[None, :],
        )


@triton.jit(do_not_specialize=_NUMBERS)
def additive_feature_gradient_kernel(
    q_ptr,
    k_ptr,
    score_weight_ptr,
    features_ptr,
    feature_weight_ptr,
    mask_ptr,
    lengths_ptr,
    grad_scores_ptr,
    grad_features_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_fb,
    stride_fh,
    stride_ft,
    stride_fs,
    stride_ff,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    stride_db,
    stride_dh,
    stride_dt,
    stride_ds,
    H,
    T,
    S,
    num_features,
    HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradients of the features of a tile of pairs: dX * (w * Y) @ feature_weight^T."""
    key_tiles = tl.cdiv(S, BLOCK_N)
    query_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % key_tiles
    pid_m = pid // key_tiles % query_tiles
    head = pid // key_tiles // query_tiles
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    s = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    length = key_length(lengths_ptr, b, S, HAS_LENGTHS)
    mask_ptr += b * stride_mb + h * stride_mh
    allowed = allowed_pairs(mask_ptr, t, s, T, length, stride_mt, stride_ms, HAS_MASK)
    seen = seen_keys(allowed)
    looking = looking_queries(allowed)
    q_ptr += (b * stride_qb + h * stride_qh) * STRIDE_UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * STRIDE_UNIT
    features_ptr += b * stride_fb + h * stride_fh
    feature_weight_ptr += h * num_features * E
    t64 = t.to(tl.int64)[:, None]
    s64 = s.to(tl.int64)[None, :]
    feature_offsets = t64 * stride_ft + s64 * stride_fs
    offs_e = tl.arange(0, BLOCK_E)
    offs_f = tl.arange(0, BLOCK_F)

    sums = tl.zeros((BLOCK_M * BLOCK_N, BLOCK_F), tl.float32)
    for start in tl.range(0, tl.where(pid_n * BLOCK_N < length, E, 0), BLOCK_E, num_stages=3):
        e = start + offs_e
        q = load_rows(q_ptr, t, looking, stride_qt * STRIDE_UNIT, e, E, BLOCK_E).to(tl.float32)
        k = load_rows(k_ptr, s, seen, stride_ks * STRIDE_UNIT, e, E, BLOCK_E).to(tl.float32)
        weight = load_vector(score_weight_ptr + h * E, e, E, BLOCK_E)
        tangent = tangents_of_pairs(
            q,
            k,
            features_ptr,
            feature_weight_ptr,
            feature_offsets,
            allowed,
            stride_ff,
            num_features,
            e,
            True,
            E,
            BLOCK_E,
        )
        slope = weight[None, None, :] * (1.0 - tangent * tangent)
        feature_weight = tl.load(
            feature_weight_ptr + offs_f[None, :] * E + e[:, None],
            mask=(offs_f < num_features)[None, :] & (e < E)[:, None],
            other=0.0,
        ).to(tl.float32)
        sums += tl.dot(
            tl.reshape(slope, (BLOCK_M * BLOCK_N, BLOCK_E)), feature_weight, input_precision="ieee"
        )
    grad_scores = tl.load(
        grad_scores_ptr + b * stride_db + h * stride_dh + t64 * stride_dt + s64 * stride_ds,
        mask=allowed,
        other=0.0,
    )
    gradients = tl.reshape(sums, (BLOCK_M, BLOCK_N, BLOCK_F)) * grad_scores[:, :, None]
    rows = (head.to(tl.int64) * T + t)[:, None] * S + s[None, :]
    exist = (t < T)[:, None] & (s < S)[None, :]
    tl.store(
        grad_features_ptr + rows[:, :, None] * num_features + offs_f[None, None, :],
        gradients.to(grad_features_ptr.dtype.element_ty),
        mask=exist[:, :, None] & (offs_f < num_features)[None, None, :],
    )


@triton.jit(do_not_specialize=_NUMBERS)
def additive_query_gradient_kernel(partial_ptr, grad_q_ptr, elements, splits, BLOCK: tl.constexpr):
    """Sums of fp32 ``[splits, elements]`` over the splits, in their order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(
            partial_ptr + tl.cast(split, tl.int64) * elements + offsets,
            mask=offsets < elements,
            other=0.0,
        )
    tl.store(grad_q_ptr + offsets, total.to(grad_q_ptr.dtype.element_ty), mask=offsets < elements)
