"""What the modules pass on to the op beyond torch.nn's masks, against the equivalent mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import BlockMask
from fused_attn.nn import (
    MultiheadAttention,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

E, H, T, S = 32, 4, 20, 24


def hidden(window: tuple[int, int], queries: int, keys: int, shift: int = 0) -> Tensor:
    """torch.nn's mask of a window: True is ignored."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - shift
    return (distance < -window[0]) | (distance > window[1])


SLOPES = torch.tensor([0.5, 0.25, 0.0, 1.0])
DISTANCE = torch.arange(S) - torch.arange(T)[:, None]


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"window": (3, 2)}, {"attn_mask": hidden((3, 2), T, S)}),
        (
            {"window": (3, 2), "align": "lower_right"},
            {"attn_mask": hidden((3, 2), T, S, S - T)},
        ),
        (
            {"block_mask": BlockMask.from_mask(~hidden((5, 0), T, S))},
            {"attn_mask": hidden((5, 0), T, S)},
        ),
        (
            {"alibi_slopes": SLOPES},
            {"attn_mask": (-SLOPES[:, None, None] * DISTANCE.abs()).repeat(2, 1, 1)},
        ),
    ],
    ids=["window", "lower_right", "block_mask", "alibi"],
)
def test_multihead_attention(given: dict[str, Any], same: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True)
    query, memory = torch.randn(2, T, E), torch.randn(2, S, E)
    for need_weights in (False, True):
        a = module(query, memory, memory, need_weights=need_weights, **given)
        b = module(query, memory, memory, need_weights=need_weights, **same)
        torch.testing.assert_close(a, b)
    q, (k, v) = module.project_query(query), module.project_key_value(memory, memory)
    torch.testing.assert_close(module.attend(q, k, v, **given), a[0])


def test_softcap_bounds_the_logits() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, 1, batch_first=True)
    x = 100.0 * torch.randn(1, T, E)
    _, weights = module(x, x, x, softcap=0.01)
    ratios = weights.amax(dim=-1) / weights.amin(dim=-1)
    assert ratios.max() <= 1.0203  # exp(0.02)


@pytest.mark.parametrize("option", ["window", "block_mask"])
def test_stacks(option: str) -> None:
    torch.manual_seed(0)
    value = (4, 1) if option == "window" else BlockMask.from_mask(~hidden((4, 1), T, T))
    mask = hidden((4, 1), T, T)
    x, memory = torch.randn(2, T, E), torch.randn(2, S, E)
    encoder = TransformerEncoder(
        TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True), 2
    )
    torch.testing.assert_close(encoder(x, **{option: value}), encoder(x, mask))
    decoder = TransformerDecoder(
        TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=True), 2
    )
    got = decoder(x, memory, **{option: value}, tgt_is_causal=False)
    torch.testing.assert_close(got, decoder(x, memory, mask, tgt_is_causal=False))


@pytest.mark.parametrize("extra", ["add_bias_kv", "add_zero_attn"])
def test_keys_without_position_have_no_distance(extra: str) -> None:
    module = MultiheadAttention(E, H, batch_first=True, **{extra: True})
    x = torch.randn(2, T, E)
    with pytest.raises(ValueError, match="MultiheadAttention: block_mask, alibi_slopes, window"):
        module(x, x, x, window=(1, 1))
    module(x, x, x, softcap=2.0)
