"""What is particular to the CUDA kernels of decode_attention: steps, splits, blocks, histories."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import decode_attention
from fused_attn.ops._backend import unavailable_reason
from fused_attn.ops.decode_attention.cases import search_history
from fused_attn.validation import compare

from .suite import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = unavailable_reason("cuda", DEVICE)
pytestmark = pytest.mark.skipif(REASON != "", reason=f"decode_attention: {REASON}")

on_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def random_inputs(
    dtype: torch.dtype,
    *,
    R: int,
    C: int,
    H: int = 1,
    Hk: int = 1,
    T: int = 1,
    S: int,
    D: int,
    Dv: int | None = None,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    return {
        "query": normal(R, H, T, D),
        "key": normal(C, Hk, S, D),
        "value": normal(C, Hk, S, D if Dv is None else Dv),
    }


def run(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    output, lse = decode_attention(**call, return_lse=True, backend=backend)
    return {"output": output, "lse": lse}


def assert_right(call: dict[str, Any]) -> dict[str, Tensor]:
    actual = run(call, "cuda")
    wide = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }
    oracle, same = run(wide, "reference"), run(call, "reference")
    for name, tensor in actual.items():
        comparison = compare(name, tensor, oracle[name], same[name])
        assert comparison.passed, str(comparison)
    return actual


@on_each_dtype
@pytest.mark.parametrize("D", [8, 64, 72, 128, 200, 256])
@pytest.mark.parametrize("queries", [1, 3, 8, 17])
def test_head_sizes_and_blocks_of_queries(D: int, queries: int, dtype: torch.dtype) -> None:
    assert_right(random_inputs(dtype, R=queries, C=1, S=37, D=D, Dv=264 - D if D < 200 else 48))


@on_each_dtype
@pytest.mark.parametrize("S", [255, 256, 511, 512, 1100])
def test_splits(S: int, dtype: torch.dtype) -> None:
    # One block would leave most processors idle: keys are split and merged.
    call = random_inputs(dtype, R=2, C=1, H=2, Hk=1, S=S, D=16)
    assert_right({**call, "key_lengths": torch.tensor([S, 100], device=DEVICE)})
    assert_right({**call, "key_lengths": torch.tensor([0, S - 1], device=DEVICE), "window": 270})


@on_each_dtype
@pytest.mark.parametrize("offset", range(1, 8))
def test_rows_begin_anywhere(offset: int, dtype: torch.dtype) -> None:
    call = random_inputs(dtype, R=2, C=1, S=40, D=16)
    expected = assert_right(call)
    shifted = {}
    for name, tensor in call.items():
        buffer = torch.full((tensor.numel() + 8,), math.nan, device=DEVICE, dtype=dtype)
        shifted[name] = buffer[offset : offset + tensor.numel()].view(tensor.shape)
        shifted[name].copy_(tensor)
    for name, tensor in run(shifted, "cuda").items():
        assert_bit_equal(name, tensor, expected[name])


@on_each_dtype
@pytest.mark.parametrize(("K", "T", "group"), [(2, 1, 1), (5, 3, 1), (20, 1, 1), (3, 1, 8)])
def test_histories(K: int, T: int, group: int, dtype: torch.dtype) -> None:
    # Merged at first and apart at the end; some beams share a block, some do not.
    S = 70
    call = random_inputs(dtype, R=2 * K, C=2 * K, H=group, S=S, D=24, T=T)
    lengths = torch.randint(S + 1, (2 * K,), generator=torch.Generator().manual_seed(1))
    history = search_history(2, K, S).to(DEVICE)
    assert_right({**call, "ancestry": history, "key_lengths": lengths.to(DEVICE)})


@on_each_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_one_beam_looks_at_does_not_reach_the_others(
    poison: float, dtype: torch.dtype
) -> None:
    B, K, S = 1, 4, 40
    call = random_inputs(dtype, R=K, C=K, S=S, D=16)
    ancestry = search_history(B, K, S).to(DEVICE)
    clean = run({**call, "ancestry": ancestry}, "cuda")
    # The last position is each beam's own.
    value = call["value"].clone()
    value[2, :, S - 1] = poison
    actual = run({**call, "value": value, "ancestry": ancestry}, "cuda")
    assert not actual["output"][2].isfinite().any()
    for beam in (0, 1, 3):
        torch.testing.assert_close(actual["output"][beam], clean["output"][beam])
        assert_bit_equal("lse", actual["lse"][beam], clean["lse"][beam])


@on_each_dtype
def test_a_mask_a_query_and_ragged_windows(dtype: torch.dtype) -> None:
    call = random_inputs(dtype, R=6, C=2, H=4, Hk=2, T=3, S=90, D=32)
    shown = torch.rand(6, 4, 3, 90, generator=torch.Generator().manual_seed(2)) < 0.5
    call |= {
        "mask": shown.to(DEVICE),
        "key_lengths": torch.tensor([90, 31, 4, 64, 65, 0], dtype=torch.int32, device=DEVICE),
        "window": 33,
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0], device=DEVICE),
    }
    assert_right(call)
