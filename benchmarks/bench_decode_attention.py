"""Decoding steps beside ``scaled_dot_product_attention`` on the cache that PyTorch's user has.

Beams of a source get an expanded copy of its keys and values, made once and not timed. Where there
is an ancestry, the user's beams have a cache each, which is reordered in every step: that copy is a
part of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case

from .peers import Peer, Run
from .suite import parametrize

OP = "decode_attention"


def peer(case: Case) -> Run:
    """PyTorch's fused attention; cache, mask and parents are made when the first call comes."""
    prepared: dict[int, tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = {}

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if id(inputs) not in prepared:
            prepared[id(inputs)] = _prepare(inputs)
        key, value, mask, parents = prepared[id(inputs)]
        if parents is not None:
            key, value = key.index_select(0, parents), value.index_select(0, parents)
        query = inputs["query"]
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=query.size(1) != key.size(1)
        )
        return (output,)

    return run


def _prepare(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values a row of queries, the mask of the lengths, and where beams come from."""
    key, value, R = inputs["key"], inputs["value"], inputs["query"].size(0)
    if key.size(0) != R:
        repeats = R // key.size(0)
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    mask = None
    if inputs.get("key_lengths") is not None:
        lengths = inputs["key_lengths"].to(key.device)
        lengths = lengths.repeat_interleave(R // lengths.size(0))
        column = torch.arange(key.size(2), device=key.device)
        mask = (column < lengths[:, None])[:, None, None, :]
    parents = None
    if inputs.get("ancestry") is not None:
        B, K, _ = inputs["ancestry"].shape
        beam = torch.randint(K, (B, K), generator=torch.Generator().manual_seed(0))
        parents = (beam + K * torch.arange(B)[:, None]).flatten().to(key.device)
    return key, value, mask, parents


PEERS = {"sdpa": Peer(peer, "F.scaled_dot_product_attention on the user's cache")}


@parametrize(OP)
def test_decode_attention(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
