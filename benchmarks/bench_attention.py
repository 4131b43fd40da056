"""Attention beside ``scaled_dot_product_attention``, which gets the equivalent mask or bias."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn import attention
from fused_attn.ops._cases import Case

from .measured import Run, ours, parametrize, time_provider

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


PROVIDERS = {"fused_attn": ours, "torch": peer}


@parametrize(OP)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_attention(benchmark: Any, case: Case, direction: str, provider: str) -> None:
    time_provider(benchmark, case, direction, provider, PROVIDERS[provider](case))
