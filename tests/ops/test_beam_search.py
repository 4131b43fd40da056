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

from fused_attn import BeamSearchStep, TokenEdits, beam_search_step, token_edits
from fused_attn.validation import fused_backends, op_cases

from .suite import OpSuite, assert_bit_equal

BACKENDS = ["reference", *fused_backends("beam_search", "cpu")]
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
processing = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
"""The backends that take temperature, edits, forced tokens and shortlists."""


class TestBeamSearch(OpSuite):
    op = "beam_search"
    refusals = frozenset(
        ("cuda", case.name) for case in op_cases("beam_search") if case.process is not None
    )


def random_inputs(B: int, K: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(B, K, V, generator=generator)
    return logits, -5.0 * torch.rand(B, K, generator=generator)


def assert_same(actual: BeamSearchStep, expected: BeamSearchStep) -> None:
    for name, a, b in zip(BeamSearchStep._fields, actual, expected, strict=True):
        assert_bit_equal(name, a, b)


def brute_force(
    logits: np.ndarray,
    scores: np.ndarray,
    eos: int,
    temperature: float = 1.0,
    edits: list[dict[int, tuple[float, float]]] | None = None,
    forced: int = -1,
    shortlist: list[int] | None = None,
) -> dict[str, list]:
    """The step for one sentence, by listing all candidates in fp64 and sorting them.

    ``edits`` has for each beam the factor and the offset by token.
    """
    K, V = logits.shape
    candidates: list[tuple] = []
    for k in range(K):
        row = [float(x) / temperature for x in logits[k]]
        known = [v for v in range(V) if shortlist is None or v in shortlist]
        counting = [row[v] for v in known]
        bad = any(math.isnan(x) or x == math.inf for x in counting)
        lse = math.nan
        if not bad and max(counting, default=-math.inf) > -math.inf:
            top = max(counting)
            lse = top + math.log(math.fsum(math.exp(x - top) for x in counting))
        for v in range(V):
            factor, offset = (edits[k] if edits is not None else {}).get(v, (1.0, 0.0))
            is_edited = (factor, offset) != (1.0, 0.0)
            total = (float(scores[k]) + row[v]) - lse
            if is_edited:
                total = (float(scores[k]) + factor * (row[v] - lse)) + offset
            total = float(np.float32(total))
            possible = v in known and forced in (-1, v)
            if math.isnan(total) or total == -math.inf or not possible:
                candidates.append((math.inf, k, False, 0.0, v))
            else:
                candidates.append((-total, k, is_edited, 0.0 if is_edited else -row[v], v))
    candidates.sort()
    going_on = [(v, k, -total) for total, k, *_, v in candidates if v != eos][:K]
    going_on += [(eos, 0, -math.inf)] * (K - len(going_on))
    ended = [(-math.inf, 0)] * K
    for i, (total, k, *_, v) in enumerate(candidates[:K]):
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


# Triton's interpreter takes as long for one example as a compiled kernel for a hundred.
FEWER = {"triton": 10}


@on_each_backend
def test_equals_brute_force(backend: str) -> None:
    @settings(max_examples=200 // FEWER.get(backend, 1), deadline=None, derandomize=True)
    @given(step=steps())
    def check(step: tuple[Tensor, Tensor, int]) -> None:
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

    check()


@st.composite
def processed_steps(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
    """Any of temperature, edits, a forced token and a shortlist, in the words of brute_force."""
    step = draw(steps())
    K, V = step[0].shape[1:]
    options: dict[str, Any] = {}
    token = st.integers(0, V - 1)
    if draw(st.booleans()):
        options["temperature"] = draw(st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0]))
    if draw(st.booleans()):
        # A grid again, so that edited tokens tie with each other and with the rest.
        change = st.tuples(
            st.sampled_from([1.0, 0.5, 2.0]), st.sampled_from([0.0, 1.0, -2.0, 38.0, -math.inf])
        )
        row = st.dictionaries(token, change, max_size=V)
        options["edits"] = draw(st.lists(row, min_size=K, max_size=K))
    if draw(st.integers(0, 3)) == 0:
        options["forced"] = draw(st.integers(-1, V))
    if draw(st.booleans()):
        options["shortlist"] = sorted(draw(st.sets(token)))
    return step, options


def tensors_of(options: dict[str, Any], K: int) -> dict[str, Any]:
    """The options of brute_force as the op takes them, in a batch of one."""
    result: dict[str, Any] = {}
    if "temperature" in options:
        result["temperature"] = torch.tensor([options["temperature"]])
    if "edits" in options:
        N = 1 + max(len(row) for row in options["edits"])
        tokens = torch.full((1, K, N), -1)
        factors, offsets = torch.full((1, K, N), 3.0), torch.full((1, K, N), 5.0)
        for k, row in enumerate(options["edits"]):
            for n, (token, change) in enumerate(row.items()):
                tokens[0, k, n] = token
                factors[0, k, n], offsets[0, k, n] = change
        result["edits"] = TokenEdits(tokens, factors, offsets)
    if "forced" in options:
        result["forced_tokens"] = torch.tensor([options["forced"]])
    if "shortlist" in options:
        result["shortlist"] = torch.tensor([[*options["shortlist"], -1]])
    return result


@processing
def test_processed_equals_brute_force(backend: str) -> None:
    @settings(max_examples=400 // FEWER.get(backend, 1), deadline=None, derandomize=True)
    @given(drawn=processed_steps())
    def check(drawn: tuple[tuple[Tensor, Tensor, int], dict[str, Any]]) -> None:
        (logits, scores, eos), options = drawn
        K = logits.size(1)
        expected = brute_force(logits[0].numpy(), scores[0].numpy(), eos, **options)
        actual = beam_search_step(
            logits, scores, eos_token=eos, **tensors_of(options, K), backend=backend
        )
        for name in ("scores", "finished_scores"):
            # Sorted: what rounding alone tells apart may change ranks, and slots of what ends.
            got = getattr(actual, name)[0].sort(descending=True).values
            want = torch.tensor(expected[name]).sort(descending=True).values
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    check()


@processing
@pytest.mark.parametrize("seed", range(40))
def test_ties_of_processed_candidates_equal_brute_force(backend: str, seed: int) -> None:
    # The log-sum-exp is exactly 0 and totals are whole numbers: order is exact, ties are many.
    rng = np.random.default_rng(seed)
    K, V = int(rng.integers(1, 6)), int(rng.integers(12, 60))
    logits = torch.from_numpy(-100.0 - rng.integers(0, 4, (1, K, V))).float()
    logits[:, :, int(rng.integers(0, V))] = 0.0
    scores = torch.from_numpy(-rng.integers(0, 3, (1, K))).float()
    eos = int(rng.integers(0, V))
    change = [(1.0, 0.0), (1.0, 1.0), (1.0, -2.0), (2.0, 100.0), (1.0, -math.inf)]
    options: dict[str, Any] = {
        "edits": [
            {
                int(v): change[int(rng.integers(0, len(change)))]
                for v in rng.permutation(V)[: rng.integers(0, V + 1)]
            }
            for _ in range(K)
        ]
    }
    if seed % 3 == 0:
        options["shortlist"] = sorted(
            {int(v) for v in rng.integers(0, V, V)} | {int(logits[0, 0].argmax())}
        )
    expected = brute_force(logits[0].numpy(), scores[0].numpy(), eos, **options)
    step = beam_search_step(
        logits, scores, eos_token=eos, **tensors_of(options, K), backend=backend
    )
    for name, want in expected.items():
        assert getattr(step, name)[0].tolist() == want, name


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


def together(B: int, K: int, V: int, seed: int = 0) -> dict[str, Any]:
    """Temperature, edits, forced tokens and shortlists, different ones for each sentence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(B, K, V, generator=generator).argsort(dim=-1)[:, :, : V // 3]
    offsets = torch.randn(tokens.shape, generator=generator)
    offsets[:, :, ::5] = -math.inf
    listed = torch.rand(B, V, generator=generator).argsort(dim=-1)[:, : 2 * V // 3].sort().values
    return {
        "temperature": torch.rand(B, generator=generator) + 0.5,
        "edits": TokenEdits(tokens, torch.rand(tokens.shape, generator=generator) + 0.5, offsets),
        "forced_tokens": torch.where(torch.arange(B) == 1, listed[:, 7], -1),
        "shortlist": listed,
    }


def of_sentence(options: dict[str, Any], b: int) -> dict[str, Any]:
    return {
        name: TokenEdits(*(t[b : b + 1] for t in value))
        if isinstance(value, TokenEdits)
        else value[b : b + 1]
        for name, value in options.items()
    }


@processing
@pytest.mark.parametrize(("K", "V"), [(1, 40), (4, 32000), (7, 8193)])
def test_a_processed_sentence_does_not_depend_on_its_batch(backend: str, K: int, V: int) -> None:
    logits, scores = random_inputs(4, K, V)
    options = together(4, K, V)
    step = beam_search_step(logits, scores, eos_token=2, **options, backend=backend)
    for b in range(4):
        alone = beam_search_step(
            logits[b : b + 1],
            scores[b : b + 1],
            eos_token=2,
            **of_sentence(options, b),
            backend=backend,
        )
        assert_same(alone, BeamSearchStep(*(t[b : b + 1] for t in step)))


@pytest.mark.parametrize(("B", "K", "V"), [(1, 1, 70001), (3, 5, 33000)])
def test_processed_results_do_not_depend_on_the_number_of_threads(B: int, K: int, V: int) -> None:
    logits, scores = random_inputs(B, K, V)
    options = together(B, K, V)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, 7):
            torch.set_num_threads(count)
            results.append(beam_search_step(logits, scores, eos_token=2, **options))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same(result, results[0])


@processing
def test_edits_that_change_nothing_are_none(backend: str) -> None:
    # Ties too: half of the logits are equal.
    logits = random_inputs(3, 4, 500)[0].round()
    scores = torch.zeros(3, 4)
    tokens = torch.rand(3, 4, 500).argsort(dim=-1)[:, :, :300]
    edits = TokenEdits(tokens, torch.ones(3, 4, 300), torch.zeros(3, 4, 300))
    assert_same(
        beam_search_step(logits, scores, eos_token=7, edits=edits, backend=backend),
        beam_search_step(logits, scores, eos_token=7, backend=backend),
    )


@processing
@pytest.mark.parametrize("seed", range(4))
def test_forbidding_is_a_total_of_minus_infinity(backend: str, seed: int) -> None:
    # Its probability goes nowhere: the others keep theirs.
    logits, scores = random_inputs(2, 4, 700, seed)
    tokens = torch.rand(2, 4, 700).argsort(dim=-1)[:, :, :650]
    edits = TokenEdits(tokens, torch.ones(2, 4, 650), torch.full((2, 4, 650), -math.inf))
    step = beam_search_step(logits, scores, eos_token=7, edits=edits, backend=backend)
    total = scores.double()[:, :, None] + logits.double().log_softmax(-1)
    total = total.scatter(2, tokens, -math.inf)
    total[:, :, 7] = -math.inf
    best, place = total.flatten(1).topk(4)
    torch.testing.assert_close(step.scores.double(), best, rtol=1e-6, atol=1e-6)
    assert torch.equal(step.tokens, place % 700)
    assert torch.equal(step.parents, place // 700)


@processing
def test_a_shortlist_is_a_smaller_vocabulary(backend: str) -> None:
    logits, scores = random_inputs(2, 4, 900)
    shortlist = torch.arange(5, 900, 7).expand(2, -1)
    step = beam_search_step(logits, scores, eos_token=12, shortlist=shortlist, backend=backend)
    alone = beam_search_step(logits[:, :, 5::7], scores, eos_token=1, backend=backend)
    assert torch.equal(step.tokens, 5 + 7 * alone.tokens)
    for name in ("parents", "scores", "finished_scores", "finished_parents", "invalid"):
        assert_bit_equal(name, getattr(step, name), getattr(alone, name))


@processing
def test_temperature_divides_the_logits(backend: str) -> None:
    logits, scores = random_inputs(2, 4, 900)
    heat = torch.tensor([0.25, 4.0])  # powers of two, so that dividing rounds nothing
    step = beam_search_step(logits, scores, eos_token=2, temperature=heat, backend=backend)
    expected = beam_search_step(logits / heat[:, None, None], scores, eos_token=2, backend=backend)
    assert torch.equal(step.tokens, expected.tokens)
    assert torch.equal(step.parents, expected.parents)
    torch.testing.assert_close(step.scores, expected.scores)


@processing
def test_a_forced_token_keeps_its_probability(backend: str) -> None:
    logits, scores = random_inputs(2, 4, 900)
    forced = torch.tensor([33, 2])
    step = beam_search_step(logits, scores, eos_token=2, forced_tokens=forced, backend=backend)
    log_probability = logits.double().log_softmax(-1)
    total, order = (scores + log_probability[:, :, 33])[0].sort(descending=True)
    assert step.tokens[0].tolist() == [33] * 4
    assert torch.equal(step.parents[0], order)
    torch.testing.assert_close(step.scores[0].double(), total, rtol=1e-6, atol=1e-6)
    total, order = (scores + log_probability[:, :, 2])[1].sort(descending=True)
    assert torch.equal(step.finished_parents[1], order)
    torch.testing.assert_close(step.finished_scores[1].double(), total, rtol=1e-6, atol=1e-6)
    assert step.scores[1].tolist() == [-math.inf] * 4


@on_each_backend
def test_invalid_is_nan_or_infinity_where_it_counts(backend: str) -> None:
    logits, scores = random_inputs(6, 2, 40)
    logits[0, 1, 39] = math.nan
    logits[1, 0, 3] = math.inf
    logits[2, 0, 3], scores[2, 0] = math.nan, -math.inf
    logits[3, 0, 3], scores[3, 0] = math.nan, math.nan
    logits[4] = -math.inf
    step = beam_search_step(logits, scores, eos_token=2, backend=backend)
    assert step.invalid.tolist() == [True, True, False, False, False, False]


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
    if backend == "triton" and K > 64:
        pytest.skip("triton takes up to 64 beams")
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


def some_edits(B: int, K: int, N: int) -> TokenEdits:
    return TokenEdits(torch.arange(N).repeat(B, K, 1), torch.ones(B, K, N), torch.zeros(B, K, N))


def test_wrong_types_are_named() -> None:
    logits, scores = random_inputs(2, 3, 50)
    edits = some_edits(2, 3, 4)
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
        ({"temperature": 0.7}, "temperature must be a tensor, got float"),
        ({"temperature": torch.ones(2).half()}, "temperature must have dtype float32, got float16"),
        ({"edits": (1, 2, 3)}, "edits must be a TokenEdits, got tuple"),
        ({"edits": edits._replace(factors=1.0)}, "edits.factors must be a tensor, got float"),
        (
            {"edits": edits._replace(tokens=edits.tokens.int())},
            "edits.tokens must have dtype int64, got int32",
        ),
        (
            {"edits": edits._replace(offsets=edits.offsets.double())},
            "edits.offsets must have dtype float32, got float64",
        ),
        ({"forced_tokens": 3}, "forced_tokens must be a tensor, got int"),
        ({"forced_tokens": torch.ones(2)}, "forced_tokens must have dtype int64, got float32"),
        ({"shortlist": [1, 2]}, "shortlist must be a tensor, got list"),
        ({"shortlist": torch.ones(2, 4)}, "shortlist must have dtype int64, got float32"),
    ]
    for change, message in wrong:
        arguments: dict[str, Any] = {"logits": logits, "scores": scores, "eos_token": 2, **change}
        with pytest.raises(TypeError, match=re.escape(f"beam_search_step: {message}")):
            beam_search_step(**arguments)


def test_wrong_shapes_and_values_are_named() -> None:
    logits, scores = random_inputs(2, 3, 50)
    edits = some_edits(2, 3, 4)
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
        ({"temperature": torch.ones(2, 1)}, "temperature must have shape [B], got [2, 1]"),
        (
            {"temperature": torch.ones(3)},
            "temperature must have shape [B] with B = 2 (from logits), got [3]",
        ),
        (
            {"temperature": torch.ones(2, device="meta")},
            "temperature must be on the device of logits, cpu, got meta",
        ),
        (
            {"edits": some_edits(2, 2, 4)},
            "edits.tokens must have shape [B, K, N] with B = 2, K = 3 (from logits), got [2, 2, 4]",
        ),
        (
            {"edits": edits._replace(factors=torch.ones(2, 3, 5))},
            "edits.factors must have the shape of edits.tokens, [2, 3, 4], got [2, 3, 5]",
        ),
        (
            {"forced_tokens": torch.zeros(1, dtype=torch.int64)},
            "forced_tokens must have shape [B] with B = 2 (from logits), got [1]",
        ),
        (
            {"shortlist": torch.zeros(3, 4, dtype=torch.int64)},
            "shortlist must have shape [B, N] with B = 2 (from logits), got [3, 4]",
        ),
        ({"shortlist": torch.arange(4)}, "shortlist must have shape [B, N], got [4]"),
        ({"backend": "gpu"}, "unknown backend 'gpu', expected one of cpu, cuda, reference, triton"),
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


# --- token_edits ------------------------------------------------------------------------------


def edits_by_rules(history: list[int], rules: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """Factor and offset of each token that a rule concerns, for one beam, rule by rule."""
    factors: dict[int, float] = {}
    offsets: dict[int, float] = {}
    n = rules.get("no_repeat_ngram", 0)
    if rules.get("repetition_penalty", 1.0) != 1.0:
        factors = dict.fromkeys(history, rules["repetition_penalty"])
    if n > 0:
        ending = tuple(history[len(history) - n + 1 :]) if len(history) >= n - 1 else None
        for i in range(len(history) - n + 1):
            if tuple(history[i : i + n - 1]) == ending:
                offsets[history[i + n - 1]] = -math.inf
    for token, bias in zip(rules.get("bias_tokens", []), rules.get("biases", []), strict=True):
        offsets[token] = offsets.get(token, 0.0) + bias
    for token in rules.get("banned_tokens", []):
        offsets[token] = -math.inf
    if rules.get("blocked_end", False):
        offsets[0] = -math.inf
    return {
        token: (factors.get(token, 1.0), offsets.get(token, 0.0))
        for token in {*factors, *offsets}
        if token >= 0
    }


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[dict[str, Any]]]:
    """Two sentences of two beams, and rules for each."""
    token = st.integers(0, 4)
    rules, beams = [], []
    names = draw(st.sets(st.sampled_from(["penalty", "ngram", "banned", "bias", "end"])))
    for _ in range(2):
        length = draw(st.integers(0, 12))
        row = st.lists(token, min_size=length, max_size=length)
        beams.append([draw(row), draw(row)])
        rule: dict[str, Any] = {}
        if "penalty" in names:
            rule["repetition_penalty"] = draw(st.sampled_from([1.0, 1.5, 0.5]))
        if "ngram" in names:
            rule["no_repeat_ngram"] = draw(st.integers(0, 4))
        if "banned" in names:
            rule["banned_tokens"] = draw(st.lists(st.integers(-1, 6), min_size=3, max_size=3))
        if "bias" in names:
            rule["bias_tokens"] = draw(st.lists(st.integers(-1, 4), min_size=7, max_size=7))
            bias = st.sampled_from([0.5, -2.0, 0.0, 3.25, -math.inf])
            rule["biases"] = draw(st.lists(bias, min_size=7, max_size=7))
        if "end" in names:
            rule["blocked_end"] = draw(st.booleans())
        rules.append(rule)
    return beams, rules


@settings(max_examples=300, deadline=None, derandomize=True)
@given(drawn=histories())
def test_token_edits_equal_the_rules_one_by_one(
    drawn: tuple[list[list[list[int]]], list[dict[str, Any]]],
) -> None:
    beams, rules = drawn
    T = 1 + max(len(row) for sentence in beams for row in sentence)
    # What is behind a length counts for nothing: tokens that would be forbidden.
    history = torch.randint(0, 5, (2, 2, T), generator=torch.Generator().manual_seed(T))
    for b, sentence in enumerate(beams):
        for k, row in enumerate(sentence):
            history[b, k, : len(row)] = torch.tensor(row, dtype=torch.int64)
    lengths = torch.tensor([len(sentence[0]) for sentence in beams])
    options = {name: torch.tensor([rule[name] for rule in rules]) for name in rules[0]}
    edits = token_edits(history, lengths, **options, max_ngram=4, eos_token=0)
    for b in range(2):
        for k in range(2):
            slots = list(zip(*(t[b, k].tolist() for t in edits), strict=True))
            listed = {token: (factor, offset) for token, factor, offset in slots if token >= 0}
            assert len(listed) == sum(token >= 0 for token, _, _ in slots), "a token twice"
            wanted = edits_by_rules(beams[b][k], rules[b])
            for token in {*listed, *wanted}:
                assert listed.get(token, (1.0, 0.0)) == wanted.get(token, (1.0, 0.0)), token


def test_no_rule_makes_no_edit() -> None:
    history = torch.zeros(2, 3, 4, dtype=torch.int64)
    lengths = torch.tensor([4, 2])
    assert token_edits(history, lengths).tokens.shape == (2, 3, 0)
    edits = token_edits(history, lengths, repetition_penalty=torch.ones(2))
    assert bool((edits.tokens == -1).all())


def test_token_edits_names_what_is_wrong() -> None:
    history, lengths = torch.zeros(2, 3, 4, dtype=torch.int64), torch.tensor([4, 2])
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    wrong: list[tuple[type[Exception], dict[str, Any], str]] = [
        (TypeError, {"history": [1]}, "history must be a tensor, got list"),
        (TypeError, {"lengths": 3}, "lengths must be a tensor, got int"),
        (TypeError, {"history": history.float()}, "history must have dtype int64, got float32"),
        (TypeError, {"lengths": lengths.int()}, "lengths must have dtype int64, got int32"),
        (ValueError, {"history": history[0]}, "history must have shape [B, K, T], got [3, 4]"),
        (
            ValueError,
            {"lengths": lengths[:1]},
            "lengths must have shape [B] with B = 2 (from history), got [1]",
        ),
        (
            ValueError,
            {"lengths": lengths.to("meta")},
            "lengths must be on the device of history, cpu, got meta",
        ),
        (TypeError, {"repetition_penalty": 1.2}, "repetition_penalty must be a tensor, got float"),
        (
            TypeError,
            {"repetition_penalty": torch.ones(2).double()},
            "repetition_penalty must have dtype float32, got float64",
        ),
        (
            ValueError,
            {"banned_tokens": lengths},
            "banned_tokens must have shape [B, N], got [2]",
        ),
        (
            ValueError,
            {"banned_tokens": tokens[:1]},
            "banned_tokens must have shape [B, N] with B = 2 (from history), got [1, 5]",
        ),
        (
            ValueError,
            {"no_repeat_ngram": lengths.to("meta")},
            "no_repeat_ngram must be on the device of history, cpu, got meta",
        ),
        (TypeError, {"max_ngram": 2.0}, "max_ngram must be an int, got float"),
        (ValueError, {"max_ngram": -1}, "max_ngram must be at least 0, got -1"),
        (TypeError, {"eos_token": 2.0}, "eos_token must be an int, got float"),
        (
            ValueError,
            {"bias_tokens": tokens},
            "bias_tokens and biases must be given together, got one of them",
        ),
        (
            ValueError,
            {"bias_tokens": tokens, "biases": torch.zeros(2, 4)},
            "biases must have the shape of bias_tokens, [2, 5], got [2, 4]",
        ),
        (
            ValueError,
            {"blocked_end": torch.tensor([True, False])},
            "blocked_end must be given with eos_token, got None",
        ),
    ]
    for error, change, message in wrong:
        arguments: dict[str, Any] = {"history": history, "lengths": lengths, **change}
        with pytest.raises(error, match=re.escape(f"token_edits: {message}")):
            token_edits(arguments.pop("history"), arguments.pop("lengths"), **arguments)
