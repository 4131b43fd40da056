"""What is particular to the Triton kernels of beam_search: chunks, groups, alignment, edits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import BeamSearchStep, beam_search_step
from fused_attn.ops import TokenEdits
from fused_attn.ops._backend import unavailable_reason

from .suite import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = unavailable_reason("triton", DEVICE)
pytestmark = pytest.mark.skipif(REASON != "", reason=f"beam_search: {REASON}")

CHUNK = 4096


def random_inputs(
    B: int, K: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(B, K, V, generator=generator)
    scores = -5.0 * torch.rand(B, K, generator=generator)
    return logits.to(DEVICE, dtype), scores.to(DEVICE)


def assert_chooses_as_the_reference(
    logits: Tensor, scores: Tensor, eos: int, **options: Any
) -> BeamSearchStep:
    actual = beam_search_step(logits, scores, eos_token=eos, **options, backend="triton")
    expected = beam_search_step(logits, scores, eos_token=eos, **options, backend="reference")
    for name in ("tokens", "parents", "finished_parents", "invalid"):
        assert_bit_equal(name, getattr(actual, name), getattr(expected, name))
    for name in ("scores", "finished_scores"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=1e-6, atol=1e-6
        )
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "K", "V"),
    [
        (1, 1, 262144),
        (1, 2, 600000),  # groups of more tokens
        (2, 3, 7 * CHUNK),
        (1, 17, 2 * CHUNK),  # groups of fewer
        (2, 6, 12345),
        (1, 64, 70),
    ],
)
def test_chooses_as_the_reference(B: int, K: int, V: int, dtype: torch.dtype) -> None:
    # In half precision thousands of logits are equal; the order among them is exact.
    logits, scores = random_inputs(B, K, V, dtype)
    assert_chooses_as_the_reference(logits, scores, eos=V // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_rows_begin_anywhere(offset: int, dtype: torch.dtype) -> None:
    V = CHUNK + 64
    logits, scores = random_inputs(2, 3, V, dtype)
    aligned = assert_chooses_as_the_reference(logits, scores, eos=5)
    buffer = torch.full((6 * (V + 1) + 16,), math.inf, device=DEVICE, dtype=dtype)
    shifted = buffer.as_strided((2, 3, V), (3 * (V + 1), V + 1, 1), offset)
    shifted.copy_(logits)
    step = beam_search_step(shifted, scores, eos_token=5, backend="triton")
    for name in ("tokens", "parents", "finished_parents"):
        assert_bit_equal(name, getattr(step, name), getattr(aligned, name))
    torch.testing.assert_close(step.scores, aligned.scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("K", [2, 20])
def test_ties_go_to_the_lower_token_wherever_it_is(K: int) -> None:
    # The first token of a tie is in no group that is better than others; -0 ties with 0.
    V = 3 * CHUNK
    logits = torch.full((1, K, V), -1.0, device=DEVICE)
    logits[:, :, 5::97] = 0.0
    logits[:, :, 5 : V // 2 : 194] = -0.0
    logits[:, :, 1000::1500] = 2.0
    assert_chooses_as_the_reference(logits, torch.zeros(1, K, device=DEVICE), eos=5)


@pytest.mark.parametrize("lowest", [0.0, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("K", [1, 4, 64])
def test_most_tokens_are_masked_by_one_number(K: int, lowest: float) -> None:
    V = 2 * CHUNK
    logits, scores = random_inputs(1, K, V)
    masked = torch.full_like(logits, lowest)
    masked[:, :, 100:V:1111] = logits[:, :, 100:V:1111] + 20.0
    assert_chooses_as_the_reference(masked, scores, eos=100)


def test_the_best_tokens_are_all_one_groups() -> None:
    logits, scores = random_inputs(1, 16, 2 * CHUNK)
    logits[:, :, 64:96] += 100.0
    assert_chooses_as_the_reference(logits, scores, eos=70)


def test_more_edits_than_are_ranked_at_a_time() -> None:
    # Those that become the best are at the ends of the list, and 8 of them alone are equal.
    B, K, V, N = 2, 3, 3000, 2100
    logits, scores = random_inputs(B, K, V)
    tokens = torch.rand(B, K, V, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :N]
    offsets = torch.full((B, K, N), -3.0)
    offsets[:, :, [0, 1, 1100, N - 2, N - 1]] = 20.0
    factors = torch.ones(B, K, N)
    factors[:, :, 500] = 1e-6
    edits = TokenEdits(tokens.to(DEVICE), factors.to(DEVICE), offsets.to(DEVICE))
    assert_chooses_as_the_reference(logits, scores, eos=7, edits=edits)


def test_too_many_beams_or_tokens_are_refused() -> None:
    logits, scores = random_inputs(1, 65, 40)
    with pytest.raises(NotImplementedError, match="65 beams > 64"):
        beam_search_step(logits, scores, eos_token=2, backend="triton")
    logits = torch.zeros(1, device=DEVICE).expand(1, 1, 2**20 + 1)
    with pytest.raises(NotImplementedError, match="vocabulary of 1048577 > 1048576"):
        beam_search_step(logits, scores[:, :1], eos_token=2, backend="triton")
