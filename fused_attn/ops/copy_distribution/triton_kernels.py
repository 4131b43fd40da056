"""Triton kernels of ``copy_distribution``. Only the launchers in ``triton.py`` import this module.

Terms of a word are relative to the largest of them, and a gradient is made from the same terms, so
that what is rounded in the largest cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import LOG2E

# Their values say nothing about how to compile.
_NUMBERS = (
    "logits_inner",
    "logits_outer_stride",
    "logits_inner_stride",
    "grad_inner",
    "grad_outer_stride",
    "grad_inner_stride",
    "tokens_inner",
    "tokens_outer_stride",
    "tokens_inner_stride",
    "rows_per_length",
    "positions",
    "vocabulary",
    "extended_size",
    "ignore_index",
    "chunks",
)
# The largest exponent of a weight's gradient, which fp32 can hold.
_LIMIT = tl.constexpr(87.7)


# ln 2 in two parts: products of the first and a small integer are exact.
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.42860682030941723e-6)


@triton.jit
def exp(x):
    """e^x, for the many: the rounding of the product makes the error grow with x."""
    return tl.math.exp2(x * LOG2E)


@triton.jit
def accurate_exp(x):
    """e^x for x below 88, with an error that does not grow."""
    x = tl.where(x < -150.0, -150.0, x)  # 0, for -inf too
    n = tl.floor(x * LOG2E + 0.5)
    rest = (x - n * _LN2_HIGH) - n * _LN2_LOW
    return tl.math.exp2(n) * tl.math.exp2(rest * LOG2E)


@triton.jit
def log(x):
    """Natural logarithm of x >= 0; -inf for 0."""
    return tl.where(x == 0.0, float("-inf"), tl.log(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def log_1_plus(x):
    """log(1 + x) for x >= 0, exact where 1 + x is not."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + e^-x)), at either infinity too."""
    return tl.minimum(x, 0.0) - log_1_plus(accurate_exp(-tl.abs(x)))


@triton.jit
def finite(x):
    """x, or 0 where it is -inf: what terms of a sum may be relative to."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def row_start(row, inner, outer_stride, inner_stride, STRIDE_UNIT: tl.constexpr):
    """Where a row begins, in elements. The strides are in units."""
    outer = row // inner
    start = outer.to(tl.int64) * (outer_stride * STRIDE_UNIT)
    return start + (row - outer * inner).to(tl.int64) * (inner_stride * STRIDE_UNIT)


@triton.jit
def source_length(lengths_ptr, row, rows_per_length, positions, HAS_LENGTHS: tl.constexpr):
    """How many positions the row's source has."""
    length = positions
    if HAS_LENGTHS:
        given = tl.load(lengths_ptr + row // rows_per_length)
        length = tl.minimum(tl.maximum(given, 0), positions).to(tl.int32)
    return length


@triton.jit
def load_source(copy_ptr, tokens_ptr, start, length, BLOCK_S: tl.constexpr):
    """Tokens, whether they take part, and weights or scores of a block of positions."""
    offs = start + tl.arange(0, BLOCK_S)
    tokens = tl.load(tokens_ptr + offs, mask=offs < length, other=-1)
    takes_part = tokens >= 0
    copy = tl.load(copy_ptr + offs, mask=takes_part, other=0.0).to(tl.float32)
    return tokens, takes_part, copy


@triton.jit
def gate_logs(gate_ptr, row, HAS_GATE: tl.constexpr):
    """Logs of the probabilities to generate and to copy."""
    generate = 0.0
    copy = 0.0
    if HAS_GATE:
        gate = tl.load(gate_ptr + row).to(tl.float32)
        generate = log_sigmoid(gate)
        copy = log_sigmoid(-gate)
    return generate, copy


@triton.jit
def sum_of_chunks(sums_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The log of the sum of exponentials of a row; -inf where all logits are."""
    offs = tl.arange(0, CHUNKS)
    at = sums_ptr + row.to(tl.int64) * chunks * 2 + offs
    maxima = tl.load(at, mask=offs < chunks, other=float("-inf"))
    sums = tl.load(at + chunks, mask=offs < chunks, other=0.0)
    largest = tl.max(maxima, 0)
    return largest + log(tl.sum(sums * exp(maxima - finite(largest)), 0))


@triton.jit
def sum_of_scores(copy_ptr, tokens_ptr, length, BLOCK_S: tl.constexpr):
    """The same of a row's scores."""
    largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_S,), tl.float32)
    for start in tl.range(0, length, BLOCK_S):
        _, takes_part, score = load_source(copy_ptr, tokens_ptr, start, length, BLOCK_S)
        score = tl.where(takes_part, score, float("-inf"))
        former = largest
        largest = tl.maximum(largest, score)
        sums = sums * exp(former - finite(largest)) + exp(score - finite(largest))
    high = tl.max(largest, 0)
    return high + log(tl.sum(sums * exp(largest - finite(high)), 0))


