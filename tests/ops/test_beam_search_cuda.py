"""What is particular to the CUDA kernels of beam_search: slices, chunks, alignment, many beams."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_attn import BeamSearchStep, beam_search_step
from fused_attn.ops._backend import unavailable_reason

from .suite import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = unavailable_reason("cuda", DEVICE)
pytestmark = pytest.mark.skipif(REASON != "", reason=f"beam_search: {REASON}")

CHUNK = 8192


def random_inputs(
    B: int, K: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(B, K, V, generator=generator)
    scores = -5.0 * torch.rand(B, K, generator=generator)
    return logits.to(DEVICE, dtype), scores.to(DEVICE)


def assert_chooses_as_the_reference(logits: Tensor, scores: Tensor, eos: int) -> BeamSearchStep:
    actual = beam_search_step(logits, scores, eos_token=eos, backend="cuda")
    expected = beam_search_step(logits, scores, eos_token=eos, backend="reference")
    for name in ("tokens", "parents", "finished_parents"):
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
        (1, 64, 2 * CHUNK + 5),
        (2, 3, 7 * CHUNK),
        (40, 2, 2 * CHUNK + 8),  # several chunks a slice
        (2, 6, 12345),
        (1, 256, 300),
        (1, 200, 1023),
    ],
)
def test_chooses_as_the_reference(B: int, K: int, V: int, dtype: torch.dtype) -> None:
    # In half precision thousands of logits are equal; the order among them is exact.
    logits, scores = random_inputs(B, K, V, dtype)
    assert_chooses_as_the_reference(logits, scores, eos=V // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", range(8))
def test_rows_begin_anywhere(offset: int, dtype: torch.dtype) -> None:
    V = CHUNK + 37
    logits, scores = random_inputs(2, 3, V, dtype)
    aligned = assert_chooses_as_the_reference(logits, scores, eos=5)
    buffer = torch.full((6 * (V + 1) + 16,), math.inf, device=DEVICE, dtype=dtype)
    shifted = buffer.as_strided((2, 3, V), (3 * (V + 1), V + 1, 1), offset)
    shifted.copy_(logits)
    step = beam_search_step(shifted, scores, eos_token=5, backend="cuda")
    for name, a, b in zip(BeamSearchStep._fields, step, aligned, strict=True):
        assert_bit_equal(name, a, b)


def test_ties_between_slices_go_to_the_lower_token() -> None:
    V = 5 * CHUNK
    logits = torch.zeros(1, 2, V, device=DEVICE)
    best = [CHUNK - 1, CHUNK, 2 * CHUNK + 7, 4 * CHUNK, V - 1]
    logits[:, :, best] = 9.0
    scores = torch.zeros(1, 2, device=DEVICE)
    step = assert_chooses_as_the_reference(logits, scores, eos=CHUNK)
    assert step.tokens.tolist() == [[CHUNK - 1, 2 * CHUNK + 7]]
    assert step.parents.tolist() == [[0, 0]]


@pytest.mark.parametrize("lowest", [0.0, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("K", [1, 4, 64])
def test_most_tokens_are_masked_by_one_number(K: int, lowest: float) -> None:
    V = 3 * CHUNK
    logits, scores = random_inputs(1, K, V)
    masked = torch.full_like(logits, lowest)
    masked[:, :, 100:V:1111] = logits[:, :, 100:V:1111] + 20.0
    assert_chooses_as_the_reference(masked, scores, eos=100)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("K", [4, 64, 256])
def test_sorted_logits(K: int, descending: bool) -> None:
    logits, scores = random_inputs(1, 1, 4 * CHUNK)
    logits = logits.sort(dim=-1, descending=descending).values
    assert_chooses_as_the_reference(
        logits.expand(1, K, -1), scores.expand(1, K) * torch.arange(K, device=DEVICE), eos=3
    )


def test_the_best_tokens_are_all_one_threads() -> None:
    # 64 of the tokens that one thread reads, and their neighbours, are far above the others.
    logits, scores = random_inputs(1, 64, 2 * CHUNK)
    logits[:, :, :CHUNK].unflatten(-1, (8, 1024))[..., :4] += 100.0
    logits[:, :, CHUNK:].unflatten(-1, (8, 1024))[..., 400:404] += 100.0
    assert_chooses_as_the_reference(logits, scores, eos=1)


def test_fewer_candidates_than_beams_of_many() -> None:
    K, V = 64, 2 * CHUNK
    logits = torch.full((2, K, V), -math.inf, device=DEVICE)
    logits[:, :, [0, 3, CHUNK + 1]] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    scores = torch.full((2, K), -math.inf, device=DEVICE)
    scores[0, 5] = 0.0
    assert_chooses_as_the_reference(logits, scores, eos=0)


def test_too_many_beams_are_refused() -> None:
    logits, scores = random_inputs(1, 257, 40)
    with pytest.raises(NotImplementedError, match="257 beams > 256"):
        beam_search_step(logits, scores, eos_token=2, backend="cuda")


def test_what_the_kernels_do_not_take_is_refused() -> None:
    logits, scores = random_inputs(2, 3, 40)
    reason = "temperature, edits, forced tokens, shortlists: not in the cuda kernels"
    with pytest.raises(NotImplementedError, match=reason):
        beam_search_step(
            logits, scores, eos_token=2, temperature=torch.ones(2, device=DEVICE), backend="cuda"
        )


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_invalid_is_found_in_any_slice(wrong: float) -> None:
    V = 3 * CHUNK + 5
    logits, scores = random_inputs(5, 70, V)
    for b, (k, v) in enumerate([(0, 0), (69, V - 1), (65, 2 * CHUNK), (3, 9)]):
        logits[b, k, v] = wrong
    scores[3, 3] = -math.inf
    logits[4] = -math.inf
    step = beam_search_step(logits, scores, eos_token=2, backend="cuda")
    assert step.invalid.tolist() == [True, True, True, False, False]
