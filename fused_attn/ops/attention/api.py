"""The public function ``attention``."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._backend import describe_tensor, resolve
from . import cpu, cuda, reference, triton
from .arguments import OP, attention_inputs
from .block_mask import BlockMask
from .contract import attention_fused
from .nested import renest, unnest
from .reference import attention_reference
from .weights import attention_weights

BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    block_mask: BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    max_queries: int | None = None,
    max_keys: int | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: Literal["upper_left", "lower_right"] = "upper_left",
    scale: float | None = None,
    softcap: float | None = None,
    activation: Literal["softmax", "sigmoid", "relu"] = "softmax",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool | Literal["mean"] = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot-product attention with masks that combine freely; differentiable.

        logits = scale * query @ key^T
        logits = softcap * tanh(logits / softcap)            where a soft-cap is given
        logits = logits + bias - slope * |distance|
        out = dropout(softmax(logits)) @ value

    A pair (t, s) takes part when every restriction given allows it: ``t < query_lengths``,
    ``s < key_lengths``, ``is_causal``, ``window``, ``block_mask``, and ``mask`` where True takes
    part (SDPA's polarity). Causality, window and ALiBi measure the distance of key s from the
    diagonal, s = t, or s = t + key length - query length where ``align`` is ``"lower_right"``.

    A query with nothing to attend to gives output 0, gradient 0 and lse -inf. NaN or Inf behind
    a length, or behind a mask that is the same for all queries, reaches neither output nor
    gradient. Computes in fp32 and rounds once at the end. Deterministic.

    Three layouts. Padded tensors; packed ones, ``[N, H, D]``, in which sequence b has the rows
    from ``query_offsets[b]`` to ``query_offsets[b + 1]``; and nested jagged tensors
    ``[B, H, j, D]``, whose result is nested likewise. All give the same numbers, dropout
    included; the last two compute nothing for padding.

    Args:
        query: ``[B, H, T, D]``, fp32, fp16 or bf16 (fp64: reference only), any strides.
        key: ``[B, Hk, S, D]``; query head h uses head h // (H / Hk).
        value: ``[B, Hk, S, Dv]``.
        mask: bool, broadcastable to ``[B, H, T, S]``.
        block_mask: Tiles of a mask, made once; see :class:`BlockMask`.
        bias: Added to the logits; broadcastable to ``[B, H, T, S]``, dtype of ``query`` or fp32.
            Its gradient has its own shape.
        alibi_slopes: ``[H]`` or ``[B, H]`` fp32, without gradient.
        query_lengths: ``[B]`` int32 or int64, at most T.
        key_lengths: ``[B]`` int32 or int64, at most S. Lengths on a GPU are not checked: those
            above S count as S.
        query_offsets: ``[B + 1]`` int32 or int64, ascending from 0: the layout is packed.
        key_offsets: ``[B + 1]``, likewise.
        max_queries: Length of the longest packed sequence of queries, T in every shape here.
            Default: read from the offsets, which waits for the device.
        max_keys: Likewise, of keys; S.
        is_causal: A query sees no key to the right of the diagonal.
        window: ``(left, right)``: how far to the left and right of the diagonal a query sees;
            None: without limit.
        align: Where the diagonal is: it begins in the upper left corner, as in SDPA, or ends in
            the lower right one, as for new queries behind a cache. Lengths are taken into account.
        scale: Multiplies the products. Default ``1 / sqrt(D)``.
        softcap: Positive: bounds the scaled products to (-softcap, softcap).
        activation: ``"softmax"``; ``"sigmoid"`` or ``"relu"`` turn each logit into a weight by
            itself.
        dropout_p: Probability that a weight is dropped, in [0, 1).
        seed: ``[1]`` int64 on the query's device; default: drawn from PyTorch's generator.
        return_lse: Return the log-sum-exp of each row's logits as well; differentiable.
        return_weights: Return the weights before dropout as well, computed in a second pass that
            takes T x S memory; ``"mean"``: averaged over the heads. Packed and nested batches
            give padded weights.
        backend: ``cpu``, ``cuda``, ``triton`` or ``reference``; default: the first that can.

    Returns:
        ``[B, H, T, Dv]`` in ``query.dtype``, packed ``[N, H, Dv]``. Then, where asked for, the
        lse, ``[B, H, T]`` fp32, natural logarithm, packed ``[N, H]``; then the weights,
        ``[B, H, T, S]`` or ``[B, T, S]``.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or a number is out of range.
        NotImplementedError: The named backend cannot run this call.

    Reference: Vaswani et al., 2017. https://arxiv.org/abs/1706.03762; online softmax: Dao,
    2023. https://arxiv.org/abs/2307.08691; ALiBi: Press et al., 2022.
    https://arxiv.org/abs/2108.12409
    """
    nested = query if isinstance(query, Tensor) and query.is_nested else None
    if nested is not None:
        offsets = (query_lengths, key_lengths, query_offsets, key_offsets)
        query, key, value, query_offsets, key_offsets, max_queries, max_keys = unnest(
            query, key, value, offsets
        )
    if return_lse and activation != "softmax":
        raise ValueError(f"{OP}: return_lse needs the activation 'softmax', got {activation!r}")
    if not (isinstance(return_weights, bool) or return_weights == "mean"):
        raise ValueError(f"{OP}: return_weights must be a bool or 'mean', got {return_weights!r}")
    inputs = attention_inputs(
        query,
        key,
        value,
        mask=mask,
        block_mask=block_mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_offsets=query_offsets,
        key_offsets=key_offsets,
        max_queries=max_queries,
        max_keys=max_keys,
        is_causal=is_causal,
        window=window,
        align=align,
        scale=scale,
        softcap=softcap,
        activation=activation,
        dropout_p=dropout_p,
        seed=seed,
    )
    name = resolve(
        OP,
        BACKENDS,
        backend,
        query,
        lambda module: module.unsupported_reasons(inputs),
        lambda: describe_tensor("query", query),
    )
    if name == "reference":
        output, lse = attention_reference(inputs)
    else:
        output, lse = attention_fused(inputs, name)
    results = [output[0].transpose(0, 1) if inputs.is_packed else output]
    if nested is not None:
        results[0] = renest(results[0], nested)
    if return_lse:
        results.append(lse[0].transpose(0, 1) if inputs.is_packed else lse)
    if return_weights:
        results.append(attention_weights(inputs, lse, mean=return_weights == "mean"))
    return results[0] if len(results) == 1 else tuple(results)
