"""Rows with nothing to attend to, and NaN where nobody looks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fused_attn.nn import MultiheadAttention, TransformerEncoderLayer

B, H, T, S, E = 3, 2, 4, 5, 8


def sequence(seed: int, length: int) -> torch.Tensor:
    return torch.randn(B, length, E, generator=torch.Generator().manual_seed(seed))


def empty_rows(kind: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Masks that leave some rows nothing, and those rows ``[B, T]``."""
    everywhere = torch.zeros(B, T, dtype=torch.bool)
    if kind in ("bool_padding", "float_padding", "lengths"):
        everywhere[1] = True
        hidden = torch.zeros(B, S, dtype=torch.bool)
        hidden[1] = True
        if kind == "lengths":
            return {"key_lengths": torch.tensor([S, 0, S])}, everywhere
        additive = torch.zeros(B, S).masked_fill(hidden, -math.inf)
        return {"key_padding_mask": hidden if kind == "bool_padding" else additive}, everywhere
    everywhere[:, 2] = True
    pairs = torch.zeros(T, S, dtype=torch.bool)
    pairs[2] = True
    if kind == "bool_2d":
        return {"attn_mask": pairs}, everywhere
    return {"attn_mask": torch.zeros(T, S).masked_fill(pairs, -math.inf)}, everywhere


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "kind", ["bool_padding", "float_padding", "lengths", "bool_2d", "float_2d"]
)
def test_a_row_with_nothing_to_attend_to_gives_zero(kind: str, need_weights: bool) -> None:
    module = MultiheadAttention(E, H, bias=False, batch_first=True)
    query, key, value = (sequence(i, n).requires_grad_() for i, n in enumerate((T, S, S)))
    masks, empty = empty_rows(kind)
    output, weights = module(query, key, value, need_weights=need_weights, **masks)
    assert torch.all(output[empty] == 0.0)
    assert torch.all(output[~empty].abs().amax(-1) > 0.0)
    loss = output.square().sum()
    if need_weights:
        assert torch.all(weights[empty] == 0.0)
        torch.testing.assert_close(weights[~empty].sum(-1), torch.ones(int((~empty).sum())))
        loss = loss + weights.square().sum()
    gradients = torch.autograd.grad(loss, (query, key, value, *module.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert torch.all(gradients[0][empty] == 0.0)


@pytest.mark.parametrize("filler", [math.nan, math.inf])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("attn_mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("padded_by", ["bool", "float", "lengths"])
@pytest.mark.parametrize("extra", [False, True])
def test_nothing_behind_padding_reaches_output_or_gradient(
    extra: bool, padded_by: str, attn_mask: str, need_weights: bool, filler: float
) -> None:
    module = MultiheadAttention(E, H, batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    lengths = torch.tensor([S, 2, 1])
    hidden = torch.arange(S) >= lengths[:, None]
    additive = torch.zeros(B, S).masked_fill(hidden, -math.inf)
    kwargs: dict[str, Any] = {
        "bool": {"key_padding_mask": hidden},
        "float": {"key_padding_mask": additive},
        "lengths": {"key_lengths": lengths},
    }[padded_by] | {"need_weights": need_weights}
    pairs = torch.zeros(T, S, dtype=torch.bool)
    pairs[0, 1] = pairs[2, 0] = True
    if attn_mask == "bool":
        kwargs["attn_mask"] = pairs
    elif attn_mask == "float":
        kwargs["attn_mask"] = torch.randn(T, S, generator=torch.Generator().manual_seed(5))
    elif attn_mask == "causal":
        kwargs["is_causal"] = True
    results = []
    for value in (0.0, filler):
        query = sequence(0, T).requires_grad_()
        memory = sequence(1, S).masked_fill(hidden[..., None], value).requires_grad_()
        output, weights = module(query, memory, memory, **kwargs)
        loss = output.square().sum()
        if weights is not None:
            loss = loss + weights.square().sum()
        gradients = torch.autograd.grad(loss, (query, memory))
        results.append([output, *gradients, *([] if weights is None else [weights])])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


def test_an_encoder_layer_keeps_padding_out_of_the_other_positions() -> None:
    layer = TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True)
    hidden = torch.arange(S) >= torch.tensor([S, 2, 1])[:, None]
    src = sequence(0, S).masked_fill(hidden[..., None], math.nan)
    expected = layer(src.nan_to_num(0.0), src_key_padding_mask=hidden)
    actual = layer(src, src_key_padding_mask=hidden)
    assert torch.equal(actual[~hidden], expected[~hidden])
