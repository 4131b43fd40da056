"""LayerNorm and AddLayerNorm against torch.nn.LayerNorm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn.nn import AddLayerNorm, LayerNorm

from .twins import check_twins, make_twins, share_parameters

SHAPE = (3, 5, 24)


def random(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": False},
        {"elementwise_affine": False},
        {"eps": 0.1},
        {"normalized_shape": (5, 24)},
        {"normalized_shape": (5, 24), "bias": False},
    ],
    ids=str,
)
def test_layer_norm_equals_torchs(arguments: dict[str, Any]) -> None:
    theirs, ours = make_twins("LayerNorm", **({"normalized_shape": 24} | arguments))
    check_twins(theirs, ours, {"x": 3.0 + random(0)}, lambda m, inputs: (m(inputs["x"]),))


@pytest.mark.parametrize("normalized_shape", [24, (5, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_add_layer_norm_equals_torchs_of_the_sum(bias: bool, normalized_shape: Any) -> None:
    theirs = nn.LayerNorm(normalized_shape, bias=bias)
    ours = AddLayerNorm(normalized_shape, bias=bias, dropout=0.5).eval()
    share_parameters(theirs, ours)

    def call(module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        if isinstance(module, AddLayerNorm):
            return module(inputs["x"], inputs["residual"], return_sum=True)
        total = inputs["x"] + inputs["residual"]
        return module(total), total

    check_twins(theirs, ours, {"x": random(0), "residual": random(1)}, call)


def test_without_a_residual_it_is_layer_norm() -> None:
    plain, adding = LayerNorm(24), AddLayerNorm(24)
    share_parameters(plain, adding)
    assert torch.equal(plain(random(0)), adding(random(0)))


def test_dropout_drops_the_branch_alone_and_keeps_its_mean() -> None:
    norm = AddLayerNorm(50, dropout=0.25)
    x, residual = torch.ones(1000, 50), torch.full((1000, 50), 7.0)
    torch.manual_seed(0)
    _, total = norm(x, residual, return_sum=True)
    dropped = total == 7.0
    assert torch.all(dropped | ((total - (7.0 + 1.0 / 0.75)).abs() < 1e-6))
    deviation = math.sqrt(0.25 * 0.75 / dropped.numel())
    assert abs(dropped.double().mean().item() - 0.25) < 5.0 * deviation
    _, kept = norm(x, residual, dropout_p=0.0, return_sum=True)
    assert torch.all(kept == 8.0)
    _, evaluated = norm.eval()(x, residual, return_sum=True)
    assert torch.all(evaluated == 8.0)


def test_mixed_dtypes_give_the_wider() -> None:
    norm = AddLayerNorm(24)
    x, residual = random(0).bfloat16(), random(1)
    output, total = norm(x, residual, return_sum=True)
    assert output.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, x + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_torchs_dtype(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = random(0).to(dtype)
        assert LayerNorm(24)(x).dtype == nn.LayerNorm(24)(x).dtype


def test_a_low_precision_module_takes_wider_input() -> None:
    norm = AddLayerNorm(24, dtype=torch.bfloat16)
    assert norm(random(0)).dtype == torch.float32
    assert norm(random(0).bfloat16()).dtype == torch.bfloat16


def test_repr_shows_the_arguments() -> None:
    assert repr(AddLayerNorm(24, dropout=0.1)) == (
        "AddLayerNorm((24,), eps=1e-05, elementwise_affine=True, bias=True, dropout=0.1)"
    )


def test_refuses_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"^LayerNorm: input must have shape \[\.\.\., 24\], got"):
        LayerNorm(24)(random(0, (3, 25)))
    with pytest.raises(ValueError, match=r"^LayerNorm: input must have shape \[\.\.\., 5, 24\]"):
        LayerNorm((5, 24))(random(0, (24,)))
    norm = AddLayerNorm(24)
    message = r"^AddLayerNorm: residual must have the shape of x, \[3, 5, 24\], got \[5, 24\]"
    with pytest.raises(ValueError, match=message):
        norm(random(0), random(1, (5, 24)))
    with pytest.raises(ValueError, match=r"^AddLayerNorm: dropout must be in \[0, 1\), got 1.0"):
        AddLayerNorm(24, dropout=1.0)
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got -1.0"):
        norm(random(0), dropout_p=-1.0)
