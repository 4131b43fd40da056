"""From the public arguments of ``attention`` to the private operator's, checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._check import (
    INTEGERS,
    check_broadcastable,
    check_device,
    check_dtype,
    check_floating,
    check_rank,
    check_same,
    check_seed,
    check_tensor,
)
from .._philox import draw_seed
from .block_mask import BlockMask
from .contract import RELU, SIGMOID, SOFTMAX, AttentionInputs

OP = "attention"
_ACTIVATIONS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "relu": RELU}
_ALIGNMENTS = ("upper_left", "lower_right")
_PAIRS = "[B, H, T, S]"


def window_bounds(is_causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """Keys that a query sees to the left and right of the diagonal; -1: all.

    Raises:
        TypeError: The window is no pair, or a side no integer.
        ValueError: A side is negative.
    """
    left, right = -1, -1
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise TypeError(f"{OP}: window must be a pair (left, right), got {window!r}")
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
                raise TypeError(f"{OP}: window must hold integers or None, got {window!r}")
            if side is not None and side < 0:
                raise ValueError(f"{OP}: window must not be negative, got {window!r}")
        left, right = (-1 if side is None else side for side in window)
    return left, 0 if is_causal else right


def attention_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    block_mask: BlockMask | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    max_queries: int | None,
    max_keys: int | None,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    align: str,
    scale: float | None,
    softcap: float | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> AttentionInputs:
    """See :func:`attention`, whose errors these are."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(OP, name, tensor)
    check_floating(OP, "query", query)
    for name, tensor in (("key", key), ("value", value)):
        check_same(OP, name, tensor, "query", query)
    if query_offsets is None and key_offsets is None:
        if max_queries is not None or max_keys is not None:
            raise ValueError(f"{OP}: max_queries and max_keys go with offsets, got none")
        _check_padded(query, key, value)
        B, max_queries, max_keys = query.size(0), query.size(2), key.size(2)
        for name, lengths, size in (
            ("query_lengths", query_lengths, max_queries),
            ("key_lengths", key_lengths, max_keys),
        ):
            if lengths is not None:
                _check_lengths(name, lengths, B, size, query)
    else:
        if query_offsets is None or key_offsets is None:
            raise ValueError(f"{OP}: query_offsets and key_offsets go together, got one of them")
        if query_lengths is not None or key_lengths is not None:
            raise ValueError(f"{OP}: offsets already say the lengths: give no lengths with them")
        _check_packed(query, key, value)
        B = query_offsets.size(0) - 1 if query_offsets.dim() == 1 else 0
        max_queries = _check_offsets("query_offsets", query_offsets, B, query, max_queries)
        max_keys = _check_offsets("key_offsets", key_offsets, B, key, max_keys)
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    H = query.size(1)
    shape = (B, H, max_queries, max_keys)
    if mask is not None:
        check_tensor(OP, "mask", mask)
        check_dtype(OP, "mask", mask, (torch.bool,))
        check_device(OP, "mask", mask, "query", query)
        check_broadcastable(OP, "mask", mask, _PAIRS, shape)
    if bias is not None:
        check_tensor(OP, "bias", bias)
        check_dtype(OP, "bias", bias, (query.dtype, torch.float32))
        check_device(OP, "bias", bias, "query", query)
        check_broadcastable(OP, "bias", bias, _PAIRS, shape)
    if block_mask is not None:
        _check_block_mask(block_mask, shape, query)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, B, H, query)
    if align not in _ALIGNMENTS:
        raise ValueError(f"{OP}: align must be one of {', '.join(_ALIGNMENTS)}, got {align!r}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{OP}: softcap must be positive and finite, got {softcap}")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{OP}: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p must be in [0, 1), got {dropout_p}")
    check_seed(OP, seed, "query", query)
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(query.device)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0
    left, right = window_bounds(is_causal, window)
    return AttentionInputs(
        query,
        key,
        value,
        mask,
        bias,
        alibi_slopes,
        query_lengths,
        key_lengths,
        query_offsets,
        key_offsets,
        [] if block_mask is None else block_mask.tensors(),
        seed,
        left,
        right,
        align == "lower_right",
        float(scale),
        0.0 if softcap is None else float(softcap),
        _ACTIVATIONS[activation],
        float(dropout_p),
        max_queries,
        max_keys,
    )


