"""What the Triton kernels of ``attention`` share; the README beside this file has the derivation.

Arguments come in named tuples (`triton.py` has their fields). A field that is None is a constant of
the compilation: what is absent costs nothing, and one source serves every combination.

A tile of pairs is BLOCK_M queries by BLOCK_N keys; the kernel of dk and dv holds it transposed. So
positions come as a column of ``rows`` (t) and a row of ``columns`` (s), or the other way round, and
are broadcast where they meet.

Logits are in units of log 2, so that an exponential is ``exp2``. Not where they must be exact to
the last bits of fp32, since the lse is natural, and converting a large one rounds it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._triton_kernels import LOG2E, tanh

LN2 = tl.constexpr(0.6931471805599453)

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
RELU = tl.constexpr(2)

# Of a block mask: queries, and keys, of a tile; 32-bit words of a row of it.
BLOCK = tl.constexpr(128)
WORDS = tl.constexpr(4)


class Sequence(NamedTuple):
    """One sequence of the batch, as a program sees it."""

    b: object
    query_start: object
    """Row of its first query in a packed batch; else 0. int64."""
    key_start: object
    query_length: object
    key_length: object
    diagonal: object
    """Query t is over key t + diagonal."""


class Steps(NamedTuple):
    """Tiles that a loop takes: ``first`` to ``last``, or those that a block mask lists."""

    first: object
    full_first: object
    """The first that no bound cuts."""
    full_last: object
    last: object
    tiles: object
    """The list: numbers of 128-row tiles, partial ones first."""
    partial: object
    """How many are partial, and how many there are."""
    listed: object


# --- programs and sequences ---------------------------------------------------------------------


@triton.jit
def tile_and_head(num_tiles, num_heads, group, REVERSED: tl.constexpr):
    """This program's tile and head.

    Heads come in groups whose keys and values fit the L2 cache together. Within a group a tile of
    all heads comes before the next tile: with the longest ones first, the last programs are short.
    """
    pid = tl.program_id(0)
    first = pid // (group * num_tiles) * group
    width = tl.minimum(num_heads - first, group)
    rest = pid % (group * num_tiles)
    tile = rest // width
    if REVERSED:
        tile = num_tiles - 1 - tile
    return tile, first + rest % width


@triton.jit
def rows_of(offsets, lengths, most, b):
    """Where the rows of sequence b begin, and how many there are."""
    start = tl.cast(0, tl.int64)
    length = tl.cast(most, tl.int32)
    if offsets is not None:
        start = tl.load(offsets + b).to(tl.int64)
        end = tl.load(offsets + b + 1).to(tl.int64)
        length = tl.minimum(end - start, length).to(tl.int32)
    elif lengths is not None:
        length = tl.minimum(tl.load(lengths + b).to(tl.int64), length).to(tl.int32)
    return start, length


@triton.jit
def sequence_of(call, b):
    """Starts, lengths and the diagonal of sequence b."""
    query_start, query_length = rows_of(call.query_offsets, call.query_lengths, call.T, b)
    key_start, key_length = rows_of(call.key_offsets, call.key_lengths, call.S, b)
    diagonal = tl.cast(0, tl.int32)
    if call.align_lower_right:
        diagonal = key_length - query_length
    return Sequence(b, query_start, key_start, query_length, key_length, diagonal)


@triton.jit
def head_pointer(rows, call, b, h, start):
    """Row ``start`` of a head of a tensor of rows; a packed batch has one b."""
    pointer = rows.ptr + tl.cast(h, tl.int64) * rows.stride_h + start * rows.stride_t
    if call.query_offsets is None:
        pointer += tl.cast(b, tl.int64) * rows.stride_b
    return pointer


@triton.jit
def row_index(call, b, h, start):
    """Where the numbers of a head's rows begin in ``[B, H, T]``, or in ``[1, H, N]`` if packed."""
    head = tl.cast(h, tl.int64)
    if call.query_offsets is None:
        head += tl.cast(b, tl.int64) * call.H
    return head * call.rows + start


# --- tiles of rows ------------------------------------------------------------------------------


