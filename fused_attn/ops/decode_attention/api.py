"""The public function ``decode_attention``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import (
    INTEGERS,
    check_broadcastable,
    check_device,
    check_dtype,
    check_floating,
    check_rank,
    check_same,
    check_tensor,
)
from . import cpu, cuda, reference, triton
from .contract import decode_attention_fused
from .reference import decode_attention_reference

_OP = "decode_attention"
BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    ancestry: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one or a few new queries to a key-value cache; for generation, no gradient.

        logits = scale * query @ key^T, then softcap * tanh(logits / softcap)
        out = softmax(logits - alibi_slope * |position - s|) @ value

    The cache has C rows and the queries R, in one of three forms:

    - R = C: each row of queries has a row of the cache.
    - R = C * K: K rows of queries after one another (beams) share a row, which is read once.
    - ``ancestry`` ``[B, K, S]`` with R = C = B * K: position s of beam k of sentence b is read
      from row ``b * K + ancestry[b, k, s]``. Beams that change places copy the small table and
      not the cache.

    The T queries of a row are the last of its keys: query t is at position
    ``key_length - T + t``. A pair (t, s) takes part when s < key_length, s <= position if
    ``is_causal``, s >= position - ``window``, and where ``mask`` is True. A query with nothing
    to attend to gives output 0 and lse -inf. NaN or Inf reaches nothing from where no query
    that shares the key may look: behind the lengths, before the window, and in rows or positions
    that the ancestry does not lead to. Computes in fp32 and rounds once at the end.
    Deterministic; a row's result does not depend on the other rows, but for the last bits on a
    GPU.

    Args:
        query: ``[R, H, T, D]``, fp32, fp16 or bf16 (fp64: reference only), any strides; made
            for small T.
        key: ``[C, Hk, S, D]``; Hk divides H, and head h reads key head ``h // (H / Hk)``.
            Copied unless the last dimension is contiguous.
        value: ``[C, Hk, S, Dv]``, likewise.
        key_lengths: ``[R]`` or ``[C]`` int32 or int64: keys that exist, the T new ones
            included; above S counts as S. Default: all S.
        ancestry: ``[B, K, S]`` int32 or int64 in 0..K-1; only where keys exist are entries
            looked at.
        mask: bool, broadcastable to ``[R, H, T, S]``.
        alibi_slopes: ``[H]`` fp32 (fp64: with an fp64 query only).
        is_causal: No query looks behind its position. Changes nothing where T = 1; cross-attention
            passes False.
        window: Keys before its own position that a query looks at, at least 0. Default: all.
        scale: Multiplies the logits. Default ``1 / sqrt(D)``.
        softcap: Bounds the logits, above 0. Default: no bound.
        return_lse: Return the log-sum-exp of each row's logits as well.
        backend: ``cpu``, ``triton``, ``cuda`` or ``reference``; default: the first that can.

    Returns:
        ``[R, H, T, Dv]`` in ``query.dtype``; with ``return_lse`` also ``[R, H, T]`` fp32,
        natural logarithm.

    Raises:
        TypeError: An argument is no tensor, or of a wrong type or dtype.
        ValueError: Shapes or devices disagree, a number is out of range, or a gradient is asked
            for.
        NotImplementedError: The named backend cannot run this call.

    Reference: Shazeer, 2019. https://arxiv.org/abs/1911.02150; partial softmax over parts of
    the keys: Dao et al., 2023. https://pytorch.org/blog/flash-decoding
    """
    _check(query, key, value, key_lengths, ancestry, mask, alibi_slopes, window, softcap)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        query,
        lambda module: module.unsupported_reasons(query, value),
        lambda: describe_tensor("query", query),
    )
    if name == "reference":
        with torch.no_grad():
            output, lse = decode_attention_reference(
                query,
                key,
                value,
                key_lengths=key_lengths,
                ancestry=ancestry,
                mask=mask,
                alibi_slopes=alibi_slopes,
                is_causal=is_causal,
                window=window,
                scale=scale,
                softcap=softcap,
            )
    else:
        output, lse = decode_attention_fused(
            query,
            key,
            value,
            key_lengths,
            ancestry,
            mask,
            alibi_slopes,
            is_causal,
            -1 if window is None else window,
            float(scale),
            0.0 if softcap is None else float(softcap),
            name,
        )
    return (output, lse) if return_lse else output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    ancestry: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(_OP, name, tensor)
    check_rank(_OP, "query", query, "[R, H, T, D]")
    check_floating(_OP, "query", query)
    R, H, T, D = query.shape
    for name, tensor in (("key", key), ("value", value)):
        check_same(_OP, name, tensor, "query", query)
    if key.dim() != 4 or key.size(3) != D:
        raise ValueError(
            f"{_OP}: key must have shape [C, Hk, S, D] with D = {D} (from query), got "
            f"{list(key.shape)}"
        )
    C, Hk, S, _ = key.shape
    if value.dim() != 4 or value.size(0) != C or value.size(1) != Hk or value.size(2) != S:
        raise ValueError(
            f"{_OP}: value must have shape [C, Hk, S, Dv] with C = {C}, Hk = {Hk}, S = {S} (from "
            f"key), got {list(value.shape)}"
        )
    if Hk == 0 or H % Hk != 0:
        raise ValueError(
            f"{_OP}: query must have a multiple of Hk = {Hk} heads (from key), got {H}"
        )
    if ancestry is not None:
        _check_ancestry(ancestry, query, C, S)
    elif R % C != 0 if C > 0 else R > 0:
        raise ValueError(f"{_OP}: query must have a multiple of C = {C} rows (from key), got {R}")
    if key_lengths is not None:
        check_tensor(_OP, "key_lengths", key_lengths)
        check_dtype(_OP, "key_lengths", key_lengths, INTEGERS)
        check_device(_OP, "key_lengths", key_lengths, "query", query)
        if key_lengths.dim() != 1 or (key_lengths.size(0) != R and key_lengths.size(0) != C):
            raise ValueError(
                f"{_OP}: key_lengths must have shape [R] or [C] with R = {R} (from query), C = "
                f"{C} (from key), got {list(key_lengths.shape)}"
            )
    if mask is not None:
        check_tensor(_OP, "mask", mask)
        check_dtype(_OP, "mask", mask, (torch.bool,))
        check_device(_OP, "mask", mask, "query", query)
        check_broadcastable(_OP, "mask", mask, "[R, H, T, S]", (R, H, T, S))
    if alibi_slopes is not None:
        check_tensor(_OP, "alibi_slopes", alibi_slopes)
        wide = (torch.float64,) if query.dtype == torch.float64 else ()
        check_dtype(_OP, "alibi_slopes", alibi_slopes, (torch.float32, *wide))
        check_device(_OP, "alibi_slopes", alibi_slopes, "query", query)
        if alibi_slopes.dim() != 1 or alibi_slopes.size(0) != H:
            raise ValueError(
                f"{_OP}: alibi_slopes must have shape [H] with H = {H} (from query), got "
                f"{list(alibi_slopes.shape)}"
            )
    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool):
            raise TypeError(f"{_OP}: window must be an int, got {type(window).__name__}")
        if window < 0:
            raise ValueError(f"{_OP}: window must be at least 0, got {window}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"{_OP}: softcap must be above 0, got {softcap}")
    if torch.is_grad_enabled():
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.requires_grad:
                raise ValueError(
                    f"{_OP}: {name} must not require a gradient, which only `attention` has; "
                    "call it or use torch.no_grad(), got requires_grad=True"
                )


def _check_ancestry(ancestry: Tensor, query: Tensor, C: int, S: int) -> None:
    check_tensor(_OP, "ancestry", ancestry)
    check_dtype(_OP, "ancestry", ancestry, INTEGERS)
    check_device(_OP, "ancestry", ancestry, "query", query)
    R = query.size(0)
    if R != C:
        raise ValueError(
            f"{_OP}: query must have C = {C} rows (from key) where there is an ancestry, got {R}"
        )
    if ancestry.dim() != 3 or ancestry.size(2) != S or ancestry.size(0) * ancestry.size(1) != R:
        raise ValueError(
            f"{_OP}: ancestry must have shape [B, K, S] with B * K = {R} (from query), S = {S} "
            f"(from key), got {list(ancestry.shape)}"
        )
