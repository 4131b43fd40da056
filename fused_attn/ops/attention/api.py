"""The public function ``attention``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_rank, check_same, check_tensor
from .._philox import draw_seed
from . import cpu, reference
from .contract import attention_fused
from .reference import attention_reference

_OP = "attention"
BACKENDS = {"cpu": cpu, "reference": reference}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with masks that combine freely; differentiable.

        out = dropout(softmax(scale * query @ key^T + bias)) @ value

    A pair (t, s) takes part when every mask given allows it: ``is_causal`` (s <= t, aligned to
    the upper left as in SDPA), ``t < query_lengths``, ``s < key_lengths``, and ``mask`` where
    True takes part (SDPA's polarity). A query with nothing to attend to gives output 0,
    gradient 0 and lse -inf. NaN or Inf behind a length, or behind a mask that is the same for
    all queries, reaches neither output nor gradient. Computes in fp32 and rounds once at the
    end. Deterministic.

    Args:
        query: ``[B, H, T, D]``, fp32, fp16 or bf16 (fp64: reference only), any strides.
        key: ``[B, H, S, D]``.
        value: ``[B, H, S, Dv]``.
        mask: bool, broadcastable to ``[B, H, T, S]``.
        bias: Added to the scaled logits; broadcastable to ``[B, H, T, S]``, dtype of ``query``
            or fp32. Its gradient has its own shape.
        query_lengths: ``[B]`` int32 or int64; lengths above T count as T.
        key_lengths: ``[B]`` int32 or int64; lengths above S count as S.
        is_causal: Query t looks at keys 0..t.
        scale: Multiplies the logits. Default ``1 / sqrt(D)``.
        dropout_p: Probability that a weight is dropped, in [0, 1).
        seed: ``[1]`` int64 on the query's device; default: drawn from PyTorch's generator.
        return_lse: Return the log-sum-exp of each row's logits as well (not differentiable).
        backend: ``cpu``, ``triton``, ``cuda`` or ``reference``; default: the first that can.

    Returns:
        ``[B, H, T, Dv]`` in ``query.dtype``; with ``return_lse`` also ``[B, H, T]`` fp32,
        natural logarithm.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or a number is out of range.
        NotImplementedError: The named backend cannot run this call.

    Reference: Vaswani et al., 2017. https://arxiv.org/abs/1706.03762; online softmax: Dao,
    2023. https://arxiv.org/abs/2307.08691
    """
    _check(query, key, value, mask, bias, query_lengths, key_lengths, dropout_p, seed)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(query.device)
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        query.device.type,
        lambda module: module.unsupported_reasons(
            query, key, value, mask=mask, bias=bias, dropout_p=dropout_p
        ),
        lambda: describe_tensor("query", query),
    )
    if name == "reference":
        output, lse = attention_reference(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
    else:
        output, lse = attention_fused(
            query,
            key,
            value,
            mask,
            bias,
            query_lengths,
            key_lengths,
            is_causal,
            float(scale),
            name,
        )
    return (output, lse.detach()) if return_lse else output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(_OP, name, tensor)
    check_rank(_OP, "query", query, "[B, H, T, D]")
    check_floating(_OP, "query", query)
    B, H, T, D = query.shape
    for name, tensor in (("key", key), ("value", value)):
        check_same(_OP, name, tensor, "query", query)
    if key.dim() != 4 or key.size(0) != B or key.size(1) != H or key.size(3) != D:
        raise ValueError(
            f"{_OP}: key must have shape [B, H, S, D] with B = {B}, H = {H}, D = {D} (from "
            f"query), got {list(key.shape)}"
        )
    S = key.size(2)
    if value.dim() != 4 or value.size(0) != B or value.size(1) != H or value.size(2) != S:
        raise ValueError(
            f"{_OP}: value must have shape [B, H, S, Dv] with B = {B}, H = {H} (from query), "
            f"S = {S} (from key), got {list(value.shape)}"
        )
    if mask is not None:
        check_tensor(_OP, "mask", mask)
        check_dtype(_OP, "mask", mask, (torch.bool,))
        check_device(_OP, "mask", mask, "query", query)
        _check_broadcastable("mask", mask, (B, H, T, S))
    if bias is not None:
        check_tensor(_OP, "bias", bias)
        check_dtype(_OP, "bias", bias, (query.dtype, torch.float32))
        check_device(_OP, "bias", bias, "query", query)
        _check_broadcastable("bias", bias, (B, H, T, S))
    for name, lengths in (("query_lengths", query_lengths), ("key_lengths", key_lengths)):
        if lengths is not None:
            check_tensor(_OP, name, lengths)
            check_dtype(_OP, name, lengths, (torch.int32, torch.int64))
            check_device(_OP, name, lengths, "query", query)
            if lengths.dim() != 1 or lengths.size(0) != B:
                raise ValueError(
                    f"{_OP}: {name} must have shape [B] with B = {B} (from query), got "
                    f"{list(lengths.shape)}"
                )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None:
        check_tensor(_OP, "seed", seed)
        check_dtype(_OP, "seed", seed, (torch.int64,))
        if seed.dim() != 1 or seed.size(0) != 1:
            raise ValueError(f"{_OP}: seed must have shape [1], got {list(seed.shape)}")


def _check_broadcastable(name: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> None:
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != 4 or any(
        size != 1 and size != full for size, full in zip(sizes, shape, strict=True)
    ):
        raise ValueError(
            f"{_OP}: {name} must be broadcastable to [B, H, T, S] = {list(shape)}, got "
            f"{list(tensor.shape)}"
        )