@triton.jit
def source_of(
    rows,
    call,
    b,
    h,
    start,
    length,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """What :func:`load_rows` reads a head's tiles from: a descriptor, or a pointer."""
    pointer = head_pointer(rows, call, b, h, start)
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(
            pointer, [length, WIDTH], [rows.stride_t, 1], [ROWS, COLUMNS]
        )
    else:
        source = pointer
    return source


@triton.jit
def load_rows(
    source,
    rows,
    first,
    length,
    shown,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows from ``first``; 0 behind the length, and where ``shown`` (None: all) is False.

    # [ROWS, COLUMNS]
    """
    if DESCRIPTORS:
        tile = source.load([first, 0])
    else:
        offs = first + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        mask = (offs < length)[:, None]
        if shown is not None:
            mask = mask & shown
        if WIDTH < COLUMNS:
            mask = mask & (columns < WIDTH)[None, :]
        offsets = offs.to(tl.int64)[:, None] * rows.stride_t
        pointers = source + offsets + columns.to(tl.int64)[None, :] * rows.stride_d
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store_rows(
    pointer,
    rows,
    first,
    length,
    tile,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores the rows from ``first`` that are before the length."""
    offs = first + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (offs < length)[:, None]
    if WIDTH < COLUMNS:
        mask = mask & (columns < WIDTH)[None, :]
    offsets = offs.to(tl.int64)[:, None] * rows.stride_t
    pointers = pointer + offsets + columns.to(tl.int64)[None, :] * rows.stride_d
    tl.store(pointers, tile.to(rows.ptr.dtype.element_ty), mask=mask)


# --- which tiles --------------------------------------------------------------------------------


@triton.jit
def steps_between(first_row, last_row, full_first_row, full_last_row, SIZE: tl.constexpr):
    """Tiles of SIZE rows that cover [first_row, last_row), and which of them are full."""
    first = first_row // SIZE
    last = tl.where(last_row > first_row, tl.cdiv(last_row, SIZE), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_first_row, SIZE), first), last)
    full_last = tl.maximum(tl.minimum(full_last_row // SIZE, last), full_first)
    return Steps(first, full_first, full_last, last, 0, 0, 0)


@triton.jit
def key_steps(call, sequence, m0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key tiles of queries [m0, m0 + BLOCK_M)."""
    m1 = tl.minimum(m0 + BLOCK_M, sequence.query_length)
    lo = tl.cast(0, tl.int32)
    full_lo = lo
    hi = sequence.key_length
    full_hi = hi
    if call.left is not None:
        lo = tl.maximum(m0 + sequence.diagonal - call.left, 0)
        full_lo = tl.maximum(m1 - 1 + sequence.diagonal - call.left, 0)
    if call.right is not None:
        hi = tl.minimum(hi, m1 + sequence.diagonal + call.right)
        full_hi = tl.maximum(tl.minimum(full_hi, m0 + 1 + sequence.diagonal + call.right), 0)
    hi = tl.where(m0 < sequence.query_length, hi, 0)
    return steps_between(lo, hi, full_lo, full_hi, BLOCK_N)


@triton.jit
def query_steps(call, sequence, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The query tiles of keys [n0, n0 + BLOCK_N)."""
    n1 = tl.minimum(n0 + BLOCK_N, sequence.key_length)
    lo = tl.cast(0, tl.int32)
    full_lo = lo
    hi = sequence.query_length
    # Queries behind the length are loaded as zeros, which add nothing: their tile may be full.
    full_hi = hi + BLOCK_M
    if call.right is not None:
        lo = tl.maximum(n0 - sequence.diagonal - call.right, 0)
        full_lo = tl.maximum(n1 - 1 - sequence.diagonal - call.right, 0)
    if call.left is not None:
        hi = tl.minimum(hi, n1 - sequence.diagonal + call.left)
        full_hi = tl.maximum(tl.minimum(full_hi, n0 + 1 - sequence.diagonal + call.left), 0)
    hi = tl.where(n0 < sequence.key_length, hi, 0)
    return steps_between(lo, hi, full_lo, full_hi, BLOCK_M)


@triton.jit
def block_head(call, b, h):
    """Which of the block masks is the head's."""
    index = tl.cast(0, tl.int64)
    if call.blocks.stride_b is not None:
        index += tl.cast(b, tl.int64) * call.blocks.stride_b
    if call.blocks.stride_h is not None:
        index += tl.cast(h, tl.int64) * call.blocks.stride_h
    return index


@triton.jit
def listed_steps(steps, tiles, counts, row, width):
    """The same, by the row of a block mask's lists."""
    partial = tl.load(counts + row * 2)
    listed = partial + tl.load(counts + row * 2 + 1)
    return Steps(
        steps.first,
        steps.full_first,
        steps.full_last,
        steps.last,
        tiles + row * width,
        partial,
        listed,
    )


@triton.jit
def count_steps(call, steps, SIZE: tl.constexpr):
    """How many tiles the loop takes."""
    if call.blocks.tiles is not None:
        number = steps.listed * (BLOCK // SIZE)
    else:
        number = steps.last - steps.first
    return number


@triton.jit
def step_start(i, call, steps, SIZE: tl.constexpr):
    """First row of the loop's tile i."""
    if call.blocks.tiles is not None:
        i = tl.cast(i, tl.int32)
        start = tl.load(steps.tiles + i // (BLOCK // SIZE)) * BLOCK + i % (BLOCK // SIZE) * SIZE
    else:
        start = (steps.first + i) * SIZE
    return tl.multiple_of(start, SIZE)


@triton.jit
def has_bits(i, call, steps, SIZE: tl.constexpr):
    """Whether the loop's tile i has bits of a block mask."""
    if call.blocks.tiles is not None:
        result = i < steps.partial * (BLOCK // SIZE)
    else:
        result = False
    return result


@triton.jit
def is_cut(i, start, call, steps, SIZE: tl.constexpr):
    """Whether a bound or a block mask hides part of the loop's tile i."""
    cut = (start < steps.full_first * SIZE) | (start >= steps.full_last * SIZE)
    if call.blocks.tiles is not None:
        cut = cut | has_bits(i, call, steps, SIZE)
    return cut


# --- which pairs --------------------------------------------------------------------------------


@triton.jit
def pair_pointer(pairs, b, h):
    """Where a head's part of a broadcast ``[B, H, T, S]`` begins; a stride None is a broadcast."""
    pointer = pairs.ptr
    if pairs.stride_b is not None:
        pointer += tl.cast(b, tl.int64) * pairs.stride_b
    if pairs.stride_h is not None:
        pointer += tl.cast(h, tl.int64) * pairs.stride_h
    return pointer


@triton.jit
def load_pairs(pairs, pointer, call, rows, columns):
    """Elements of a broadcast ``[B, H, T, S]`` at positions; 0 outside of T x S."""
    if pairs.stride_t is not None and pairs.stride_s is not None:
        offsets = rows.to(tl.int64) * pairs.stride_t + columns.to(tl.int64) * pairs.stride_s
        tile = tl.load(pointer + offsets, mask=(rows < call.T) & (columns < call.S), other=0)
    elif pairs.stride_t is not None:
        tile = tl.load(pointer + rows.to(tl.int64) * pairs.stride_t, mask=rows < call.T, other=0)
    elif pairs.stride_s is not None:
        offsets = columns.to(tl.int64) * pairs.stride_s
        tile = tl.load(pointer + offsets, mask=columns < call.S, other=0)
    else:
        tile = tl.load(pointer)
    return tile


@triton.jit
def shown_keys(call, pointer, keys):
    """Whether a mask that is the same for all queries shows the keys, or None.

    Keys that it hides are read as zeros, so that a NaN there cannot survive as 0 * NaN.
    """
    shown = None
    if call.mask.ptr is not None:
        if call.mask.stride_t is None:
            shown = load_pairs(call.mask, pointer, call, keys, keys) != 0
    return shown


@triton.jit
def hide(x, absent, call, sequence, h, m0, n0, rows, columns, with_bits, BOUNDS: tl.constexpr):
    """``x``, with ``absent`` for pairs that a bound or, if ``with_bits``, a block mask hides."""
    if BOUNDS:
        stop = sequence.key_length
        if call.right is not None:
            stop = tl.minimum(rows + (sequence.diagonal + call.right + 1), stop)
        visible = columns < stop
        if call.left is not None:
            visible = visible & (columns >= rows + (sequence.diagonal - call.left))
        x = tl.where(visible, x, absent)
    if call.blocks.tiles is not None:
        row = block_head(call, sequence.b, h) * call.blocks.query_blocks + m0 // BLOCK
        kind = tl.load(call.blocks.tiles + row * call.blocks.key_blocks + n0 // BLOCK)
        bits = call.blocks.bits + (kind.to(tl.int64) - 2) * (BLOCK * WORDS)
        words = (rows % BLOCK) * WORDS + (columns % BLOCK) // 32
        words = tl.load(bits + words, mask=(words >= 0) & with_bits, other=-1)
        x = tl.where(((words >> (columns % 32)) & 1) != 0, x, absent)
    return x


@triton.jit
def shown_pairs(call, pointer, rows, columns):
    """Which pairs the boolean mask shows, or None."""
    shown = None
    if call.mask.ptr is not None:
        shown = load_pairs(call.mask, pointer, call, rows, columns) != 0
    return shown


@triton.jit
def keep_pairs(
    call,
    seed,
    b,
    h,
    m0,
    n0,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Whether dropout keeps each pair of a tile: the mask of ops/_philox.py, bit for bit.

    Rows are padded to whole counters of four words, and a tile begins at a multiple of four: its
    pairs are all the words of its counters.
    """
    row = (tl.cast(b, tl.int64) * call.H + h) * call.T + m0
    rows = row + tl.arange(0, BLOCK_M)
    counters = rows[:, None] * tl.cdiv(call.S, 4) + (n0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counters)  # [BLOCK_M, BLOCK_N / 4]
    # The new dimension of a join is the last one: (w0, w1), (w2, w3) for each counter.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    keep = words >= tl.cast(call.keep_threshold, tl.uint32)
    if TRANSPOSED:
        keep = tl.trans(keep)
    return keep


# --- logits, weights and their derivatives ------------------------------------------------------


@triton.jit
def logits(products, call, bias_pointer, slope, sequence, rows, columns):
    """From q · k: the logits, what is to multiply them, and the derivative of the softcap.

    The multiplier leaves the scale to the multiply-add of the exponential.
    """
    unit: tl.constexpr = 1.0 if call.exact or call.activation == RELU else LOG2E
    derivative = 1.0
    multiplier = 1.0
    x = products
    if call.softcap is not None:
        bounded, derivative = tanh(x * (call.scale / call.softcap))
        x = bounded * (call.softcap * unit)
    elif call.fold_scale:
        multiplier = call.scale * unit
    else:
        x = x * (call.scale * unit)
    if call.bias.ptr is not None:
        bias = load_pairs(call.bias, bias_pointer, call, rows, columns)
        x += bias.to(tl.float32) * unit
    if call.slopes is not None:
        distance = tl.abs(rows + sequence.diagonal - columns)
        x -= distance.to(tl.float32) * (slope * unit)
    return x, multiplier, derivative


@triton.jit
def exponential(x, call):
    """e to the power of what is in the logits' unit."""
    if call.exact:
        x = x * LOG2E
    return tl.math.exp2(x)


@triton.jit
def slope_of(call, b, h):
    """The head's slope of ALiBi."""
    slope = 0.0
    if call.slopes is not None:
        slope = tl.load(call.slopes + b * call.stride_slopes + h)
    return slope


@triton.jit
def weights(x, multiplier, lse, call):
    """P from the logits; ``lse`` (softmax alone) in the logits' unit."""
    if call.activation == SOFTMAX:
        p = exponential(x * multiplier - lse, call)
    elif call.activation == SIGMOID:
        p = 1.0 / (1.0 + exponential(-x * multiplier, call))
    else:
        # Not a maximum, which would lose a NaN.
        p = tl.where(x * multiplier < 0.0, 0.0, x * multiplier)
    return p


@triton.jit
def logit_gradient(p, dp, delta, call):
    """dX from the weights and their gradient."""
    if call.activation == SOFTMAX:
        dx = p * (dp - delta)
    elif call.activation == SIGMOID:
        dx = p * (1.0 - p) * dp
    else:
        dx = tl.where(p > 0.0, dp, 0.0)
    return dx


@triton.jit
def load_lse(lse_ptr, call, index, offs_m, query_length):
    """The lse of queries in the logits' unit; +inf, for weights of 0, where there is nothing."""
    lse = tl.load(lse_ptr + index + offs_m, mask=offs_m < query_length, other=float("-inf"))
    if not call.exact:
        lse = lse * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)
