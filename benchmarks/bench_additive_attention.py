"""Additive attention beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops._cases import Case

from .peers import Peer, Run, compiled
from .suite import parametrize

OP = "additive_attention"


def peer(case: Case) -> Run:
    """The lines of Bahdanau's equations, as a model in plain PyTorch has them."""

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        hidden = query.unsqueeze(-2) + key.unsqueeze(-3)
        if "features" in inputs:
            hidden = hidden + inputs["features"] @ inputs["feature_weight"]
        scores = torch.tanh(hidden) @ inputs["score_weight"]
        if "key_lengths" in inputs:
            column = torch.arange(key.size(-2), device=key.device)
            hidden_keys = column >= inputs["key_lengths"][:, None, None]
            scores = scores.masked_fill(hidden_keys, float("-inf"))
        weights = torch.softmax(scores.float(), dim=-1)
        return weights.to(value.dtype) @ value, weights

    return run


EAGER = Peer(peer, "plain PyTorch")
PEERS = {"eager": EAGER, "compile": compiled(EAGER)}


@parametrize(OP)
def test_additive_attention(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
