"""Attention beside ``scaled_dot_product_attention``, which gets the equivalent mask or bias."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fused_attn import attention
from fused_attn.ops._cases import Case

from .peers import Peer, Run
from .suite import parametrize

OP = "attention"
_PLACES = ("mask", "block_mask", "window")


def peer(case: Case) -> Run:
    """PyTorch's fused attention; masks and biases are made when the first call comes."""
    made: dict[str, Tensor | None] = {}

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
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


def _equivalent_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """What SDPA takes in place of what it does not have; as few dimensions as possible."""
    query, key = inputs["query"], inputs["key"]
    slopes = inputs.get("alibi_slopes")
    if slopes is not None:
        T, S = query.size(2), key.size(2)
        distance = torch.arange(S, device=key.device) - torch.arange(T, device=key.device)[:, None]
        bias = -slopes[:, None, None] * distance.abs()
        return bias.masked_fill(distance > 0, -torch.inf) if inputs["is_causal"] else bias
    if any(name in inputs for name in _PLACES):
        given = {n: inputs[n] for n in (*_PLACES, "is_causal", "align") if n in inputs}
        # Weights of equal logits are positive where a pair takes part.
        q, k = query[:1, :1, :, :1] * 0.0, key[:1, :1, :, :1] * 0.0
        return attention(q, k, k, **given, return_weights="mean")[1][0] > 0
    lengths = inputs.get("key_lengths")
    if lengths is None:
        return None
    # For the keys alone: rows of NaN behind query lengths help nobody.
    return (torch.arange(key.size(2), device=key.device) < lengths[:, None])[:, None, None, :]


def _one_by_one(inputs: Mapping[str, Any]) -> Tensor:
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


def forced(backend: str) -> Callable[[Case], Run]:
    """A peer held to one of SDPA's backends; it fails where that backend refuses the call."""

    def make(case: Case) -> Run:
        default = peer(case)

        def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return default(inputs)

        return run

    return make


def flex(case: Case) -> Run:
    """FlexAttention, compiled for the case; the first call compiles."""
    compiled = torch.compile(flex_attention, dynamic=False)
    made: dict[str, Any] = {}

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
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


def _flex_mask(inputs: Mapping[str, Any]) -> Any:
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


PEERS = {
    "sdpa": Peer(peer, "F.scaled_dot_product_attention, which chooses for itself"),
    "sdpa_cudnn": Peer(forced("CUDNN_ATTENTION"), "SDPA held to cuDNN", devices=("cuda",)),
    "sdpa_flash": Peer(
        forced("FLASH_ATTENTION"), "SDPA held to FlashAttention-2", devices=("cuda",)
    ),
    "sdpa_efficient": Peer(
        forced("EFFICIENT_ATTENTION"), "SDPA held to memory-efficient attention", devices=("cuda",)
    ),
    "flex": Peer(flex, "FlexAttention, compiled for the case", devices=("cuda",)),
}


@parametrize(OP)
def test_attention(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
