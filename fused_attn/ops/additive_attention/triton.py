"""The ``triton`` backend: launchers. The kernels are in ``triton_kernels.py``, loaded on use."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import FLOATING
from .._triton import (
    ceil_div,
    contiguous,
    device_guard,
    multiprocessor_count,
    next_power_of_2,
    reduce_partials,
    target,
)
from .contract import AdditiveInputs, Gradients, empty_gradients, empty_outputs

# Programs of one warp that a multiprocessor should have to hide the time that arithmetic takes.
_PROGRAMS_PER_MULTIPROCESSOR = 16
# Queries for which exponentials of rows, which pairs share, do not pay.
_FEW_QUERIES = 8
# Slices of the gradient of the query at most, each as large as it is, in fp32.
_MAX_SPLITS = 32
# Tiles of matrix products: queries, and bytes of keys and of columns of values.
_PRODUCT_ROWS = 16
_PRODUCT_BYTES = 128
# Registers of a thread: of the scores, and of everything else.
_SCORES_REGISTERS = 216
_REGISTERS = 255
# Elements of a program that sums slices.
_SUM_ELEMENTS = 1024


class Tile(NamedTuple):
    """Pairs of a program: queries, keys, components."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_E: int


class Pairs(NamedTuple):
    """What kernels that make tangents are told of the inputs."""

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    F: int
    flags: dict[str, Any]


def unsupported_reasons(inputs: AdditiveInputs) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if inputs.query.dtype not in FLOATING:
        reasons.append(f"dtype {inputs.query.dtype}: float32, float16 or bfloat16 only")
    return reasons


def forward(inputs: AdditiveInputs) -> tuple[Tensor, Tensor]:
    """Context and weights; without values nothing and the scores."""
    from .triton_kernels import additive_context_kernel, additive_scores_kernel

    context, weights = empty_outputs(inputs)
    B, H, T, E = inputs.query.shape
    S, value = inputs.key.size(2), inputs.value
    if weights.numel() == 0:
        return context.zero_(), weights
    pairs = _pairs(inputs)
    tile = _score_tile(T, E, pairs.F)
    scores = weights if value is None else torch.empty_like(weights)
    with device_guard(weights):
        programs = B * H * ceil_div(T, tile.BLOCK_M) * ceil_div(S, tile.BLOCK_N)
        additive_scores_kernel[(programs,)](
            *pairs.tensors,
            scores,
            *pairs.strides,
            H,
            T,
            S,
            pairs.F,
            BY_PAIR=_by_pair(T, pairs.F),
            HAS_FEATURES=pairs.F > 0,
            **pairs.flags,
            **tile._asdict(),
            num_warps=1,
            **target().register_options(_SCORES_REGISTERS),
        )
        if value is not None:
            value = _contiguous_columns(value)
            products = _products(value, T)
            column_tiles, unit = _column_tiles(products), _unit(value)
            programs = B * H * ceil_div(T, products["BLOCK_M"]) * column_tiles
            additive_context_kernel[(programs,)](
                scores,
                value,
                weights,
                context,
                *_in_units(unit, value),
                H,
                T,
                S,
                STRIDE_UNIT=unit,
                COLUMN_TILES=column_tiles,
                **products,
            )
    return context, weights


def backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    inputs: AdditiveInputs,
    weights: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """Gradients of query, key, value, score_weight, features and feature_weight."""
    gradients = empty_gradients(inputs, needs)
    B, H, T, _ = inputs.query.shape
    if B * H * T * inputs.key.size(2) == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    grad_query, grad_key, grad_value, grad_score_weight, grad_features, grad_feature_weight = (
        gradients
    )
    with device_guard(inputs.query):
        if grad_context is not None:
            grad_context = _contiguous_columns(grad_context)
        if grad_value.numel() > 0:
            _value_gradient(grad_context, weights, grad_value)
        if all(gradient.numel() == 0 for gradient in gradients[:2] + gradients[3:]):
            return gradients
        if inputs.value is None:
            assert grad_weights is not None  # of the scores, the one output
            grad_scores = grad_weights
        else:
            grad_scores = _score_gradient(grad_context, grad_weights, inputs.value, weights)
        pair_gradients = (grad_query, grad_key, grad_score_weight, grad_feature_weight)
        if any(gradient.numel() > 0 for gradient in pair_gradients):
            _pair_gradients(inputs, grad_scores, *pair_gradients)
        if grad_features.numel() > 0:
            _feature_gradient(inputs, grad_scores, grad_features)
    return gradients


