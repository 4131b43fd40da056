"""The Triton kernels of ``beam_search_step``; how they choose is in the op's README.

Numbers are compared as integers in the same order (``ordered``). A key is such an integer with
another in its lower half, which decides among equals; larger is better.

Programs hold BLOCK_R rows (a row is a beam) or BLOCK_S sentences: one on a GPU, as many as there
are in the interpreter, whose time is that of the operations and not of their size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import LOG2E, row_offsets

# ordered(-inf): what is not above it cannot be chosen.
LOWEST = tl.constexpr(-(2**31) + 0x7FFFFF)
NO_KEY = tl.constexpr(-(2**63))
# The lower half of a key, from which what is lower as a number is subtracted, by ^, to be better;
# the upper half of the lower one is for tokens that are not edited.
LOW_HALF = tl.constexpr(0xFFFFFFFF)
EDITED_HALF = tl.constexpr(0x7FFFFFFF)


@triton.jit
def order_of(x):
    """Integers in the order of fp32 numbers; that of -0 is -1."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def ordered(x):
    """Integers in the order of fp32 numbers; -0 counts as 0."""
    return order_of(x + 0.0)


@triton.jit
def number(order):
    """The fp32 number of an integer of ``ordered``."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def finite(top):
    """A maximum to subtract: 0 for that of nothing but -inf, where the difference would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def make_key(order, low):
    """A number's order above what decides among equals, from 0 to LOW_HALF."""
    return (order.to(tl.int64) << 32) | low


@triton.jit
def has_bit(words_ptr, row_words, tokens, mask):
    """Whether a bit map has the tokens. Row pointers broadcast to the tokens' shape."""
    word = tl.load(words_ptr + row_words + (tokens >> 5), mask=mask, other=0)
    return ((word >> (tokens & 31).to(tl.int32)) & 1) != 0


@triton.jit
def take_best(x, floor, wanted, ROOM: tl.constexpr):
    """Places for the best of each row, x: ``[R, N]``, N up to 16384.

    Those that get one, in 0..ROOM-1 and in the order of their indices, are at least the `wanted`
    largest that are above `floor`, or all; of equal ones the first. ROOM for the others.

    Bisects for a bound that at least `wanted` and at most ROOM exceed.
    """
    possible = x > floor
    high = tl.max(x, 1)  # [R]
    low = tl.min(tl.where(possible, x, high[:, None]), 1) - 1
    bound = tl.zeros_like(high) + floor
    is_open = tl.sum(possible.to(tl.int32), 1) > ROOM
    # More than ROOM exceed `low`, fewer than wanted `high`.
    while tl.max(is_open.to(tl.int32), 0) != 0:
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.sum((x > middle[:, None]).to(tl.int32), 1)
        # No number is between the two: of those that equal `high` the first are taken.
        is_last = middle == low
        bound = tl.where(is_open, tl.where(is_last, high, middle), bound)
        is_open = is_open & (is_last == 0) & ((above > ROOM) | (above < wanted))
        high = tl.where(above < wanted, middle, high)
        low = tl.where(above > ROOM, middle, low)
    is_above = x > bound[:, None]
    room = ROOM - tl.sum(is_above.to(tl.int32), 1)
    room = tl.where(bound == floor, 0, room)[:, None]
    is_equal = x == bound[:, None]
    # Both counts in one scan.
    counts = tl.cumsum(tl.where(is_above, 1, tl.where(is_equal, 1 << 16, 0)), 1)
    equal_so_far = counts >> 16
    taken = is_above | (is_equal & (equal_so_far <= room))
    return tl.where(taken, (counts & 0xFFFF) + tl.minimum(equal_so_far, room) - 1, ROOM)


@triton.jit
def places_of(keys):
    """How many of the row are larger: ``[R, W]`` keys, different unless they are NO_KEY."""
    return tl.sum((keys[:, None, :] > keys[:, :, None]).to(tl.int32), 2)


