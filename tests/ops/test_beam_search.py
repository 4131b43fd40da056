from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import BeamSearchStep, beam_search_step
from fused_attn.validation import fused_backends, op_cases

from .suite import OpSuite, assert_bit_equal

BACKENDS = ["reference", *fused_backends("beam_search", "cpu")]
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


class TestBeamSearch(OpSuite):
    op = "beam_search"
    refusals = frozenset(
        (backend, case.name)
        for backend in ("cpu", "cuda")
        for case in op_cases("beam_search")
        if case.process is not None
    )


def random_inputs(B: int, K: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(B, K, V, generator=generator)
    return logits, -5.0 * torch.rand(B, K, generator=generator)


def assert_same(actual: BeamSearchStep, expected: BeamSearchStep) -> None:
    for name, a, b in zip(BeamSearchStep._fields, actual, expected, strict=True):
        assert_bit_equal(name, a, b)


def brute_force(logits: np.ndarray, scores: np.ndarray, eos: int) -> dict[str, list]:
    """The step for one sentence, by listing all candidates in fp64 and sorting them."""
    K, V = logits.shape
    candidates = []
    for k in range(K):
        row = [float(x) for x in logits[k]]
        bad = any(math.isnan(x) or x == math.inf for x in row) or max(row) == -math.inf
        lse = math.nan
        if not bad:
            top = max(row)
            lse = top + math.log(math.fsum(math.exp(x - top) for x in row))
        for v in range(V):
            total = float(np.float32((float(scores[k]) + row[v]) - lse))
            if math.isnan(total) or total == -math.inf:
                candidates.append((math.inf, k, 0.0, v))
            else:
                candidates.append((-total, k, -row[v], v))
    candidates.sort()
    going_on = [(v, k, -total) for total, k, _, v in candidates if v != eos][:K]
    going_on += [(eos, 0, -math.inf)] * (K - len(going_on))
    ended = [(-math.inf, 0)] * K
    for i, (total, k, _, v) in enumerate(candidates[:K]):
        if v == eos and total != math.inf:
            ended[i] = (-total, k)
    return {
        "tokens": [v for v, _, _ in going_on],
        "parents": [k for _, k, _ in going_on],
        "scores": [s for _, _, s in going_on],
        "finished_scores": [s for s, _ in ended],
        "finished_parents": [k for _, k in ended],
    }


# A coarse grid, so that ties are common, and everything that is not a number.
LOGITS = st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.5, 40.0, -120.0, -math.inf])
ODD = st.sampled_from([math.inf, math.nan])


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    K, V = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    logits = [draw(st.lists(LOGITS, min_size=V, max_size=V)) for _ in range(K)]
    for row in draw(st.lists(st.integers(0, K - 1), max_size=2)):
        logits[row][draw(st.integers(0, V - 1))] = draw(ODD)
    score = st.sampled_from([0.0, -1.0, -2.5, -math.inf, math.nan])
    scores = draw(st.lists(score, min_size=K, max_size=K))
    return torch.tensor([logits]), torch.tensor([scores]), draw(st.integers(0, V - 1))


@on_each_backend
@settings(max_examples=200, deadline=None, derandomize=True)
@given(step=steps())
def test_equals_brute_force(backend: str, step: tuple[Tensor, Tensor, int]) -> None:
    logits, scores, eos = step
    expected = brute_force(logits[0].numpy(), scores[0].numpy(), eos)
    actual = beam_search_step(logits, scores, eos_token=eos, backend=backend)
    for name in ("scores", "finished_scores"):
        got, want = getattr(actual, name)[0], torch.tensor(expected[name])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    # Rows of different contents may tie in exact arithmetic and be a rounding apart in fp32.
    if len({tuple(row) for row in logits[0].tolist()}) == 1:
        for name in ("tokens", "parents", "finished_parents"):
            assert getattr(actual, name)[0].tolist() == expected[name], name


@on_each_backend
def test_one_beam_is_greedy(backend: str) -> None:
    logits, scores = random_inputs(6, 1, 1000)
    step = beam_search_step(logits, scores, eos_token=11, backend=backend)
    without_end = logits[:, 0].clone()
    without_end[:, 11] = -math.inf
    assert torch.equal(step.tokens, without_end.argmax(-1, keepdim=True))
    assert torch.equal(step.parents, torch.zeros(6, 1, dtype=torch.int64))
    ends = logits[:, 0].argmax(-1, keepdim=True) == 11
    assert torch.equal(step.finished_scores > -math.inf, ends)


