"""Attention beside ``scaled_dot_product_attention``, which gets the equivalent mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case

from .measured import Run, ours, parametrize, time_provider

OP = "attention"


def peer(case: Case) -> Run:
    """PyTorch's fused attention; the mask is made when the first call comes."""
    masks: dict[int, Tensor | None] = {}

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        bias = inputs.get("bias")
        mask = bias
        if bias is None:
            if id(inputs) not in masks:
                masks[id(inputs)] = _padding_mask(inputs)
            mask = masks[id(inputs)]
        output = F.scaled_dot_product_attention(
            inputs["query"],
            inputs["key"],
            inputs["value"],
            attn_mask=mask,
            is_causal=inputs["is_causal"],
            scale=inputs["scale"],
        )
        return (output,)

    return run


def _padding_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Boolean ``[B, 1, 1, S]`` for the keys: rows of NaN behind query lengths help nobody."""
    lengths = inputs.get("key_lengths")
    if lengths is None:
        return None
    return (torch.arange(inputs["key"].size(2)) < lengths[:, None])[:, None, None, :]


PROVIDERS = {"fused_attn": ours, "torch": peer}


@parametrize(OP)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_attention(benchmark: Any, case: Case, direction: str, provider: str) -> None:
    time_provider(benchmark, case, direction, provider, PROVIDERS[provider](case))
