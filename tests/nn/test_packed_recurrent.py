from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_attn.nn import RecurrentLayers
from fused_attn.nn.packed import PackedLinear, packing_unavailable_reason
from fused_attn.nn.packed_recurrent import PackedRecurrentLayers

pytestmark = pytest.mark.skipif(
    packing_unavailable_reason() != "", reason=packing_unavailable_reason()
)


def draw(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers_of(kind: Any, **options: Any) -> RecurrentLayers:
    torch.manual_seed(3)
    return RecurrentLayers(kind, 24, 40, 2, **options).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
@torch.no_grad()
def test_a_step_is_that_of_the_module(kind: Any, bias: bool) -> None:
    layers = layers_of(kind, bias=bias)
    packed = PackedRecurrentLayers(layers, PackedLinear)
    state = tuple(draw(2, 6, 40, seed=s) for s in range(2 if kind == "lstm" else 1))
    x = draw(6, 24)
    output, new = packed.step(x, state)
    expected, expected_new = layers.step(x, state)
    torch.testing.assert_close((output, *new), (expected, *expected_new))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@torch.no_grad()
def test_whole_sequences_are_those_of_the_module(kind: Any) -> None:
    layers = layers_of(kind, bidirectional=True)
    x, lengths = draw(5, 7, 24), torch.tensor([3, 7, 0, 5, 1])
    output, final = PackedRecurrentLayers(layers, PackedLinear)(x, lengths)
    expected, expected_final = layers(x, lengths)
    torch.testing.assert_close((output, *final), (expected, *expected_final))


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
@torch.no_grad()
def test_a_rows_bits_do_not_depend_on_the_batch(kind: Any) -> None:
    packed = PackedRecurrentLayers(layers_of(kind), PackedLinear)
    state = tuple(draw(2, 9, 40, seed=s) for s in range(2 if kind == "lstm" else 1))
    x = draw(9, 24)
    output, new = packed.step(x, state)
    for rows in (slice(0, 1), slice(2, 4), slice(4, 9)):
        part, part_new = packed.step(x[rows], tuple(s[:, rows] for s in state))
        assert torch.equal(part, output[rows])
        for got, want in zip(part_new, new, strict=True):
            assert torch.equal(got, want[:, rows])


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
@torch.no_grad()
def test_a_sequences_bits_do_not_depend_on_the_batch(kind: Any) -> None:
    packed = PackedRecurrentLayers(layers_of(kind, bidirectional=True), PackedLinear)
    x, lengths = draw(5, 7, 24), torch.tensor([3, 7, 2, 5, 1])
    output, final = packed(x, lengths)
    for b, length in enumerate(lengths.tolist()):
        alone, alone_final = packed(x[b : b + 1, :length], lengths[b : b + 1])
        assert torch.equal(alone, output[b : b + 1, :length])
        for got, want in zip(alone_final, final, strict=True):
            assert torch.equal(got, want[:, b : b + 1])


def test_layers_of_two_directions_have_no_step() -> None:
    packed = PackedRecurrentLayers(layers_of("gru", bidirectional=True), PackedLinear)
    with pytest.raises(RuntimeError, match="PackedRecurrentLayers: step needs layers of one dir"):
        packed.step(draw(2, 24), (draw(4, 2, 40),))
