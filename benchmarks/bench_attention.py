"""Attention beside PyTorch's ``scaled_dot_product_attention`` and FlexAttention, and ONNX Runtime.

What a peer does not have it gets as the equivalent mask or bias, made before it is timed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fused_attn import attention
from fused_attn.ops._cases import Case

from .onnx_runtime import MICROSOFT, PACKAGES, Node, graph_call
from .peers import Inputs, Peer, Run, compiled, prepared, unless_dropout
from .suite import parametrize

OP = "attention"
_PLACES = ("mask", "block_mask", "window")


def peer(case: Case) -> Run:
    """PyTorch's fused attention; masks and biases are made when the first call comes."""
    made: dict[str, Tensor | None] = {}

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if "query_offsets" in inputs:
            return (_one_by_one(inputs),)
        if not made:
            made["mask"] = _equivalent_mask(inputs)
        mask = made["mask"] if inputs.get("bias") is None else inputs["bias"]
        output = F.scaled_dot_product_attention(
            inputs["query"],
            inputs["key"],
            inputs["value"],
            attn_mask=mask,
            # Beside a mask it is in the mask.
            is_causal=inputs["is_causal"] and mask is None,
            scale=inputs["scale"],
            dropout_p=inputs.get("dropout_p", 0.0),
            enable_gqa=inputs["query"].size(1) != inputs["key"].size(1),
        )
        return (output,)

    return run


def _equivalent_mask(inputs: Inputs, whole: bool = False) -> Tensor | None:
    """What SDPA takes in place of what it does not have; as few dimensions as possible.

    Args:
        inputs: Of the case.
        whole: Causality is in the mask too, as for a peer without a flag for it.
    """
    query, key = inputs["query"], inputs["key"]
    slopes = inputs.get("alibi_slopes")
    if slopes is not None:
        T, S = query.size(2), key.size(2)
        distance = torch.arange(S, device=key.device) - torch.arange(T, device=key.device)[:, None]
        bias = -slopes[:, None, None] * distance.abs()
        return bias.masked_fill(distance > 0, -torch.inf) if inputs["is_causal"] else bias
    if any(name in inputs for name in _PLACES) or (whole and inputs["is_causal"]):
        given = {n: inputs[n] for n in (*_PLACES, "is_causal", "align") if n in inputs}
        # Weights of equal logits are positive where a pair takes part.
        q, k = query[:1, :1, :, :1] * 0.0, key[:1, :1, :, :1] * 0.0
        return attention(q, k, k, **given, return_weights="mean")[1][0] > 0
    lengths = inputs.get("key_lengths")
    if lengths is None:
        return None
    # For the keys alone: rows of NaN behind query lengths help nobody.
    return (torch.arange(key.size(2), device=key.device) < lengths[:, None])[:, None, None, :]


def _one_by_one(inputs: Inputs) -> Tensor:
    """Sentence after sentence, without padding."""
    queries, keys = inputs["query_offsets"].tolist(), inputs["key_offsets"].tolist()
    outputs = []
    for q, k in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        tensors = (
            inputs[name][slice(*rows)].transpose(0, 1)[None]
            for name, rows in (("query", q), ("key", k), ("value", k))
        )
        output = F.scaled_dot_product_attention(*tensors, is_causal=inputs["is_causal"])
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def eager(case: Case) -> Run:
    """The two products and the softmax between them, as a model in plain PyTorch has them."""
    made: dict[str, Tensor | None] = {}

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if "query_offsets" in inputs:
            raise NotImplementedError("written for padded batches")
        if not made:
            made["mask"] = _equivalent_mask(inputs, whole=True)
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        groups = query.size(1) // key.size(1)
        if groups > 1:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scale = inputs["scale"] or 1.0 / math.sqrt(query.size(-1))
        logits = scale * (query @ key.transpose(-2, -1))
        mask = made["mask"] if inputs.get("bias") is None else inputs["bias"]
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if _is_bool(mask) else logits + mask
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        if inputs.get("dropout_p", 0.0) > 0.0:
            weights = F.dropout(weights, inputs["dropout_p"])
        return (weights @ value,)

    return run


def _is_bool(mask: Tensor) -> bool:
    return mask.dtype == torch.bool


def forced(backend: str) -> Callable[[Case], Run]:
    """A peer held to one of SDPA's backends; it fails where that backend refuses the call."""

    def make(case: Case) -> Run:
        default = peer(case)

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return default(inputs)

        return run

    return make


