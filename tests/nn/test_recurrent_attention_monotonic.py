"""Monotonic alignments beside an enumeration of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_attn.nn import RecurrentAttention
from fused_attn.nn._monotonic import expected_alignments, hard_alignments

END = None  # where a step stops that has chosen nothing


def alignments(chances: list[list[float]], start: int | None) -> Iterator[tuple[float, list]]:
    """Every way to align the steps from ``start`` on, with its probability."""
    if not chances:
        yield 1.0, []
        return
    first, *rest = chances
    stops = [END] if start is END else [*range(start, len(first)), END]
    for stop in stops:
        passed = [] if start is END else first[start:stop]
        chance = math.prod(1.0 - p for p in passed)
        if stop is not END:
            chance *= first[stop]
        for probability, others in alignments(rest, stop):
            yield chance * probability, [stop, *others]


def enumerated(energy: Tensor, previous: Tensor) -> Tensor:
    """``[T, S]``: each position's probability in each step, over all alignments."""
    chances = energy.sigmoid().tolist()
    total = torch.zeros_like(energy)
    for start, weight in enumerate(previous.tolist()):
        for probability, stops in alignments(chances, start):
            for t, stop in enumerate(stops):
                if stop is not END:
                    total[t, stop] += weight * probability
    return total


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def beginning(*shape: int) -> Tensor:
    previous = torch.zeros(shape, dtype=torch.float64)
    previous[..., 0] = 1.0
    return previous


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 5), (2, 1), (3, 4), (4, 3), (5, 2)])
def test_expectations_equal_an_enumeration(T: int, S: int) -> None:
    energy = draw(2, 3, T, S)
    for previous in (beginning(2, 3, S), draw(2, 3, S).abs().softmax(-1) * 0.9):
        actual = expected_alignments(energy, previous)
        for b in range(2):
            for h in range(3):
                expected = enumerated(energy[b, h], previous[b, h])
                torch.testing.assert_close(actual[b, h], expected)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 6), (4, 5), (7, 3)])
def test_hard_equals_the_recursion_with_certain_choices(T: int, S: int) -> None:
    energy = draw(50, T, S)
    energy[:10] = -1.0  # nothing is ever chosen
    energy[10, 0, 0] = 0.0  # p = 1/2 is chosen
    certain = torch.where(energy >= 0.0, math.inf, -math.inf)
    for place in range(S + 1):
        previous = torch.zeros(50, S, dtype=torch.float64)
        previous[:, place : place + 1] = 1.0  # at last: behind the end
        expected = expected_alignments(certain, previous)
        assert torch.equal(hard_alignments(energy, previous), expected)
        assert torch.equal(expected.sum(-1), expected.amax(-1))
    assert not hard_alignments(energy, beginning(50, S))[:10].any()
    assert hard_alignments(energy, beginning(50, S))[10, 0, 0] == 1.0


@pytest.mark.parametrize(("T", "S"), [(1, 6), (3, 4), (4, 1)])
def test_gradients(T: int, S: int) -> None:
    energy = draw(2, T, S).requires_grad_()
    previous = draw(2, S).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(expected_alignments, (energy, previous))


@pytest.mark.parametrize("T", [1, 60])
def test_is_exact_where_products_underflow(T: int) -> None:
    """fp32 loses a rounding a step and position; cumulative products give 0 or NaN here."""
    S = 200
    energy = draw(4, T, S, scale=6.0).float()
    energy[0] += 30.0  # certain choices: 1 - p is far below the spacing of fp32 at 1
    energy[1] -= 30.0  # hardly any
    energy[2, :, 150:] = -math.inf  # a length
    energy[3, ::2] = 200.0
    exact, leaf = energy.double().requires_grad_(), energy.clone().requires_grad_()
    expected = expected_alignments(exact, beginning(4, S))
    actual = expected_alignments(leaf, beginning(4, S).float())
    seen = expected > 1e-30
    assert seen[:, 0].any(-1).all()
    error = (actual.double() - expected)[seen].abs() / expected[seen]
    eps = torch.finfo(torch.float32).eps
    assert error.max() < (T + S) * eps
    assert (actual[~seen] <= 1.01e-30).all()
    for tensor, alignment in ((exact, expected), (leaf, actual)):
        (alignment * torch.linspace(0.0, 1.0, S)).sum().backward()
        assert tensor.grad.isfinite().all()
    # Gradients are differences of what later steps see, T at most.
    assert exact.grad.abs().max() > 1000 * T * eps
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=T * eps)
    assert not leaf.grad[2, :, 150:].any()


def test_steps_equal_all_at_once() -> None:
    energy, previous = draw(3, 5, 7), beginning(3, 7)
    for align in (expected_alignments, hard_alignments):
        whole, row = align(energy, previous), previous
        for t in range(5):
            row = align(energy[:, t : t + 1], row)[:, 0]
            torch.testing.assert_close(row, whole[:, t])


@pytest.mark.parametrize(("T", "S"), [(0, 4), (3, 0), (1, 0), (0, 0)])
def test_nothing_to_align(T: int, S: int) -> None:
    energy, previous = draw(2, T, S), torch.ones(2, S, dtype=torch.float64)
    for align in (expected_alignments, hard_alignments):
        assert align(energy, previous).shape == (2, T, S)


def test_noise_in_training_alone() -> None:
    torch.manual_seed(0)
    module = RecurrentAttention("dot", 4, 4, monotonic=True, monotonic_noise=2.0)
    queries, source = torch.zeros(500, 2, 4), torch.zeros(500, 5, 4)
    memory = module.read(source)
    first, second = (module(queries, memory)[1] for _ in range(2))
    assert not torch.equal(first, second)
    # The first step's first weight is the sigmoid of the bias and the noise.
    noise = first[:, 0, 0].detach().logit() - module.monotonic_bias
    assert abs(noise.mean()) < 0.3
    assert 1.8 < noise.std() < 2.2
    module.eval()
    first, second = (module(queries, memory)[1] for _ in range(2))
    assert torch.equal(first, second)