def _value_gradient(
    grad_context: Tensor | None, weights: Tensor | None, grad_value: Tensor
) -> None:
    from .triton_kernels import additive_value_gradient_kernel

    if grad_context is None:
        grad_value.zero_()
        return
    assert weights is not None  # a call with values has kept them
    B, H, T, S = weights.shape
    products = _products(grad_value)
    column_tiles, unit = _column_tiles(products), _unit(grad_context)
    programs = B * H * ceil_div(S, products["BLOCK_N"]) * column_tiles
    additive_value_gradient_kernel[(programs,)](
        weights.contiguous(),
        grad_context,
        grad_value,
        *_in_units(unit, grad_context),
        H,
        T,
        S,
        STRIDE_UNIT=unit,
        COLUMN_TILES=column_tiles,
        **products,
    )


def _score_gradient(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    value: Tensor,
    weights: Tensor | None,
) -> Tensor:
    from .triton_kernels import additive_score_gradient_kernel

    assert weights is not None  # a call with values has kept them
    B, H, T, S = weights.shape
    weights, value = weights.contiguous(), _contiguous_columns(value)
    grad_scores = torch.empty_like(weights)
    products = _products(value, T)
    unit = _unit(value) if grad_context is None else _unit(value, grad_context)
    additive_score_gradient_kernel[(B * H * ceil_div(T, products["BLOCK_M"]),)](
        weights,
        value,
        # What is absent is not read.
        value if grad_context is None else grad_context,
        weights if grad_weights is None else grad_weights,
        grad_scores,
        *_in_units(unit, value),
        *((0, 0, 0) if grad_context is None else _in_units(unit, grad_context)),
        *((0, 0, 0, 0) if grad_weights is None else grad_weights.stride()),
        H,
        T,
        S,
        value.size(3),
        HAS_CONTEXT=grad_context is not None and value.size(3) > 0,
        HAS_WEIGHTS=grad_weights is not None,
        STRIDE_UNIT=unit,
        **products,
    )
    return grad_scores


def _pair_gradients(
    inputs: AdditiveInputs,
    grad_scores: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_score_weight: Tensor,
    grad_feature_weight: Tensor,
) -> None:
    from .triton_kernels import additive_pair_gradient_kernel, additive_query_gradient_kernel

    B, H, T, E = inputs.query.shape
    S, pairs, tile = inputs.key.size(2), _pairs(inputs), _gradient_tile(T, E)
    slices = B * H * ceil_div(E, tile.BLOCK_E)
    splits, tiles_per_split = _split(
        ceil_div(S, tile.BLOCK_N), slices, multiprocessor_count(grad_scores)
    )

    def partial(gradient: Tensor, count: int) -> Tensor:
        size = (count, gradient.numel()) if gradient.numel() > 0 else (0, 0)
        return grad_scores.new_empty(size, dtype=torch.float32)

    query_sums = partial(grad_query, splits)
    weight_gradients = (grad_score_weight, grad_feature_weight)
    weight_sums = [partial(gradient, B * splits) for gradient in weight_gradients]
    additive_pair_gradient_kernel[(slices * splits,)](
        *pairs.tensors,
        grad_scores,
        query_sums,
        grad_key,
        *weight_sums,
        *pairs.strides,
        *grad_scores.stride(),
        H,
        T,
        S,
        pairs.F,
        splits,
        tiles_per_split,
        BY_PAIR=_by_pair(T, pairs.F),
        HAS_FEATURES=pairs.F > 0,
        **pairs.flags,
        NEED_QUERY=grad_query.numel() > 0,
        NEED_KEY=grad_key.numel() > 0,
        NEED_SCORE_WEIGHT=grad_score_weight.numel() > 0,
        NEED_FEATURE_WEIGHT=grad_feature_weight.numel() > 0,
        BLOCK_F=next_power_of_2(pairs.F),
        **tile._asdict(),
        num_warps=1,
        **target().register_options(_REGISTERS),
    )
    if grad_query.numel() > 0:
        elements = grad_query.numel()
        additive_query_gradient_kernel[(ceil_div(elements, _SUM_ELEMENTS),)](
            query_sums, grad_query, elements, splits, BLOCK=_SUM_ELEMENTS, num_warps=4
        )
    for sums, gradient in zip(weight_sums, weight_gradients, strict=True):
        if gradient.numel() > 0:
            reduce_partials(sums.unsqueeze(0), [gradient.view(-1)])