@on_each_backend
def test_greedy_end(backend: str) -> None:
    logits = torch.tensor([[[0.0, 5.0, 1.0]]])
    step = beam_search_step(logits, torch.zeros(1, 1), eos_token=1, backend=backend)
    assert step.tokens.item() == 2
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(step.finished_scores[0, 0], expected[0, 0, 1])
    torch.testing.assert_close(step.scores[0, 0], expected[0, 0, 2])


@on_each_backend
def test_permuting_the_vocabulary_permutes_the_tokens(backend: str) -> None:
    logits, scores = random_inputs(3, 4, 9000)
    permutation = torch.randperm(9000, generator=torch.Generator().manual_seed(1))
    place = permutation.argsort()
    step = beam_search_step(logits, scores, eos_token=5, backend=backend)
    permuted = beam_search_step(
        logits[:, :, permutation], scores, eos_token=int(place[5]), backend=backend
    )
    assert torch.equal(permuted.tokens, place[step.tokens])
    assert torch.equal(permuted.parents, step.parents)
    assert torch.equal(permuted.finished_parents, step.finished_parents)
    torch.testing.assert_close(permuted.scores, step.scores)
    torch.testing.assert_close(permuted.finished_scores, step.finished_scores)


@on_each_backend
@pytest.mark.parametrize(("K", "V"), [(1, 40), (4, 32000), (7, 8193), (16, 20000)])
def test_a_sentence_does_not_depend_on_its_batch(backend: str, K: int, V: int) -> None:
    logits, scores = random_inputs(5, K, V)
    together = beam_search_step(logits, scores, eos_token=2, backend=backend)
    for b in range(5):
        alone = beam_search_step(logits[b : b + 1], scores[b : b + 1], eos_token=2, backend=backend)
        assert_same(alone, BeamSearchStep(*(t[b : b + 1] for t in together)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "K", "V"), [(1, 1, 262144), (1, 3, 50000), (3, 5, 33000)])
def test_results_do_not_depend_on_the_number_of_threads(
    B: int, K: int, V: int, dtype: torch.dtype
) -> None:
    logits, scores = random_inputs(B, K, V)
    logits = logits.to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        # Odd numbers put the cuts between threads inside rows.
        for count in (1, 2, 3, 5, 7):
            torch.set_num_threads(count)
            results.append(beam_search_step(logits, scores, eos_token=2))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same(result, results[0])


@on_each_backend
def test_equal_totals_of_different_logits_keep_the_order_of_the_logits(backend: str) -> None:
    # Rounded to fp32 beside a running score of -1e6, all totals are the same number.
    logits = torch.tensor([[[0.0, 1e-3, 3e-3, 2e-3, 1e-3]]])
    scores = torch.full((1, 1), -1e6)
    step = beam_search_step(logits, scores, eos_token=0, backend=backend)
    assert step.tokens.item() == 2
    two = beam_search_step(
        logits.expand(1, 3, 5), scores.expand(1, 3), eos_token=0, backend=backend
    )
    assert two.parents.tolist() == [[0, 0, 0]]
    assert two.tokens.tolist() == [[2, 3, 1]]
    assert len(set(two.scores[0].tolist())) == 1


@on_each_backend
@pytest.mark.parametrize("K", [1, 2, 4, 63, 64, 65, 130])
def test_all_tied_candidates_go_to_the_lowest_beam_and_token(backend: str, K: int) -> None:
    V = 9000
    step = beam_search_step(
        torch.zeros(2, K, V), torch.zeros(2, K), eos_token=V - 1, backend=backend
    )
    assert torch.equal(step.tokens, torch.arange(K).expand(2, K))
    assert torch.equal(step.parents, torch.zeros(2, K, dtype=torch.int64))
    assert bool((step.finished_scores == -math.inf).all())


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_cpu_chooses_as_the_reference(seed: int, dtype: torch.dtype) -> None:
    # In half precision thousands of logits are equal; the order among them is exact.
    logits, scores = random_inputs(2, 6, 12345, seed)
    logits = logits.to(dtype)
    actual = beam_search_step(logits, scores, eos_token=9, backend="cpu")
    expected = beam_search_step(logits, scores, eos_token=9, backend="reference")
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(actual.parents, expected.parents)
    assert torch.equal(actual.finished_parents, expected.finished_parents)


