"""The public functions ``additive_attention`` and ``additive_scores``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import (
    INTEGERS,
    check_broadcastable,
    check_device,
    check_dtype,
    check_floating,
    check_same,
    check_tensor,
)
from . import cpu, reference, triton
from .contract import AdditiveInputs, additive_attention_fused
from .reference import additive_attention_reference

_OP = "additive_attention"
BACKENDS = {"cpu": cpu, "triton": triton, "reference": reference}


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose scores are a small network on pairs of a query and a key; differentiable.

        scores = score_weight . tanh(query + key + features @ feature_weight)
        weights = softmax(scores)
        context = weights @ value

    Query and key are already projected, by the matrices that the paper calls W and U: a projected
    key is made once for all queries. Features are known of a pair, such as the previous weights
    around a key, convolved, or how much of it was attended to before.

    A pair (t, s) takes part when ``s < key_lengths`` and ``mask`` allow it. A query with nothing to
    attend to has weights 0, context 0 and gradients 0. NaN or Inf in features behind a length or a
    mask, and in keys and values behind a length or a mask that is the same for all queries, reaches
    neither an output nor a gradient. Computes in fp32 and rounds once at the end. The ``[B, H, T,
    S, E]`` tangents are never stored: the backward makes them again from the inputs. Deterministic,
    the gradients too, for any number of threads.

    The head dimension may be left out everywhere, of the results too.

    Args:
        query: ``[B, H, T, E]`` or ``[B, T, E]``, fp32, fp16 or bf16 (fp64: reference only), any
            strides, as of all tensors.
        key: ``[B, H, S, E]`` or ``[B, S, E]``, dtype of ``query``.
        value: ``[B, H, S, D]`` or ``[B, S, D]``, dtype of ``query``.
        score_weight: ``[H, E]`` or ``[E]``, dtype of ``query`` or fp32.
        features: ``[B, H, T, S, F]`` or ``[B, T, S, F]``, dtype of ``query``.
        feature_weight: ``[H, F, E]`` or ``[F, E]``, dtype of ``query`` or fp32; goes with
            ``features``.
        mask: bool, True takes part; broadcastable to ``[B, H, T, S]``, without heads to
            ``[B, T, S]``.
        key_lengths: ``[B]`` int32 or int64, at most S; 0 is a source without keys. Lengths on a GPU
            are not checked: those above S count as S.
        backend: ``cpu``, ``triton`` or ``reference``; default: the first that can.

    Returns:
        The context, ``[B, H, T, D]`` in ``query.dtype``, and the weights, ``[B, H, T, S]`` fp32
        (fp64 for fp64 inputs); both are differentiable.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or a length is out of range.
        NotImplementedError: The named backend cannot run this call.

    Reference: Bahdanau et al., 2014. https://arxiv.org/abs/1409.0473; features of the previous
    weights: Chorowski et al., 2015. https://arxiv.org/abs/1506.07503; coverage: See et al., 2017.
    https://arxiv.org/abs/1704.04368
    """
    check_tensor(_OP, "value", value)
    return _run(
        query, key, value, score_weight, features, feature_weight, mask, key_lengths, backend
    )


