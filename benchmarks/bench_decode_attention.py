"""Decoding steps beside ``scaled_dot_product_attention`` and ONNX Runtime on the user's cache.

Beams of a source get an expanded copy of its keys and values, made once and not timed;
``sdpa_shared`` lets them be the queries of one call instead. Where there is an ancestry, the user's
beams have a cache each, which is reordered in every step, and gets the step's own key and value:
both are a part of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case

from .onnx_runtime import PACKAGES, Node, graph_call
from .peers import Inputs, Peer, Run, prepared
from .suite import parametrize

OP = "decode_attention"


def peer(case: Case) -> Run:
    """PyTorch's fused attention."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        query = inputs["query"]
        key, value = (_a_row_each(inputs, name) for name in ("key", "value"))
        mask = _mask(inputs)
        reordered = "ancestry" in inputs
        if reordered:
            parents = _parents(inputs)
            own = [cache[:, :, -1:].clone() for cache in (key, value)]
            key, value = (_before_reordering(cache, parents) for cache in (key, value))

        def run() -> tuple[Tensor, ...]:
            k, v = key, value
            if reordered:
                k, v = (cache.index_select(0, parents) for cache in (key, value))
                for cache, last in zip((k, v), own, strict=True):
                    cache[:, :, -1:] = last
            output = F.scaled_dot_product_attention(
                query, k, v, attn_mask=mask, enable_gqa=query.size(1) != k.size(1)
            )
            return (output,)

        return run

    return prepared(prepare)


def shared(case: Case) -> Run:
    """Likewise, the beams of a source being queries of one call: without a copy of the cache."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        beams = query.size(0) // key.size(0)
        if beams == 1 or query.size(2) > 1:
            raise NotImplementedError("no rows share a cache")
        if inputs.get("key_lengths") is not None:
            raise NotImplementedError("written for caches without lengths")

        def run() -> tuple[Tensor, ...]:
            together = query.squeeze(2).unflatten(0, (-1, beams)).transpose(1, 2)  # [C, H, K, D]
            output = F.scaled_dot_product_attention(together, key, value)
            return (output.transpose(1, 2).flatten(0, 1).unsqueeze(2),)

        return run

    return prepared(prepare)


def onnx_runtime(case: Case) -> Run:
    """ONNX's ``Attention`` on the same cache; reordering it would be PyTorch's."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        if "ancestry" in inputs:
            raise NotImplementedError("ONNX Runtime does not reorder a cache")
        query = inputs["query"]
        tensors = {
            "query": query,
            "key": _a_row_each(inputs, "key"),
            "value": _a_row_each(inputs, "value"),
        }
        if (mask := _mask(inputs)) is not None:
            tensors["mask"] = mask.expand(-1, -1, query.size(2), -1).contiguous()
        output = query.new_empty(*query.shape[:3], tensors["value"].size(3))
        node = Node("Attention", list(tensors), ["output"])
        call = graph_call([node], tensors, {"output": output})

        def run() -> tuple[Tensor, ...]:
            call()
            return (output,)

        return run

    return prepared(prepare)


def _a_row_each(inputs: Inputs, name: str) -> Tensor:
    """Keys or values ``[R, Hk, S, D]``: a row for each row of queries, as an ancestry says."""
    cache: Tensor = inputs[name]
    R, (C, _, S, _) = inputs["query"].size(0), cache.shape
    if "ancestry" not in inputs:
        return cache if C == R else cache.repeat_interleave(R // C, 0)
    ancestry = inputs["ancestry"]
    B, K, _ = ancestry.shape
    first = K * torch.arange(B, device=cache.device)[:, None, None]
    rows = (ancestry[:, :, :S] + first).flatten(0, 1)  # [R, S]
    return cache.transpose(1, 2)[rows, torch.arange(S, device=cache.device)].transpose(1, 2)


def _parents(inputs: Inputs) -> Tensor:
    """``[R]``: from whose cache each row's comes; where it was a position ago."""
    ancestry = inputs["ancestry"]
    B, K, _ = ancestry.shape
    S = inputs["key"].size(2)
    first = K * torch.arange(B, device=ancestry.device)[:, None]
    return (ancestry[:, :, S - 2] + first).flatten()


def _before_reordering(cache: Tensor, parents: Tensor) -> Tensor:
    """The cache whose rows, once reordered, are those given but for the last position."""
    before = cache.clone(memory_format=torch.contiguous_format)
    before[parents] = cache
    return before


def _mask(inputs: Inputs) -> Tensor | None:
    """``[R, 1, 1, S]``: True within the lengths."""
    if inputs.get("key_lengths") is None:
        return None
    R, S = inputs["query"].size(0), inputs["key"].size(2)
    lengths = inputs["key_lengths"].to(inputs["key"].device)
    lengths = lengths.repeat_interleave(R // lengths.size(0))
    return (torch.arange(S, device=lengths.device) < lengths[:, None])[:, None, None, :]


PEERS = {
    "sdpa": Peer(peer, "F.scaled_dot_product_attention on the user's cache"),
    "sdpa_shared": Peer(shared, "SDPA, the beams of a source being queries of one call"),
    "onnxruntime": Peer(
        onnx_runtime,
        "ONNX Runtime's Attention on the same cache, inputs and outputs bound",
        packages=PACKAGES,
        devices=("cpu",),
        differentiable=False,
        uses_torch_memory=False,
    ),
}


@parametrize(OP)
def test_decode_attention(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