def _check_padded(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_rank(OP, "query", query, "[B, H, T, D]")
    B, H, _, D = query.shape
    if key.dim() != 4 or key.size(0) != B or not _divides(key.size(1), H) or key.size(3) != D:
        raise ValueError(
            f"{OP}: key must have shape [B, Hk, S, D] with B = {B}, Hk a divisor of {H}, D = {D} "
            f"(from query), got {list(key.shape)}"
        )
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{OP}: value must have shape [B, Hk, S, Dv] with B = {B}, Hk = {key.size(1)}, "
            f"S = {key.size(2)} (from key), got {list(value.shape)}"
        )


def _check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_rank(OP, "query", query, "[N, H, D]")
    _, H, D = query.shape
    if key.dim() != 3 or not _divides(key.size(1), H) or key.size(2) != D:
        raise ValueError(
            f"{OP}: key must have shape [M, Hk, D] with Hk a divisor of {H}, D = {D} (from "
            f"query), got {list(key.shape)}"
        )
    if value.dim() != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{OP}: value must have shape [M, Hk, Dv] with M = {key.size(0)}, "
            f"Hk = {key.size(1)} (from key), got {list(value.shape)}"
        )


def _divides(part: int, whole: int) -> bool:
    return whole % part == 0 if part > 0 else part == whole


def _check_lengths(name: str, lengths: Tensor, B: int, size: int, query: Tensor) -> None:
    check_tensor(OP, name, lengths)
    check_dtype(OP, name, lengths, INTEGERS)
    check_device(OP, name, lengths, "query", query)
    if lengths.dim() != 1 or lengths.size(0) != B:
        raise ValueError(
            f"{OP}: {name} must have shape [B] with B = {B} (from query), got {list(lengths.shape)}"
        )
    if _readable(lengths) and B > 0:
        least, most = (int(x) for x in lengths.aminmax())
        if least < 0 or most > size:
            raise ValueError(
                f"{OP}: {name} must lie within 0 and {size}, got {least if least < 0 else most}"
            )


def _check_offsets(name: str, offsets: Tensor, B: int, rows: Tensor, most: int | None) -> int:
    """The length of the longest sequence, where it is not given."""
    check_tensor(OP, name, offsets)
    check_dtype(OP, name, offsets, INTEGERS)
    check_device(OP, name, offsets, "query", rows)
    if offsets.dim() != 1 or offsets.size(0) != B + 1 or B < 0:
        raise ValueError(
            f"{OP}: {name} must have shape [B + 1], that of query_offsets, got "
            f"{list(offsets.shape)}"
        )
    if _readable(offsets):
        ends = offsets.tolist()
        if ends[0] < 0 or ends[-1] > rows.size(0) or ends != sorted(ends):
            raise ValueError(
                f"{OP}: {name} must ascend within 0 and {rows.size(0)} rows, got {ends}"
            )
    if most is None:
        return int(offsets.diff().max()) if B > 0 else 0
    if most < 0:
        raise ValueError(f"{OP}: max_queries and max_keys must not be negative, got {most}")
    return most


def _readable(tensor: Tensor) -> bool:
    """Reading the values costs next to nothing, and does not break a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_block_mask(mask: object, shape: tuple[int, int, int, int], query: Tensor) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"{OP}: block_mask must be a BlockMask, got {type(mask).__name__}")
    B, H, T, S = shape
    b, h = mask.tiles.shape[:2]
    if b not in (1, B) or h not in (1, H) or mask.shape != (T, S):
        raise ValueError(
            f"{OP}: block_mask must be broadcastable to [B, H, T, S] = {list(shape)}, got "
            f"{[b, h, *mask.shape]}"
        )
    check_device(OP, "block_mask", mask.tiles, "query", query)


def _check_slopes(slopes: Tensor, B: int, H: int, query: Tensor) -> None:
    check_tensor(OP, "alibi_slopes", slopes)
    wide = (torch.float64,) if query.dtype == torch.float64 else ()
    check_dtype(OP, "alibi_slopes", slopes, (torch.float32, *wide))
    check_device(OP, "alibi_slopes", slopes, "query", query)
    if tuple(slopes.shape) not in ((H,), (B, H)):
        raise ValueError(
            f"{OP}: alibi_slopes must have shape [H] = {[H]} or [B, H] = {[B, H]} (from query), "
            f"got {list(slopes.shape)}"
        )
    if slopes.requires_grad:
        raise ValueError(f"{OP}: alibi_slopes must not require a gradient: they have none")