@triton.jit(do_not_specialize=("elements", "per_row", "words"))
def mark_kernel(
    tokens_ptr,
    factors_ptr,
    offsets_ptr,
    words_ptr,
    elements,
    per_row,
    vocabulary,
    words,
    HAS_CHANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets the bits of tokens, of which each row of a bit map has ``per_row``."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = offs < elements
    token = tl.load(tokens_ptr + offs, mask=exists, other=-1)
    exists = exists & (token >= 0) & (token < vocabulary)
    if HAS_CHANGES:
        factor = tl.load(factors_ptr + offs, mask=exists, other=1.0)
        offset = tl.load(offsets_ptr + offs, mask=exists, other=0.0)
        exists = exists & ((factor != 1.0) | (offset != 0.0))
    row = (offs // per_row).to(tl.int64)
    bit = tl.full((BLOCK,), 1, tl.int32) << (token & 31).to(tl.int32)
    tl.atomic_or(words_ptr + row * words + (token >> 5), bit, mask=exists, sem="relaxed")


@triton.jit(do_not_specialize=("rows", "inner", "beams", "chunks", "words"))
def scan_kernel(
    logits_ptr,
    scores_ptr,
    temperature_ptr,
    edited_ptr,
    shortlist_ptr,
    maxima_ptr,
    sums_ptr,
    inner,
    outer_stride,
    inner_stride,
    rows,
    beams,
    positions,
    vocabulary,
    chunks,
    words,
    ONE_STRIDE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    HAS_SHORTLIST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Reads a chunk of LINES x COLUMNS positions of rows: a maximum of each group, and a sum.

    A position is a token, or a place in the shortlist. maxima_ptr: [rows, chunks * groups of a
    chunk], as `ordered` has them, but for -0, without edited tokens. sums_ptr: [rows, chunks, 2],
    the largest logit m and the sum of 2^(scale * (logit - m)), NaN where a logit is NaN or +inf.
    """
    GROUPS: tl.constexpr = LINES * COLUMNS // GROUP
    chunk = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < rows
    row64 = row.to(tl.int64)
    # At the first step of a search all but one row of a sentence are not possible.
    is_read = tl.load(scores_ptr + row, mask=exists, other=float("-inf")) > float("-inf")
    base = row_offsets(row64, inner, outer_stride, inner_stride, ONE_STRIDE)[:, :, None]
    lines = tl.arange(0, LINES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    position = (chunk * (LINES * COLUMNS) + lines)[None, :, :]
    mask = is_read[:, None, None] & (position < positions)  # [BLOCK_R, LINES, COLUMNS]
    token = position
    if HAS_SHORTLIST:
        entries = (row64 // beams)[:, None, None] * positions + position
        listed = tl.load(shortlist_ptr + entries, mask=mask, other=-1)
        mask = mask & (listed >= 0) & (listed < vocabulary)
        token = listed.to(tl.int32)
    x = tl.load(logits_ptr + base + token, mask=mask, other=float("-inf")).to(tl.float32)

    scale = tl.full((BLOCK_R,), LOG2E, tl.float32)
    if HAS_TEMPERATURE:
        scale /= tl.load(temperature_ptr + row // beams, mask=exists, other=1.0)
    # Each column's powers of 2 are relative to its own maximum: no thread waits for another.
    tops = tl.max(x, 1)  # [BLOCK_R, COLUMNS]
    highest = tl.max(tops, 1)  # [BLOCK_R]
    powers = tl.math.exp2((x - finite(tops)[:, None, :]) * scale[:, None, None])
    weights = tl.math.exp2((tops - finite(highest)[:, None]) * scale[:, None])
    total = tl.sum(tl.sum(powers, 1) * weights, 1)
    slot = (row64 * chunks + chunk) * 2
    tl.store(sums_ptr + slot, highest, mask=exists)
    tl.store(sums_ptr + slot + 1, total, mask=exists)

    if HAS_EDITS:
        is_edited = has_bit(edited_ptr, (row64 * words)[:, None, None], token, mask)
        x = tl.where(is_edited, float("-inf"), x)
    if IS_ALIGNED:
        maxima = order_of(tl.max(tl.reshape(x, (BLOCK_R, GROUPS, GROUP)), 2))
    else:
        # Each thread has one token of a group: NVIDIA GPUs have an instruction for integers.
        maxima = tl.max(tl.reshape(order_of(x), (BLOCK_R, GROUPS, GROUP)), 2)
    slots = row64[:, None] * (chunks * GROUPS) + (chunk * GROUPS + tl.arange(0, GROUPS))[None, :]
    tl.store(maxima_ptr + slots, maxima, mask=exists[:, None])


@triton.jit(do_not_specialize=("rows", "inner", "chunks", "words", "eos_token", "edits"))
def select_kernel(
    logits_ptr,
    scores_ptr,
    temperature_ptr,
    edited_ptr,
    edit_tokens_ptr,
    edit_factors_ptr,
    edit_offsets_ptr,
    forced_ptr,
    shortlist_ptr,
    listed_ptr,
    maxima_ptr,
    sums_ptr,
    lists_ptr,
    keys_ptr,
    row_tokens_ptr,
    row_totals_ptr,
    facts_ptr,
    eos_totals_ptr,
    inner,
    outer_stride,
    inner_stride,
    rows,
    positions,
    vocabulary,
    chunks,
    words,
    edits,
    eos_token,
    ONE_STRIDE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    HAS_SHORTLIST: tl.constexpr,
    BEAMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The K best tokens of rows that do not end the sequence, and where the one that does stands.

    row_tokens_ptr, row_totals_ptr: [rows, K], the best first. facts_ptr: [rows, 3], how many of
    them are possible, the place of the end of sequence (-1: not among the best), whether the
    logits are invalid. eos_totals_ptr: [rows]. lists_ptr, keys_ptr: [rows, ROOM], scratch.
    """
    # One more than the beams, since one of them may end the sequence.
    WANTED: tl.constexpr = BEAMS + 1
    groups = chunks * (CHUNK // GROUP)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < rows
    row64 = row.to(tl.int64)
    score = tl.load(scores_ptr + row, mask=exists, other=float("-inf"))
    is_read = score > float("-inf")
    sentence = row // BEAMS
    base = row_offsets(row64, inner, outer_stride, inner_stride, ONE_STRIDE)  # [BLOCK_R, 1]
    temperature = tl.full((BLOCK_R,), 1.0, tl.float64)
    if HAS_TEMPERATURE:
        given = tl.load(temperature_ptr + sentence, mask=exists, other=1.0)
        temperature = given.to(tl.float64)

    # The groups whose maxima are the best hold the best tokens.
    offs_m = tl.arange(0, BLOCK_M)[None, :]
    maxima = tl.load(
        maxima_ptr + row64[:, None] * groups + offs_m,
        mask=is_read[:, None] & (offs_m < groups),
        other=LOWEST,
    )
    slots = row64[:, None] * ROOM + tl.arange(0, ROOM)[None, :]  # [BLOCK_R, ROOM]
    # -0 counts as 0.
    slot = take_best(tl.where(maxima == -1, 0, maxima), LOWEST, WANTED, ROOM)
    # What one thread leaves others read, once all are here.
    tl.store(lists_ptr + slots, -1, mask=exists[:, None])
    tl.debug_barrier()
    tl.store(lists_ptr + row64[:, None] * ROOM + slot, offs_m, mask=slot < ROOM)
    tl.debug_barrier()
    group = tl.load(lists_ptr + slots, mask=exists[:, None], other=-1)

    position = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    mask = (group >= 0)[:, :, None] & (position < positions)  # [BLOCK_R, ROOM, GROUP]
    token = position
    if HAS_SHORTLIST:
        entries = sentence.to(tl.int64)[:, None, None] * positions + position
        listed = tl.load(shortlist_ptr + entries, mask=mask, other=-1)
        mask = mask & (listed >= 0) & (listed < vocabulary)
        token = listed.to(tl.int32)
    if HAS_EDITS:
        row_words = (row64 * words)[:, None, None]
        mask = mask & (has_bit(edited_ptr, row_words, token, mask) == 0)
    x = tl.load(logits_ptr + base[:, :, None] + token, mask=mask, other=float("-inf"))
    order = tl.reshape(ordered(x.to(tl.float32)), (BLOCK_R, ROOM * GROUP))
    slot = take_best(order, LOWEST, WANTED, ROOM)
    low = tl.reshape(token, (BLOCK_R, ROOM * GROUP)).to(tl.int64) ^ LOW_HALF
    tl.store(keys_ptr + slots, NO_KEY, mask=exists[:, None])
    tl.debug_barrier()
    tl.store(keys_ptr + row64[:, None] * ROOM + slot, make_key(order, low), mask=slot < ROOM)
    tl.debug_barrier()
    keys = tl.load(keys_ptr + slots, mask=exists[:, None], other=NO_KEY)

    forced = tl.full((BLOCK_R,), -1, tl.int64)
    if HAS_FORCED:
        # In place of the best: the forced token, if it is one of the vocabulary; where it is
        # edited it comes with the edits.
        forced = tl.load(forced_ptr + sentence, mask=exists, other=-1)
        is_there = is_read & (forced >= 0) & (forced < vocabulary)
        if HAS_SHORTLIST:
            list_words = sentence.to(tl.int64) * words
            is_there = is_there & has_bit(listed_ptr, list_words, forced, is_there)
        if HAS_EDITS:
            is_there = is_there & (has_bit(edited_ptr, row64 * words, forced, is_there) == 0)
        is_alone = is_there[:, None] & (tl.arange(0, ROOM) == 0)[None, :]
        x = tl.load(logits_ptr + base + forced[:, None], mask=is_alone, other=float("-inf"))
        alone = make_key(ordered(x.to(tl.float32)), forced[:, None] ^ LOW_HALF)
        alone = tl.where(is_alone, alone, NO_KEY)
        keys = tl.where((forced >= 0)[:, None], alone, keys)

    # The chunks' sums in fp64, in an order that depends on their number alone.
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    sum_slots = (row64[:, None] * chunks + offs_c) * 2
    sum_mask = is_read[:, None] & (offs_c < chunks)
    tops = tl.load(sums_ptr + sum_slots, mask=sum_mask, other=float("-inf"))
    sums = tl.load(sums_ptr + sum_slots + 1, mask=sum_mask, other=0.0).to(tl.float64)
    highest = finite(tl.max(tops, 1))  # [BLOCK_R]
    distance = tops.to(tl.float64) - highest.to(tl.float64)[:, None]
    # By the number that the scan multiplied by, and not by its exact value.
    scale = tl.full((BLOCK_R,), LOG2E, tl.float32)
    if HAS_TEMPERATURE:
        scale /= given
    total = tl.sum(sums * tl.math.exp2(distance * scale.to(tl.float64)[:, None]), 1)
    per_unit = scale.to(tl.float64) * temperature  # log2(e), but for rounding
    lse = highest.to(tl.float64) / temperature + tl.math.log2(total) / per_unit
    is_invalid = is_read & ((lse != lse) | (lse == float("inf")))

    place = places_of(keys)  # [BLOCK_R, ROOM]
    token = (keys & LOW_HALF) ^ LOW_HALF
    running = score.to(tl.float64)[:, None]
    scaled = number((keys >> 32).to(tl.int32)).to(tl.float64) / temperature[:, None]
    # In this order, so that candidates of equal rows tie when their score + logit do.
    total = ((running + scaled) - lse[:, None]).to(tl.float32)
    is_possible = (keys != NO_KEY) & (place < WANTED) & (total > float("-inf"))
    if HAS_EDITS:
        # By total, unedited ones first; they keep their order, and their tokens wait in a list.
        tl.debug_barrier()
        unedited = row64[:, None] * ROOM + place
        tl.store(lists_ptr + unedited, token.to(tl.int32), mask=is_possible)
        merged = make_key(ordered(total), place.to(tl.int64) ^ LOW_HALF)
        tl.store(keys_ptr + slots, tl.where(is_possible, merged, NO_KEY), mask=exists[:, None])
        tl.debug_barrier()
        # The best so far, and as many edited tokens as there is room for beside them.
        offs_e = tl.arange(0, BLOCK_E)[None, :]
        is_old = exists[:, None] & (offs_e < ROOM)
        for begin in range(0, edits, BLOCK_E - ROOM):
            old = tl.load(keys_ptr + row64[:, None] * ROOM + offs_e, mask=is_old, other=NO_KEY)
            index = begin + offs_e - ROOM
            edit_slots = row64[:, None] * edits + index
            is_new = is_read[:, None] & (index >= begin) & (index < edits)
            edit = tl.load(edit_tokens_ptr + edit_slots, mask=is_new, other=-1)
            is_new = is_new & (edit >= 0) & (edit < vocabulary)
            if HAS_SHORTLIST:
                listed_words = (sentence.to(tl.int64) * words)[:, None]
                is_new = is_new & has_bit(listed_ptr, listed_words, edit, is_new)
            if HAS_FORCED:
                is_new = is_new & ((forced < 0)[:, None] | (edit == forced[:, None]))
            factor = tl.load(edit_factors_ptr + edit_slots, mask=is_new, other=1.0).to(tl.float64)
            offset = tl.load(edit_offsets_ptr + edit_slots, mask=is_new, other=0.0).to(tl.float64)
            is_new = is_new & ((factor != 1.0) | (offset != 0.0))
            logit = tl.load(logits_ptr + base + edit, mask=is_new, other=float("-inf"))
            change = factor * (logit.to(tl.float64) / temperature[:, None] - lse[:, None])
            edited_total = ((running + change) + offset).to(tl.float32)
            is_new = is_new & (edited_total > float("-inf"))
            new = make_key(ordered(edited_total), edit ^ EDITED_HALF)
            both = tl.where(is_old, old, tl.where(is_new, new, NO_KEY))
            target = take_best(both, NO_KEY, WANTED, ROOM)
            tl.debug_barrier()
            tl.store(keys_ptr + slots, NO_KEY, mask=exists[:, None])
            tl.debug_barrier()
            tl.store(keys_ptr + row64[:, None] * ROOM + target, both, mask=target < ROOM)
            tl.debug_barrier()
        keys = tl.load(keys_ptr + slots, mask=exists[:, None], other=NO_KEY)
        place = places_of(keys)
        low = keys & LOW_HALF
        is_possible = (keys != NO_KEY) & (place < WANTED)
        is_unedited = low > EDITED_HALF
        own = tl.where(is_unedited, low ^ LOW_HALF, 0)
        kept = tl.load(
            lists_ptr + row64[:, None] * ROOM + own, mask=is_possible & is_unedited, other=0
        )
        token = tl.where(is_unedited, kept.to(tl.int64), low ^ EDITED_HALF)
        total = number((keys >> 32).to(tl.int32))

    is_end = is_possible & (token == eos_token)
    eos_place = tl.max(tl.where(is_end, place, -1), 1)  # [BLOCK_R]
    eos_total = tl.max(tl.where(is_end, total, float("-inf")), 1)
    goes_on = is_possible & (is_end == 0)
    index = place - ((eos_place >= 0)[:, None] & (place > eos_place[:, None])).to(tl.int32)
    goes_on = goes_on & (index < BEAMS)
    out = row64[:, None] * BEAMS + index
    tl.store(row_tokens_ptr + out, token.to(tl.int32), mask=goes_on)
    tl.store(row_totals_ptr + out, total, mask=goes_on)
    tl.store(facts_ptr + row64 * 3, tl.sum(goes_on.to(tl.int32), 1), mask=exists)
    tl.store(facts_ptr + row64 * 3 + 1, eos_place, mask=exists)
    tl.store(facts_ptr + row64 * 3 + 2, is_invalid.to(tl.int32), mask=exists)
    tl.store(eos_totals_ptr + row64, eos_total, mask=exists)


@triton.jit
def rank_key(order, beam, place):
    """Of a sentence: among equal totals the lower beam, then the beam's own order."""
    return make_key(order, ((0xFFFF - beam) << 16 | (0xFFFF - place)).to(tl.int64) & LOW_HALF)


@triton.jit(do_not_specialize=("sentences", "vocabulary", "eos_token"))
def rank_kernel(
    row_tokens_ptr,
    row_totals_ptr,
    facts_ptr,
    eos_totals_ptr,
    keys_ptr,
    tokens_ptr,
    parents_ptr,
    next_scores_ptr,
    finished_scores_ptr,
    finished_parents_ptr,
    invalid_ptr,
    sentences,
    vocabulary,
    eos_token,
    BEAMS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Ranks what ``select_kernel`` left of the rows of sentences, and writes the results.

    keys_ptr: [sentences, ROOM], scratch.
    """
    sentence = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = (sentence < sentences)[:, None]
    first_row = sentence.to(tl.int64)[:, None] * BEAMS  # [BLOCK_S, 1]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    beam = offs_n // BEAMS
    index = offs_n % BEAMS
    row = first_row + beam
    mask = exists & (beam < BEAMS)
    count = tl.load(facts_ptr + row * 3, mask=mask, other=0)
    eos_place = tl.load(facts_ptr + row * 3 + 1, mask=mask, other=-1)
    mask = index < count
    total = tl.load(row_totals_ptr + row * BEAMS + index, mask=mask, other=float("-inf"))
    order = ordered(total)
    place = index + ((eos_place >= 0) & (index >= eos_place)).to(tl.int32)
    slots = sentence.to(tl.int64)[:, None] * ROOM + tl.arange(0, ROOM)[None, :]
    slot = take_best(order, LOWEST, BEAMS, ROOM)
    tl.store(keys_ptr + slots, NO_KEY, mask=exists)
    tl.debug_barrier()
    keys = rank_key(order, beam, place)
    tl.store(keys_ptr + sentence.to(tl.int64)[:, None] * ROOM + slot, keys, mask=slot < ROOM)
    tl.debug_barrier()
    keys = tl.load(keys_ptr + slots, mask=exists, other=NO_KEY)  # [BLOCK_S, ROOM]

    rank = places_of(keys)
    mask = (keys != NO_KEY) & (rank < BEAMS)
    low = (keys & LOW_HALF).to(tl.int32)
    beam = 0xFFFF - ((low >> 16) & 0xFFFF)
    place = 0xFFFF - (low & 0xFFFF)
    row = first_row + beam
    eos_place = tl.load(facts_ptr + row * 3 + 1, mask=mask, other=-1)
    index = place - ((eos_place >= 0) & (place > eos_place)).to(tl.int32)
    token = tl.load(row_tokens_ptr + row * BEAMS + index, mask=mask, other=0)
    out = first_row + rank
    tl.store(tokens_ptr + out, token.to(tl.int64), mask=mask)
    tl.store(parents_ptr + out, beam.to(tl.int64), mask=mask)
    tl.store(next_scores_ptr + out, number((keys >> 32).to(tl.int32)), mask=mask)
    filled = tl.sum(mask.to(tl.int32), 1)[:, None]  # [BLOCK_S, 1]

    # Candidates that end: slot i is for the one of rank i.
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    row = first_row + offs_k
    in_beams = exists & (offs_k < BEAMS)
    eos_total = tl.load(eos_totals_ptr + row, mask=in_beams, other=float("-inf"))
    eos_place = tl.load(facts_ptr + row * 3 + 1, mask=in_beams, other=-1)
    is_end = eos_place >= 0
    ends = tl.where(is_end, rank_key(ordered(eos_total), offs_k, eos_place), NO_KEY)
    rank = tl.sum((keys[:, None, :] > ends[:, :, None]).to(tl.int32), 2) + places_of(ends)
    is_here = is_end[:, None, :] & (rank[:, None, :] == offs_k[:, :, None])
    parent = tl.sum(tl.where(is_here, offs_k[:, None, :], 0), 2)
    finished = tl.max(tl.where(is_here, eos_total[:, None, :], float("-inf")), 2)
    tl.store(finished_parents_ptr + row, parent.to(tl.int64), mask=in_beams)
    tl.store(finished_scores_ptr + row, finished, mask=in_beams)
    invalid = tl.max(tl.load(facts_ptr + row * 3 + 2, mask=in_beams, other=0), 1)[:, None]
    tl.store(invalid_ptr + sentence[:, None], invalid.to(tl.uint8), mask=exists)

    # Impossible candidates fill up, by beam and token. Here the lists hold all possible ones.
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    nothing = tl.full((BLOCK_S, BLOCK_T), float("-inf"), tl.float32)
    filled = tl.where(exists, filled, BEAMS)
    from_beam = 0
    while (from_beam < BEAMS) & (tl.min(filled) < BEAMS):
        from_row = first_row + from_beam
        taken_count = tl.load(facts_ptr + from_row * 3, mask=exists, other=0)  # [BLOCK_S, 1]
        is_free = exists & (offs_t < vocabulary) & (offs_t != eos_token)
        free_place = tl.zeros_like(taken_count) + offs_t - (offs_t > eos_token).to(tl.int32)
        for i in range(0, tl.max(taken_count)):
            taken = tl.load(
                row_tokens_ptr + from_row * BEAMS + i, mask=i < taken_count, other=vocabulary
            )
            is_free = is_free & (taken != offs_t)
            free_place -= (taken < offs_t).to(tl.int32)
        is_free = is_free & (free_place < BEAMS - filled)
        to = first_row + filled + free_place
        tl.store(tokens_ptr + to, tl.zeros_like(to) + offs_t, mask=is_free)
        tl.store(parents_ptr + to, tl.zeros_like(to) + from_beam, mask=is_free)
        tl.store(next_scores_ptr + to, nothing, mask=is_free)
        filled = tl.minimum(filled + vocabulary - 1 - taken_count, BEAMS)
        from_beam += 1
    # A vocabulary of the end of sequence alone.
    is_left = in_beams & (offs_k >= filled)
    to = first_row + offs_k
    tl.store(tokens_ptr + to, tl.zeros_like(to) + eos_token, mask=is_left)
    tl.store(parents_ptr + to, tl.zeros_like(to), mask=is_left)
    tl.store(
        next_scores_ptr + to, tl.full((BLOCK_S, BLOCK_K), float("-inf"), tl.float32), mask=is_left
    )