@on_each_backend
def test_log_sum_exp_is_accurate_whatever_the_order_of_the_logits(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = 4.0 * torch.randn(100_003, generator=generator)
    for logits in (base, base.sort().values, base.sort(descending=True).values, 40.0 * base):
        step = beam_search_step(logits[None, None], torch.zeros(1, 1), eos_token=7, backend=backend)
        exact = logits.double().log_softmax(-1)[step.tokens[0, 0]].item()
        assert step.scores.item() == pytest.approx(exact, rel=2e-7, abs=3e-7)


@on_each_backend
def test_impossible_beams_rank_last_in_order(backend: str) -> None:
    logits, _ = random_inputs(1, 3, 4)
    scores = torch.full((1, 3), -math.inf)
    step = beam_search_step(logits, scores, eos_token=1, backend=backend)
    assert step.tokens.tolist() == [[0, 2, 3]]
    assert step.parents.tolist() == [[0, 0, 0]]
    assert step.scores.tolist() == [[-math.inf] * 3]
    assert step.finished_scores.tolist() == [[-math.inf] * 3]


@on_each_backend
def test_results_are_detached_and_autograd_does_not_object(backend: str) -> None:
    logits, scores = random_inputs(2, 3, 50)
    logits.requires_grad_()
    scores.requires_grad_()
    step = beam_search_step(logits, scores, eos_token=2, backend=backend)
    assert not any(t.requires_grad for t in step)
    with torch.no_grad():
        assert_same(beam_search_step(logits, scores, eos_token=2, backend=backend), step)


def test_inputs_are_not_changed() -> None:
    logits, scores = random_inputs(2, 3, 50)
    before = logits.clone(), scores.clone()
    beam_search_step(logits, scores, eos_token=2)
    assert torch.equal(logits, before[0])
    assert torch.equal(scores, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp64_logits_run_on_the_reference(dtype: torch.dtype) -> None:
    logits, scores = random_inputs(2, 3, 50)
    step = beam_search_step(logits.double(), scores.to(dtype), eos_token=2)
    assert step.scores.dtype == dtype
    assert step.finished_scores.dtype == dtype


def test_wrong_types_are_named() -> None:
    logits, scores = random_inputs(2, 3, 50)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"logits": [1.0]}, "logits must be a tensor, got list"),
        ({"scores": None}, "scores must be a tensor, got NoneType"),
        (
            {"logits": logits.long()},
            "logits must have dtype float32, float16, bfloat16 or float64, got int64",
        ),
        ({"scores": scores.half()}, "scores must have dtype float32, got float16"),
        ({"scores": scores.double()}, "scores must have dtype float32, got float64"),
        (
            {"logits": logits.double(), "scores": scores.half()},
            "scores must have dtype float32 or float64, got float16",
        ),
        ({"eos_token": 2.0}, "eos_token must be an int, got float"),
    ]
    for change, message in wrong:
        arguments: dict[str, Any] = {"logits": logits, "scores": scores, "eos_token": 2, **change}
        with pytest.raises(TypeError, match=re.escape(f"beam_search_step: {message}")):
            beam_search_step(**arguments)


def test_wrong_shapes_and_values_are_named() -> None:
    logits, scores = random_inputs(2, 3, 50)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"logits": logits[0]}, "logits must have shape [B, K, V], got [3, 50]"),
        (
            {"scores": scores[:, :2]},
            "scores must have shape [B, K] with B = 2, K = 3 (from logits), got [2, 2]",
        ),
        (
            {"logits": logits[:, :0], "scores": scores[:, :0]},
            "logits must have at least one beam, got [2, 0, 50]",
        ),
        ({"eos_token": 50}, "eos_token must be in 0..V-1 with V = 50, got 50"),
        ({"eos_token": -1}, "eos_token must be in 0..V-1 with V = 50, got -1"),
        ({"scores": scores.to("meta")}, "scores must be on the device of logits, cpu, got meta"),
        ({"backend": "gpu"}, "unknown backend 'gpu', expected one of cpu, cuda, reference"),
    ]
    for change, message in wrong:
        arguments: dict[str, Any] = {"logits": logits, "scores": scores, "eos_token": 2, **change}
        with pytest.raises(ValueError, match=re.escape(f"beam_search_step: {message}")):
            beam_search_step(**arguments)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
def test_a_named_backend_does_not_fall_back() -> None:
    logits, scores = random_inputs(2, 3, 50)
    with pytest.raises(
        NotImplementedError,
        match=r"(?s)beam_search_step: backend 'cpu' cannot run this call:\n  logits \[2, 3, 50\] "
        r"float64 cpu\n  - dtype torch.float64.*available here: reference",
    ):
        beam_search_step(logits.double(), scores, eos_token=2, backend="cpu")