@triton.jit
def row_normaliser(
    sums_ptr,
    copy_ptr,
    tokens_ptr,
    row,
    length,
    chunks,
    HAS_GATE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """lse: the log of what normalises the row; +inf where nothing has a share."""
    lse = sum_of_chunks(sums_ptr, row, chunks, CHUNKS)
    if not HAS_GATE:
        scores = sum_of_scores(copy_ptr, tokens_ptr, length, BLOCK_S)
        high = tl.maximum(lse, scores)
        low = tl.minimum(lse, scores)
        lse = high + log_1_plus(exp(low - finite(high)))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def terms_of(generated, largest, copied, copy_log, HAS_GATE: tl.constexpr):
    """What a word's probability is summed from, relative to e^high.

    Args:
        generated: Log of the term of generating it.
        largest: Of the scores of its positions; with a gate not looked at.
        copied: The sum of its weights, or of e^(score - largest).
        copy_log: Log of the probability to copy.

    Returns:
        high; the terms of generating and of copying; the factor of a weight.
    """
    if HAS_GATE:
        high = finite(tl.maximum(generated, log(copied) + copy_log))
        factor = accurate_exp(tl.minimum(copy_log - high, _LIMIT))
        copied = copied * factor
    else:
        high = finite(tl.maximum(generated, largest))
        factor = 1.0
        copied = copied * accurate_exp(largest - high)
    return high, accurate_exp(generated - high), copied, factor


@triton.jit
def target_terms(
    logits_ptr,
    copy_ptr,
    tokens_ptr,
    target,
    length,
    vocabulary,
    generate_shift,
    copy_log,
    HAS_GATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The terms of the row's target."""
    is_generated = (target >= 0) & (target < vocabulary)
    logit = tl.load(logits_ptr + target, mask=is_generated, other=float("-inf")).to(tl.float32)
    largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_S,), tl.float32)
    for start in tl.range(0, length, BLOCK_S):
        tokens, takes_part, copy = load_source(copy_ptr, tokens_ptr, start, length, BLOCK_S)
        matches = takes_part & (tokens == target)
        if HAS_GATE:
            sums += tl.where(matches, copy, 0.0)
        else:
            score = tl.where(matches, copy, float("-inf"))
            former = largest
            largest = tl.maximum(largest, score)
            sums = sums * exp(former - finite(largest)) + exp(score - finite(largest))
    high = tl.max(largest, 0)
    if HAS_GATE:
        copied = tl.sum(sums, 0)
    else:
        copied = tl.sum(sums * exp(largest - finite(high)), 0)
    return terms_of(logit + generate_shift, high, copied, copy_log, HAS_GATE)