def flex(case: Case) -> Run:
    """FlexAttention, compiled for the case; the first call compiles."""
    compiled = torch.compile(flex_attention, dynamic=False)
    made: dict[str, Any] = {}

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if not made:
            made["block_mask"] = _flex_mask(inputs)
        bias = inputs.get("bias")

        def add_bias(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return score + bias[h, t, s]

        output = compiled(
            inputs["query"],
            inputs["key"],
            inputs["value"],
            score_mod=None if bias is None else add_bias,
            block_mask=made["block_mask"],
            scale=inputs["scale"],
            enable_gqa=inputs["query"].size(1) != inputs["key"].size(1),
        )
        return (output,)

    return run


def onnx_runtime(case: Case) -> Run:
    """ONNX's ``Attention``, whose layout is ours."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        _refuse_for_onnx_runtime(inputs)
        query, key, value = (inputs[name].contiguous() for name in ("query", "key", "value"))
        tensors = {"query": query, "key": key, "value": value}
        bias = inputs.get("bias")
        mask = _equivalent_mask(inputs) if bias is None else bias
        if mask is not None:
            mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
            tensors["mask"] = mask.expand(-1, -1, query.size(2), -1).contiguous()
        attributes = {"is_causal": int(inputs["is_causal"] and mask is None)}
        if inputs["scale"] is not None:
            attributes["scale"] = inputs["scale"]
        output = query.new_empty(*query.shape[:3], value.size(3))
        node = Node("Attention", list(tensors), ["output"], attributes=attributes)
        return _returning(output, graph_call([node], tensors, {"output": output}))

    return prepared(prepare)


def onnx_runtime_flash(case: Case) -> Run:
    """``MultiHeadAttention`` without a mask, for which ONNX Runtime has a fused kernel."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        _refuse_for_onnx_runtime(inputs)
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        masks = (*_PLACES, "bias", "alibi_slopes", "key_lengths")
        if inputs["is_causal"] or any(inputs.get(name) is not None for name in masks):
            raise NotImplementedError("ONNX Runtime's fused kernel takes no mask")
        if key.size(1) != query.size(1):
            raise NotImplementedError("ONNX Runtime's fused kernel takes no grouped heads")
        tensors = {
            name: inputs[name].transpose(1, 2).flatten(2).contiguous()
            for name in ("query", "key", "value")
        }
        attributes: dict[str, Any] = {"num_heads": query.size(1)}
        if inputs["scale"] is not None:
            attributes["scale"] = inputs["scale"]
        output = query.new_empty(query.size(0), query.size(2), query.size(1) * value.size(3))
        node = Node("MultiHeadAttention", list(tensors), ["output"], MICROSOFT, attributes)
        heads = output.unflatten(2, (query.size(1), -1)).transpose(1, 2)
        return _returning(heads, graph_call([node], tensors, {"output": output}))

    return prepared(prepare)


def _refuse_for_onnx_runtime(inputs: Inputs) -> None:
    if "query_offsets" in inputs:
        raise NotImplementedError("ONNX Runtime has no packed batches")
    if inputs.get("dropout_p", 0.0) > 0.0:
        raise NotImplementedError("ONNX Runtime has no dropout there")


def _returning(output: Tensor, call: Callable[[], None]) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        call()
        return (output,)

    return run


def within_lengths(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output with 0 in rows behind the query lengths, where a peer has anything.

    Raises:
        IncomparableError: There is dropout.
    """
    found = unless_dropout(case, inputs, outputs)
    lengths = inputs.get("query_lengths")
    if lengths is not None:
        row = torch.arange(outputs[0].size(2), device=lengths.device)
        behind = (row >= lengths[:, None])[:, None, :, None]
        found["output_0"] = found["output_0"].masked_fill(behind, 0.0)
    return found


def _flex_mask(inputs: Inputs) -> Any:
    query, key = inputs["query"], inputs["key"]
    if "query_offsets" in inputs or inputs.get("dropout_p") or "alibi_slopes" in inputs:
        raise NotImplementedError("not written for FlexAttention")
    lengths = inputs.get("key_lengths")
    sizes = (query.size(2), key.size(2))
    if lengths is not None:
        ends, queries = lengths, inputs["query_lengths"]
        return create_block_mask(
            lambda b, h, t, s: (s < ends[b]) & (t < queries[b]),
            query.size(0),
            None,
            *sizes,
            device=key.device,
        )
    if any(name in inputs for name in _PLACES):
        mask = _equivalent_mask(inputs)
        assert mask is not None
        return create_block_mask(
            lambda b, h, t, s: mask[t, s], None, None, *sizes, device=key.device
        )
    if inputs["is_causal"]:
        return create_block_mask(lambda b, h, t, s: t >= s, None, None, *sizes, device=key.device)
    return None


def _sdpa(backend: str, about: str) -> Peer:
    return Peer(
        forced(backend), f"SDPA held to {about}", devices=("cuda",), comparable=within_lengths
    )


def _onnx_runtime(make: Callable[[Case], Run], about: str) -> Peer:
    return Peer(
        make,
        f"ONNX Runtime's {about}, inputs and outputs bound",
        packages=PACKAGES,
        devices=("cpu",),
        differentiable=False,
        comparable=within_lengths,
        uses_torch_memory=False,
    )


PEERS = {
    "sdpa": Peer(
        peer,
        "F.scaled_dot_product_attention, which chooses for itself",
        comparable=within_lengths,
    ),
    "sdpa_cudnn": _sdpa("CUDNN_ATTENTION", "cuDNN"),
    "sdpa_flash": _sdpa("FLASH_ATTENTION", "FlashAttention-2"),
    "sdpa_efficient": _sdpa("EFFICIENT_ATTENTION", "memory-efficient attention"),
    "flex": Peer(flex, "FlexAttention, compiled for the case", comparable=within_lengths),
    "compile": compiled(Peer(eager, "plain PyTorch", comparable=within_lengths)),
    "onnxruntime": _onnx_runtime(onnx_runtime, "Attention"),
    "onnxruntime_flash": _onnx_runtime(onnx_runtime_flash, "MultiHeadAttention"),
}


@parametrize(OP)
def test_attention(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
