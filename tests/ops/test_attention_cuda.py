"""What is particular to attention's CUDA kernels: head sizes, alignment, tiles, dq's second pass.

The inputs are of 16 bits: there are no products of fp32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import BlockMask, attention
from fused_attn.ops._backend import unavailable_reason
from fused_attn.validation import compare

from .suite import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = unavailable_reason("cuda", DEVICE)
pytestmark = pytest.mark.skipif(REASON != "", reason=f"attention: {REASON}")


def random_call(
    D: int, Dv: int, H: int = 2, Hk: int = 2, T: int = 150, S: int = 210, **options: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(D)
    dtype = torch.bfloat16 if D % 16 == 0 else torch.float16
    shapes = {"query": (1, H, T, D), "key": (1, Hk, S, D), "value": (1, Hk, S, Dv)}
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    call = {**{n: t.to(dtype) for n, t in tensors.items()}, **options}
    return {n: v.to(DEVICE) if isinstance(v, Tensor | BlockMask) else v for n, v in call.items()}


def results(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Output, lse and gradients, of cotangents that are the same for every backend."""
    leaves = {
        n: call[n].detach().requires_grad_() for n in ("query", "key", "value", "bias") if n in call
    }
    output, lse = attention(**{**call, **leaves}, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in (output, lse)]
    gradients = torch.autograd.grad([output, lse], list(leaves.values()), cotangents)
    named = {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), "lse": lse.detach(), **named}


def assert_within_budget(call: dict[str, Any]) -> dict[str, Tensor]:
    wide = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }
    actual = results(call, "cuda")
    oracle, same = results(wide, "reference"), results(call, "reference")
    compared = [compare(n, actual[n], oracle[n], same[n]) for n in actual]
    assert all(c.passed for c in compared), "\n".join(map(str, compared))
    return actual


def blocks(T: int, S: int) -> Tensor:
    """A mask of hidden, shown and mixed tiles of 64 and of 128."""
    mask = torch.rand(T, S, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:128, :128] = True
    mask[:64, 128:192] = False
    mask[128:, :128] = False
    return mask


@pytest.mark.parametrize("D", [32, 40, 64, 96, 128, 200, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"window": (40, 25), "key_lengths": torch.tensor([170]), "align": "lower_right"},
        {"mask": blocks(150, 210), "bias": torch.ones(210)},
        {
            "block_mask": BlockMask.from_mask(blocks(150, 210)),
            "dropout_p": 0.2,
            "seed": torch.tensor([3]),
        },
    ],
    ids=["causal", "window", "mask", "block_mask"],
)
def test_head_sizes(D: int, options: dict[str, Any]) -> None:
    assert_within_budget(random_call(D, D, **options))


@pytest.mark.parametrize(("D", "Dv"), [(24, 128), (128, 24), (13, 200), (96, 5), (1, 64)])
def test_head_sizes_that_differ(D: int, Dv: int) -> None:
    assert_within_budget(random_call(D, Dv, is_causal=True))


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_rows_begin_anywhere(offset: int) -> None:
    call = random_call(64, 64, is_causal=True)
    expected = results(call, "cuda")

    def shifted(tensor: Tensor) -> Tensor:
        buffer = tensor.new_full((tensor.numel() + offset,), float("nan"))
        view = buffer[offset:].view(tensor.shape)
        return view.copy_(tensor)

    names = ("query", "key", "value")
    actual = results({**call, **{n: shifted(call[n]) for n in names}}, "cuda")
    for name, tensor in expected.items():
        assert_bit_equal(name, actual[name], tensor)


@pytest.mark.parametrize("mask_shape", [(6, 1, 210), (150, 1), (1, 6, 150, 210)])
def test_tiles_of_a_mask_by_group(mask_shape: tuple[int, ...]) -> None:
    # Heads that share keys take tiles of their own.
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(2)) < 0.5
    mask.view(-1)[: mask.numel() // 3] = False
    assert_within_budget(random_call(32, 32, H=6, Hk=2, mask=mask, is_causal=True))


def test_delta_of_rows_with_one_key_of_weight() -> None:
    # dP is nearly the same for all keys of weight: the loop of dq runs a second time.
    call = random_call(64, 64)
    call["key"][:, :, 0] = 4.0 * call["query"].mean(dim=2)
    call["query"] += call["key"][:, :, :1]
    call["value"] += 3.0
    assert_within_budget(call)


def test_heads_whose_keys_do_not_fit_the_cache_together() -> None:
    # Blocks then go through the tiles of one head after the other.
    call = random_call(256, 256, H=3, Hk=3, T=200, S=30000, key_lengths=torch.tensor([70]))
    whole = attention(**call, backend="cuda")
    for h in range(3):
        one = {n: call[n][:, h : h + 1, :200] for n in ("query", "key", "value")}
        alone = attention(**one, key_lengths=call["key_lengths"], backend="cuda")
        assert_bit_equal("output", alone, whole[:, h : h + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    query = torch.zeros(1, 1, 2, 8, dtype=dtype, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"attention: .*\n.*\n.*dtype {dtype}"):
        attention(query, query, query, backend="cuda")


def test_large_heads_are_refused() -> None:
    query = torch.zeros(1, 1, 2, 264, dtype=torch.float16, device=DEVICE)
    with pytest.raises(NotImplementedError, match="head size 264 > 256"):
        attention(query, query, query, backend="cuda")