def _feature_gradient(inputs: AdditiveInputs, grad_scores: Tensor, grad_features: Tensor) -> None:
    from .triton_kernels import additive_feature_gradient_kernel

    B, H, T, E = inputs.query.shape
    S, pairs, tile = inputs.key.size(2), _pairs(inputs), _gradient_tile(T, E)
    programs = B * H * ceil_div(T, tile.BLOCK_M) * ceil_div(S, tile.BLOCK_N)
    additive_feature_gradient_kernel[(programs,)](
        *pairs.tensors,
        grad_scores,
        grad_features,
        *pairs.strides,
        *grad_scores.stride(),
        H,
        T,
        S,
        pairs.F,
        **pairs.flags,
        # Products are 16 wide at least.
        BLOCK_F=max(next_power_of_2(pairs.F), 16),
        **tile._asdict(),
        num_warps=1,
        **target().register_options(_REGISTERS),
    )


def _by_pair(queries: int, features: int) -> bool:
    """Whether tangents are made each by itself."""
    few = 2 if target().architecture == "interpreter" else _FEW_QUERIES
    return features > 0 or queries <= few


def _score_tile(queries: int, E: int, features: int) -> Tile:
    """Large where pairs share exponentials; else small, for many programs in a step of decoding."""
    if target().architecture == "interpreter":
        return _interpreted_tile(queries, E)
    lanes = target().warp_size
    if not _by_pair(queries, features):
        return Tile(8, 8, lanes)
    # A lane converts a feature once for all its components.
    columns = min(max(next_power_of_2(E), lanes), 4 * lanes)
    return Tile(1 if queries == 1 else 2, 4, columns)


def _gradient_tile(queries: int, E: int) -> Tile:
    """Of few components, since other programs take the others."""
    if target().architecture == "interpreter":
        return _interpreted_tile(queries, E)
    lanes = target().warp_size
    return Tile(1, 32, lanes) if queries == 1 else Tile(4, 8, lanes)


def _interpreted_tile(queries: int, E: int) -> Tile:
    """Large: the interpreter takes its time for every operation, whatever its size."""
    return Tile(1 if queries == 1 else 16, 32, min(max(next_power_of_2(E), 16), 128))


def _products(rows: Tensor, queries: int = _PRODUCT_ROWS) -> dict[str, int]:
    """How a kernel multiplies rows of values ``[B, H, S, D]`` with weights of so many queries."""
    D = rows.size(3)
    # Products of fp32 run on the plain units, whose operands take registers.
    most = _PRODUCT_BYTES // rows.element_size()
    return {
        "D": D,
        "BLOCK_M": 1 if queries == 1 else _PRODUCT_ROWS,
        "BLOCK_N": most,
        "BLOCK_D": min(max(next_power_of_2(D), 16), most),
        "num_warps": 4 if rows.element_size() == 2 else 8,
        **target().register_options(_REGISTERS),
    }


def _column_tiles(products: dict[str, int]) -> int:
    """Without columns there is one still, which stores the weights."""
    return max(ceil_div(products["D"], products["BLOCK_D"]), 1)


def _split(tiles: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """How many splits of the keys fill the GPU, and the tiles of each; none is empty."""
    wanted = ceil_div(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs)
    tiles_per_split = ceil_div(tiles, min(wanted, tiles, _MAX_SPLITS))
    return ceil_div(tiles, tiles_per_split), tiles_per_split


def _pairs(inputs: AdditiveInputs) -> Pairs:
    query, key = _contiguous_columns(inputs.query), _contiguous_columns(inputs.key)
    B, H, T, E = query.shape
    features, feature_weight = inputs.features, inputs.feature_weight
    F = 0 if features is None else features.size(4)
    mask = inputs.mask
    if mask is not None:
        # A bool is a byte, which loads without a conversion in every version.
        mask = mask.view(torch.uint8).expand(B, H, T, key.size(2))
    tensors = (
        query,
        key,
        inputs.score_weight.contiguous(),
        # What is absent is not read.
        query if features is None else features,
        query if feature_weight is None else feature_weight.contiguous(),
        query if mask is None else mask,
        contiguous(inputs.key_lengths),
    )
    unit = _unit(query, key)
    strides = (
        *_in_units(unit, query),
        *_in_units(unit, key),
        *((0,) * 5 if features is None else features.stride()),
        *((0,) * 4 if mask is None else mask.stride()),
    )
    flags = {
        "HAS_MASK": mask is not None,
        "HAS_LENGTHS": inputs.key_lengths is not None,
        "STRIDE_UNIT": unit,
        "E": E,
    }
    return Pairs(tensors, strides, F, flags)


def _unit(*tensors: Tensor) -> int:
    """16 where it divides the strides of all rows, else 1."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return 16 if all(stride % 16 == 0 for stride in strides) else 1


def _in_units(unit: int, tensor: Tensor) -> tuple[int, ...]:
    return tuple(stride // unit for stride in tensor.stride()[:3])


def _contiguous_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.size(3) <= 1 or tensor.stride(3) == 1 else tensor.contiguous()