def additive_scores(
    query: Tensor,
    key: Tensor,
    score_weight: Tensor,
    *,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores of :func:`additive_attention` before the softmax; differentiable.

        scores = score_weight . tanh(query + key + features @ feature_weight)

    For attention with another normaliser, such as a monotonic one. The score of a pair that takes
    no part is -inf, and a gradient into it is ignored. Otherwise as :func:`additive_attention`.

    Args:
        query: ``[B, H, T, E]`` or ``[B, T, E]``, fp32, fp16 or bf16 (fp64: reference only).
        key: ``[B, H, S, E]`` or ``[B, S, E]``.
        score_weight: ``[H, E]`` or ``[E]``.
        features: ``[B, H, T, S, F]`` or ``[B, T, S, F]``.
        feature_weight: ``[H, F, E]`` or ``[F, E]``.
        mask: bool, True takes part; broadcastable to ``[B, H, T, S]`` or ``[B, T, S]``.
        key_lengths: ``[B]`` int32 or int64, at most S.
        backend: ``cpu``, ``triton`` or ``reference``; default: the first that can.

    Returns:
        ``[B, H, T, S]`` or ``[B, T, S]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or a length is out of range.
        NotImplementedError: The named backend cannot run this call.

    Reference: Bahdanau et al., 2014. https://arxiv.org/abs/1409.0473
    """
    _, scores = _run(
        query, key, None, score_weight, features, feature_weight, mask, key_lengths, backend
    )
    return scores


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    score_weight: Tensor,
    features: Tensor | None,
    feature_weight: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    inputs = AdditiveInputs(
        query, key, value, score_weight, features, feature_weight, mask, key_lengths
    )
    _check(inputs)
    has_heads = query.dim() == 4
    if not has_heads:
        inputs = _with_one_head(inputs)
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        query,
        lambda module: module.unsupported_reasons(inputs),
        lambda: describe_tensor("query", query),
    )
    if name == "reference":
        context, weights = additive_attention_reference(inputs)
    else:
        context, weights = additive_attention_fused(inputs, name)
    if not has_heads:
        return context if value is None else context.squeeze(1), weights.squeeze(1)
    return context, weights


def _with_one_head(inputs: AdditiveInputs) -> AdditiveInputs:
    def second(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unsqueeze(1)

    def first(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unsqueeze(0)

    mask = inputs.mask
    return inputs._replace(
        query=inputs.query.unsqueeze(1),
        key=inputs.key.unsqueeze(1),
        value=second(inputs.value),
        score_weight=inputs.score_weight.unsqueeze(0),
        features=second(inputs.features),
        feature_weight=first(inputs.feature_weight),
        # A mask of fewer dimensions is broadcast to the heads as it is.
        mask=mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask,
    )


def _check(inputs: AdditiveInputs) -> None:
    query, key, value, score_weight, features, feature_weight, mask, key_lengths = inputs
    check_tensor(_OP, "query", query)
    check_floating(_OP, "query", query)
    if query.dim() not in (3, 4) or query.size(-1) == 0:
        raise ValueError(
            f"{_OP}: query must have shape [B, H, T, E] or [B, T, E] with E >= 1, got "
            f"{list(query.shape)}"
        )
    heads = "H, " if query.dim() == 4 else ""
    *outer, T, E = query.shape  # outer: B, H or B
    B, *H = outer
    from_query = f"B = {B}, {f'H = {H[0]}, ' if H else ''}E = {E} (from query)"
    check_tensor(_OP, "key", key)
    check_same(_OP, "key", key, "query", query)
    if key.dim() != query.dim() or [*key.shape[:-2], key.size(-1)] != [*outer, E]:
        raise ValueError(
            f"{_OP}: key must have shape [B, {heads}S, E] with {from_query}, got {list(key.shape)}"
        )
    S = key.size(-2)
    if value is not None:
        check_same(_OP, "value", value, "query", query)
        if value.dim() != query.dim() or value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"{_OP}: value must have shape [B, {heads}S, D] with the first sizes of key, "
                f"{list(key.shape[:-1])}, got {list(value.shape)}"
            )
    _check_weight("score_weight", score_weight, query, f"[{heads}E]", (*H, E))
    if (features is None) != (feature_weight is None):
        raise ValueError(f"{_OP}: features and feature_weight go together, got one of them")
    if features is not None and feature_weight is not None:
        check_tensor(_OP, "features", features)
        check_same(_OP, "features", features, "query", query)
        if features.dim() != query.dim() + 1 or [*features.shape[:-1]] != [*outer, T, S]:
            raise ValueError(
                f"{_OP}: features must have shape [B, {heads}T, S, F] with the sizes of query and "
                f"key, {[*outer, T, S]}, got {list(features.shape)}"
            )
        sizes = (*H, features.size(-1), E)
        _check_weight("feature_weight", feature_weight, query, f"[{heads}F, E]", sizes)
    if mask is not None:
        check_tensor(_OP, "mask", mask)
        check_dtype(_OP, "mask", mask, (torch.bool,))
        check_device(_OP, "mask", mask, "query", query)
        check_broadcastable(_OP, "mask", mask, f"[B, {heads}T, S]", (*outer, T, S))
    if key_lengths is not None:
        _check_lengths(key_lengths, B, S, query)


def _check_weight(
    name: str, weight: Tensor, query: Tensor, layout: str, sizes: tuple[int, ...]
) -> None:
    check_tensor(_OP, name, weight)
    check_dtype(_OP, name, weight, (query.dtype, torch.float32))
    check_device(_OP, name, weight, "query", query)
    if tuple(weight.shape) != sizes:
        raise ValueError(
            f"{_OP}: {name} must have shape {layout} = {list(sizes)}, got {list(weight.shape)}"
        )


def _check_lengths(lengths: Tensor, B: int, S: int, query: Tensor) -> None:
    check_tensor(_OP, "key_lengths", lengths)
    check_dtype(_OP, "key_lengths", lengths, INTEGERS)
    check_device(_OP, "key_lengths", lengths, "query", query)
    if lengths.dim() != 1 or lengths.size(0) != B:
        raise ValueError(
            f"{_OP}: key_lengths must have shape [B] with B = {B} (from query), got "
            f"{list(lengths.shape)}"
        )
    # Reading the values costs next to nothing here, and would break a graph that is compiled.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and B > 0:
        least, most = (int(x) for x in lengths.aminmax())
        if least < 0 or most > S:
            raise ValueError(
                f"{_OP}: key_lengths must lie within 0 and {S}, got {least if least < 0 else most}"
            )
