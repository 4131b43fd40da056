"""The ``triton`` backend: launchers. The kernels are in ``triton_kernels.py``, loaded on use."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import FLOATING
from .._triton import ceil_div, device_guard, next_power_of_2, strided_rows, target

_MAX_BEAMS = 64
_MAX_VOCABULARY = 1 << 20
# Tokens that are summed on their own, whatever the number of sentences, so that a row's
# log-sum-exp depends on the row alone.
_CHUNK = 4096
_SCAN_WARPS = 4
# Tokens of a group, whose largest logit is kept; more where that leaves many groups, and half as
# many where there are more beams than this.
_GROUP = 32
_FEW_BEAMS = 16
_MAX_GROUPS = 16384
# Edited tokens that are ranked at a time.
_EDITS = 1024
# Elements of a program in the interpreter.
_INTERPRETED_ELEMENTS = 1 << 20


def unsupported_reasons(logits: Tensor, *options: object) -> list[str]:
    """Why this backend cannot run the call; empty if it can. It has all options."""
    reasons = []
    if logits.dtype not in FLOATING:
        reasons.append(f"dtype {logits.dtype}: float32, float16 or bfloat16 only")
    if logits.size(1) > _MAX_BEAMS:
        reasons.append(f"{logits.size(1)} beams > {_MAX_BEAMS}")
    if logits.size(2) > _MAX_VOCABULARY:
        reasons.append(f"vocabulary of {logits.size(2)} > {_MAX_VOCABULARY}")
    return reasons


def step(
    logits: Tensor,
    scores: Tensor,
    eos_token: int,
    temperature: Tensor | None = None,
    edit_tokens: Tensor | None = None,
    edit_factors: Tensor | None = None,
    edit_offsets: Tensor | None = None,
    forced_tokens: Tensor | None = None,
    shortlist: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores, finished parents and invalid."""
    from .triton_kernels import mark_kernel, rank_kernel, scan_kernel, select_kernel

    B, K, V = logits.shape
    tokens, parents, finished_parents = (
        scores.new_empty((B, K), dtype=torch.int64) for _ in range(3)
    )
    next_scores, finished_scores = (scores.new_empty((B, K)) for _ in range(2))
    invalid = scores.new_empty((B,), dtype=torch.bool)
    results = (tokens, parents, next_scores, finished_scores, finished_parents, invalid)
    if B == 0:
        return results
    logits, layout = strided_rows(logits)
    scores = scores.contiguous()
    if edit_tokens is not None and edit_tokens.size(2) == 0:
        edit_tokens = None
    temperature, edit_tokens, edit_factors, edit_offsets, forced_tokens, shortlist = (
        None if option is None else option.contiguous()
        for option in (
            temperature,
            edit_tokens,
            edit_factors,
            edit_offsets,
            forced_tokens,
            shortlist,
        )
    )
    rows = B * K
    positions = V if shortlist is None else shortlist.size(1)
    # A thread's accesses are of 16 bytes, and of the same columns in all lines.
    columns = _SCAN_WARPS * target().warp_size * 16 // logits.element_size()
    numbers = (logits.data_ptr(), layout.outer_stride, layout.inner_stride, V)
    is_aligned = shortlist is None and all(number % 16 == 0 for number in numbers)
    group = _GROUP // 2 if is_aligned and K > _FEW_BEAMS else _GROUP
    while ceil_div(V, group) > _MAX_GROUPS:
        group *= 2
    chunks = max(ceil_div(positions, _CHUNK), 1)
    groups = chunks * _CHUNK // group
    room = _room(K)
    edits = 0 if edit_tokens is None else edit_tokens.size(2)
    words = ceil_div(V, 32)
    if is_aligned:
        registers = 64 if edit_tokens is None else 80
    else:
        registers = 128 if shortlist is None else 255
    scan_rows = select_rows = sentences = 1
    if target().architecture == "interpreter":
        scan_rows = min(next_power_of_2(rows), _INTERPRETED_ELEMENTS // _CHUNK)
        select_rows = min(next_power_of_2(rows), _INTERPRETED_ELEMENTS // (room * max(room, group)))
        sentences = next_power_of_2(B)

    def bits(count: int) -> Tensor:
        return torch.zeros((count, words), dtype=torch.int32, device=logits.device)

    maxima = scores.new_empty((rows, groups), dtype=torch.int32)
    sums = scores.new_empty((rows, chunks, 2))
    lists = scores.new_empty((rows, room), dtype=torch.int32)
    keys = scores.new_empty((rows, room), dtype=torch.int64)
    row_tokens = scores.new_empty((rows, K), dtype=torch.int32)
    row_totals = scores.new_empty((rows, K))
    facts = scores.new_empty((rows, 3), dtype=torch.int32)
    eos_totals = scores.new_empty((rows,))
    flags = {
        "ONE_STRIDE": layout.has_one_stride,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_EDITS": edit_tokens is not None,
        "HAS_SHORTLIST": shortlist is not None,
    }
    with device_guard(logits):
        edited = listed = None

        def mark(marked: Tensor, words_of: Tensor, has_changes: bool) -> None:
            mark_kernel[(ceil_div(marked.numel(), _EDITS),)](
                marked,
                edit_factors,
                edit_offsets,
                words_of,
                marked.numel(),
                marked.size(-1),
                V,
                words,
                HAS_CHANGES=has_changes,
                BLOCK=_EDITS,
                num_warps=4,
            )

        if edit_tokens is not None:
            edited = bits(rows)
            mark(edit_tokens, edited, True)
        if shortlist is not None and (edit_tokens is not None or forced_tokens is not None):
            listed = bits(B)
            if positions > 0:
                mark(shortlist, listed, False)
        scan_kernel[(ceil_div(rows, scan_rows), chunks)](
            logits,
            scores,
            temperature,
            edited,
            shortlist,
            maxima,
            sums,
            *layout,
            rows,
            K,
            positions,
            V,
            chunks,
            words,
            **flags,
            IS_ALIGNED=is_aligned,
            BLOCK_R=scan_rows,
            LINES=_CHUNK // columns,
            COLUMNS=columns,
            GROUP=group,
            num_warps=_SCAN_WARPS,
            # All loads are under way at once.
            **target().register_options(registers),
        )
        select_kernel[(ceil_div(rows, select_rows),)](
            logits,
            scores,
            temperature,
            edited,
            edit_tokens,
            edit_factors,
            edit_offsets,
            forced_tokens,
            shortlist,
            listed,
            maxima,
            sums,
            lists,
            keys,
            row_tokens,
            row_totals,
            facts,
            eos_totals,
            *layout,
            rows,
            positions,
            V,
            chunks,
            words,
            edits,
            eos_token,
            **flags,
            HAS_FORCED=forced_tokens is not None,
            BEAMS=K,
            BLOCK_R=select_rows,
            BLOCK_C=next_power_of_2(chunks),
            BLOCK_M=next_power_of_2(groups),
            BLOCK_E=max(2 * room, min(_EDITS, next_power_of_2(room + edits))),
            CHUNK=_CHUNK,
            GROUP=group,
            ROOM=room,
            **_wide(max(groups, room * group)),
            # A later turn of a loop reads what an earlier one stored: no load comes early.
            num_stages=1,
        )
        rank_kernel[(ceil_div(B, sentences),)](
            row_tokens,
            row_totals,
            facts,
            eos_totals,
            keys,
            tokens,
            parents,
            next_scores,
            finished_scores,
            finished_parents,
            # A bool is a byte, which stores without a conversion in every version.
            invalid.view(torch.uint8),
            B,
            V,
            eos_token,
            BEAMS=K,
            BLOCK_S=sentences,
            BLOCK_K=next_power_of_2(K),
            BLOCK_N=next_power_of_2(K * K),
            BLOCK_T=next_power_of_2(2 * K + 1),
            ROOM=room,
            **_wide(max(K * K, room * room // 4)),
        )
    return results


def _room(beams: int) -> int:
    """Keys that a choice may leave: more than are wanted, so that the bound is found in few steps.

    One more than the beams are wanted, since one of them may end the sequence.
    """
    return max(16, next_power_of_2(beams + 1 + beams // 4))


def _wide(elements: int) -> dict[str, int]:
    """Launch options for a tile: 32 elements a thread, and all registers that so many may have."""
    warps = min(max(next_power_of_2(elements) // 1024, 4), 16)
    return {"num_warps": warps, **target().register_options(min(255, 2048 // warps))}