@triton.jit
def position_terms(
    logits_ptr,
    copy_ptr,
    tokens_ptr,
    start,
    length,
    vocabulary,
    extended_size,
    generate_shift,
    copy_log,
    HAS_GATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The terms of the words of a block of positions, whose positions may be anywhere.

    Positions of one word find the same numbers: what they are summed in is the source's order.
    """
    tokens, takes_part, copy = load_source(copy_ptr, tokens_ptr, start, length, BLOCK_S)
    is_listed = takes_part & (tokens < extended_size)
    largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_S,), tl.float32)
    for other in tl.range(0, length, BLOCK_S):
        others, _, other_copy = load_source(copy_ptr, tokens_ptr, other, length, BLOCK_S)
        is_same = tokens[:, None] == others[None, :]  # [BLOCK_S, BLOCK_S]
        if HAS_GATE:
            sums += tl.sum(tl.where(is_same, other_copy[None, :], 0.0), 1)
        else:
            scores = tl.where(is_same, other_copy[None, :], float("-inf"))
            former = largest
            largest = tl.maximum(largest, tl.max(scores, 1))
            sums = sums * exp(former - finite(largest))
            sums += tl.sum(exp(scores - finite(largest)[:, None]), 1)
    is_generated = is_listed & (tokens < vocabulary)
    logit = tl.load(logits_ptr + tokens, mask=is_generated, other=float("-inf")).to(tl.float32)
    generated = logit + generate_shift
    high, generated_term, copied_term, factor = terms_of(
        generated, largest, sums, copy_log, HAS_GATE
    )
    return tokens, takes_part, is_listed, copy, logit, high, generated_term, copied_term, factor


# --- forward ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_NUMBERS)
def scan_kernel(
    logits_ptr,
    targets_ptr,
    sums_ptr,
    logits_inner,
    logits_outer_stride,
    logits_inner_stride,
    vocabulary,
    ignore_index,
    chunks,
    HAS_TARGETS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Maximum and sum of exponentials relative to it of a chunk of a row: [rows, 2, chunks].

    ``vocabulary`` is in units.
    """
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    # Of an ignored row nothing is read.
    end = vocabulary
    if HAS_TARGETS:
        end = tl.where(tl.load(targets_ptr + row) == ignore_index, 0, vocabulary)
    end *= WIDTH_UNIT
    logits_ptr += row_start(
        row, logits_inner, logits_outer_stride, logits_inner_stride, STRIDE_UNIT
    )
    logits = tl.load(logits_ptr + offs, mask=offs < end, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, 0)
    total = tl.sum(exp(logits - finite(largest)), 0)
    at = sums_ptr + row.to(tl.int64) * chunks * 2 + chunk
    tl.store(at, largest)
    tl.store(at + chunks, total)


@triton.jit(do_not_specialize=_NUMBERS)
def nll_kernel(
    logits_ptr,
    copy_ptr,
    tokens_ptr,
    gate_ptr,
    lengths_ptr,
    targets_ptr,
    sums_ptr,
    nll_ptr,
    lse_ptr,
    logits_inner,
    logits_outer_stride,
    logits_inner_stride,
    tokens_inner,
    tokens_outer_stride,
    tokens_inner_stride,
    rows_per_length,
    positions,
    vocabulary,
    ignore_index,
    chunks,
    HAS_GATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The negative log-probability of a row's target, once its chunks are summed."""
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    logits_ptr += row_start(
        row, logits_inner, logits_outer_stride, logits_inner_stride, STRIDE_UNIT
    )
    copy_ptr += row.to(tl.int64) * positions
    tokens_ptr += row_start(row, tokens_inner, tokens_outer_stride, tokens_inner_stride, 1)
    length = source_length(lengths_ptr, row, rows_per_length, positions, HAS_LENGTHS)
    lse = row_normaliser(
        sums_ptr, copy_ptr, tokens_ptr, row, length, chunks, HAS_GATE, CHUNKS, BLOCK_S
    )
    generate_log, copy_log = gate_logs(gate_ptr, row, HAS_GATE)
    generate_shift = generate_log
    if HAS_GATE:
        generate_shift -= lse
    high, generated, copied, _ = target_terms(
        logits_ptr,
        copy_ptr,
        tokens_ptr,
        target,
        length,
        vocabulary,
        generate_shift,
        copy_log,
        HAS_GATE,
        BLOCK_S,
    )
    nll = -(high + log(generated + copied))
    if not HAS_GATE:
        nll += lse
    is_ignored = target == ignore_index
    tl.store(nll_ptr + row, tl.where(is_ignored, 0.0, nll))
    tl.store(lse_ptr + row, tl.where(is_ignored, 0.0, lse))


@triton.jit(do_not_specialize=_NUMBERS)
def log_probs_kernel(
    logits_ptr,
    copy_ptr,
    tokens_ptr,
    gate_ptr,
    lengths_ptr,
    sums_ptr,
    output_ptr,
    lse_ptr,
    logits_inner,
    logits_outer_stride,
    logits_inner_stride,
    tokens_inner,
    tokens_outer_stride,
    tokens_inner_stride,
    rows_per_length,
    positions,
    vocabulary,
    extended_size,
    chunks,
    HAS_GATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    OUTPUT_UNIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Log-probabilities of a chunk of words as if nothing were copied, once chunks are summed.

    ``vocabulary`` and ``extended_size`` are in units.
    """
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    size = extended_size * OUTPUT_UNIT
    copy_ptr += row.to(tl.int64) * positions
    tokens_ptr += row_start(row, tokens_inner, tokens_outer_stride, tokens_inner_stride, 1)
    length = source_length(lengths_ptr, row, rows_per_length, positions, HAS_LENGTHS)
    lse = row_normaliser(
        sums_ptr, copy_ptr, tokens_ptr, row, length, chunks, HAS_GATE, CHUNKS, BLOCK_S
    )
    if chunk == 0:
        tl.store(lse_ptr + row, lse)
    generate_log, _ = gate_logs(gate_ptr, row, HAS_GATE)
    logits_ptr += row_start(
        row, logits_inner, logits_outer_stride, logits_inner_stride, STRIDE_UNIT
    )
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + offs, mask=offs < vocabulary * WIDTH_UNIT, other=float("-inf"))
    out = output_ptr + row.to(tl.int64) * size + offs
    tl.store(out, logits.to(tl.float32) + (generate_log - lse), mask=offs < size)


@triton.jit(do_not_specialize=_NUMBERS)
def copied_words_kernel(
    logits_ptr,
    copy_ptr,
    tokens_ptr,
    gate_ptr,
    lengths_ptr,
    lse_ptr,
    output_ptr,
    logits_inner,
    logits_outer_stride,
    logits_inner_stride,
    tokens_inner,
    tokens_outer_stride,
    tokens_inner_stride,
    rows_per_length,
    positions,
    vocabulary,
    extended_size,
    HAS_GATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Log-probabilities of the words of a row's source, over what is there."""
    row = tl.program_id(0)
    logits_ptr += row_start(
        row, logits_inner, logits_outer_stride, logits_inner_stride, STRIDE_UNIT
    )
    copy_ptr += row.to(tl.int64) * positions
    tokens_ptr += row_start(row, tokens_inner, tokens_outer_stride, tokens_inner_stride, 1)
    output_ptr += row.to(tl.int64) * extended_size
    length = source_length(lengths_ptr, row, rows_per_length, positions, HAS_LENGTHS)
    lse = tl.load(lse_ptr + row)
    generate_log, copy_log = gate_logs(gate_ptr, row, HAS_GATE)
    generate_shift = generate_log
    if HAS_GATE:
        generate_shift -= lse
    for start in tl.range(0, length, BLOCK_S):
        tokens, _, is_listed, _, _, high, generated, copied, _ = position_terms(
            logits_ptr,
            copy_ptr,
            tokens_ptr,
            start,
            length,
            vocabulary,
            extended_size,
            generate_shift,
            copy_log,
            HAS_GATE,
            BLOCK_S,
        )
        log_probs = high + log(generated + copied)
        if not HAS_GATE:
            log_probs -= lse
        # Positions of one word store one number.
        tl.store(output_ptr + tokens, log_probs, mask=is_listed)


# --- backward ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_NUMBERS)
def nll_backward_kernel(
    grad_nll_ptr,
    logits_ptr,
    copy_ptr,
    tokens_ptr,
    gate_ptr,
    lengths_ptr,
    targets_ptr,
    lse_ptr,
    grad_logits_ptr,
    grad_copy_ptr,
    grad_gate_ptr,
    logits_inner,
    logits_outer_stride,
    logits_inner_stride,
    tokens_inner,
    tokens_outer_stride,
    tokens_inner_stride,
    rows_per_length,
    positions,
    vocabulary,
    ignore_index,
    HAS_GATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gradients of a chunk of a row's logits; the first also has those of scores and gate.

    ``vocabulary`` is in units.
    """
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    size = vocabulary * WIDTH_UNIT
    target = tl.load(targets_ptr + row)
    logits_ptr += row_start(
        row, logits_inner, logits_outer_stride, logits_inner_stride, STRIDE_UNIT
    )
    copy_ptr += row.to(tl.int64) * positions
    tokens_ptr += row_start(row, tokens_inner, tokens_outer_stride, tokens_inner_stride, 1)
    length = source_length(lengths_ptr, row, rows_per_length, positions, HAS_LENGTHS)
    lse = tl.load(lse_ptr + row)
    generate_log, copy_log = gate_logs(gate_ptr, row, HAS_GATE)
    generate_shift = generate_log
    if HAS_GATE:
        generate_shift -= lse
    high, generated, copied, factor = target_terms(
        logits_ptr,
        copy_ptr,
        tokens_ptr,
        target,
        length,
        size,
        generate_shift,
        copy_log,
        HAS_GATE,
        BLOCK_S,
    )
    is_ignored = target == ignore_index
    has_gradient = (generated + copied != 0.0) & (not is_ignored)
    total = tl.where(has_gradient, generated + copied, 1.0)
    grad = tl.where(has_gradient, tl.load(grad_nll_ptr + row), 0.0)
    generated_share = tl.where(has_gradient, generated / total, 0.0)
    copied_share = tl.where(has_gradient, copied / total, 0.0)
    scale = grad
    if HAS_GATE:
        scale *= generated_share

    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    end = tl.where(has_gradient, size, 0)
    logits = tl.load(logits_ptr + offs, mask=offs < end, other=float("-inf")).to(tl.float32)
    grad_logits = scale * exp(logits - lse)
    grad_logits -= tl.where(offs == target, grad * generated_share, 0.0)
    out = grad_logits_ptr + row.to(tl.int64) * size + offs
    tl.store(out, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=offs < size)

    if chunk == 0:
        if HAS_GATE:
            gate = generated_share * accurate_exp(copy_log)
            gate -= copied_share * accurate_exp(generate_log)
            tl.store(grad_gate_ptr + row, tl.where(has_gradient, -grad * gate, 0.0))
        grad_copy_ptr += row.to(tl.int64) * positions
        for start in tl.range(0, positions, BLOCK_S):
            tokens, takes_part, copy = load_source(copy_ptr, tokens_ptr, start, length, BLOCK_S)
            matches = takes_part & (tokens == target)
            if HAS_GATE:
                grad_copy = tl.where(matches, -grad * (factor / total), 0.0)
            else:
                grad_copy = grad * accurate_exp(copy - lse)
                grad_copy -= tl.where(matches, grad * (accurate_exp(copy - high) / total), 0.0)
            places = start + tl.arange(0, BLOCK_S)
            has_part = takes_part & has_gradient
            tl.store(
                grad_copy_ptr + places, tl.where(has_part, grad_copy, 0.0), mask=places < positions
            )


@triton.jit(do_not_specialize=_NUMBERS)
def log_probs_backward_kernel(
    grad_output_ptr,
    logits_ptr,
    copy_ptr,
    tokens_ptr,
    gate_ptr,
    lengths_ptr,
    lse_ptr,
    grad_logits_ptr,
    grad_copy_ptr,
    grad_gate_ptr,
    grad_inner,
    grad_outer_stride,
    grad_inner_stride,
    logits_inner,
    logits_outer_stride,
    logits_inner_stride,
    tokens_inner,
    tokens_outer_stride,
    tokens_inner_stride,
    rows_per_length,
    positions,
    vocabulary,
    extended_size,
    HAS_GATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """All gradients of a row. ``vocabulary`` is in units."""
    row = tl.program_id(0)
    size = vocabulary * WIDTH_UNIT
    grad_output_ptr += row_start(row, grad_inner, grad_outer_stride, grad_inner_stride, GRAD_UNIT)
    logits_ptr += row_start(
        row, logits_inner, logits_outer_stride, logits_inner_stride, STRIDE_UNIT
    )
    copy_ptr += row.to(tl.int64) * positions
    tokens_ptr += row_start(row, tokens_inner, tokens_outer_stride, tokens_inner_stride, 1)
    grad_logits_ptr += row.to(tl.int64) * size
    grad_copy_ptr += row.to(tl.int64) * positions
    length = source_length(lengths_ptr, row, rows_per_length, positions, HAS_LENGTHS)
    lse = tl.load(lse_ptr + row)
    generate_log, copy_log = gate_logs(gate_ptr, row, HAS_GATE)
    generate_shift = generate_log
    if HAS_GATE:
        generate_shift -= lse
    # What has no share gets no gradient, whatever arrives there.
    generates = (generate_log - lse) != float("-inf")

    sums = tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, size, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        logits = tl.load(logits_ptr + offs, mask=offs < size, other=float("-inf")).to(tl.float32)
        has_share = (logits != float("-inf")) & generates
        sums += tl.load(grad_output_ptr + offs, mask=has_share, other=0.0)

    # Gradients times shares: what reaches the copied positions, and of it what the generated words
    # do not get of their own.
    to_copied = tl.zeros((BLOCK_S,), tl.float32)
    not_generated = tl.zeros((BLOCK_S,), tl.float32)
    for start in tl.range(0, length, BLOCK_S):
        tokens, _, is_listed, copy, logit, high, generated, copied, factor = position_terms(
            logits_ptr,
            copy_ptr,
            tokens_ptr,
            start,
            length,
            size,
            extended_size,
            generate_shift,
            copy_log,
            HAS_GATE,
            BLOCK_S,
        )
        total = generated + copied
        is_possible = is_listed & (total != 0.0)
        grad = tl.load(grad_output_ptr + tokens, mask=is_possible, other=0.0)
        total = tl.where(is_possible, total, 1.0)
        if HAS_GATE:
            share = copy * (factor / total)
        else:
            share = accurate_exp(copy - high) / total
        part = tl.where(is_possible, grad * share, 0.0)
        to_copied += part
        not_generated += tl.where((logit != float("-inf")) & generates, part, 0.0)
    copied_total = tl.sum(to_copied, 0)
    generated_total = tl.sum(sums, 0) - tl.sum(not_generated, 0)
    scale = generated_total
    if HAS_GATE:
        gate = generated_total * accurate_exp(copy_log)
        gate -= copied_total * accurate_exp(generate_log)
        tl.store(grad_gate_ptr + row, gate)
    else:
        scale += copied_total

    for start in tl.range(0, size, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        logits = tl.load(logits_ptr + offs, mask=offs < size, other=float("-inf")).to(tl.float32)
        has_share = (logits != float("-inf")) & generates
        grad_logits = tl.load(grad_output_ptr + offs, mask=has_share, other=0.0)
        grad_logits -= scale * exp(logits - lse)
        tl.store(
            grad_logits_ptr + offs,
            grad_logits.to(grad_logits_ptr.dtype.element_ty),
            mask=offs < size,
        )

    # Other threads wrote what is written over.
    tl.debug_barrier()
    for start in tl.range(0, positions, BLOCK_S):
        tokens, takes_part, is_listed, copy, logit, high, generated, copied, factor = (
            position_terms(
                logits_ptr,
                copy_ptr,
                tokens_ptr,
                start,
                length,
                size,
                extended_size,
                generate_shift,
                copy_log,
                HAS_GATE,
                BLOCK_S,
            )
        )
        total = generated + copied
        is_possible = is_listed & (total != 0.0)
        grad = tl.load(grad_output_ptr + tokens, mask=is_possible, other=0.0)
        total = tl.where(is_possible, total, 1.0)
        if HAS_GATE:
            grad_copy = tl.where(is_possible, grad * (factor / total), 0.0)
        else:
            grad_copy = tl.where(is_possible, grad * (accurate_exp(copy - high) / total), 0.0)
            grad_copy -= scale * accurate_exp(copy - lse)
        places = start + tl.arange(0, BLOCK_S)
        tl.store(
            grad_copy_ptr + places, tl.where(takes_part, grad_copy, 0.0), mask=places < positions
        )
        # Positions of one word store one number.
        has_share = is_possible & (logit != float("-inf")) & generates
        grad_logit = grad * (generated / total) - scale * accurate_exp(logit - lse)
        tl.store(
            grad_logits_ptr + tokens,
            grad_logit.to(grad_logits_ptr.dtype.element_ty),
            mask=has_share,
        )
