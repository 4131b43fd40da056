"""What is timed is checked first: ours within its budget, and a peer that it is the same function.

The oracle of a case is computed once, for all providers and directions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.ops._cases import Case, Direction
from fused_attn.validation import (
    Comparison,
    case_inputs,
    compare,
    oracle_and_reference,
    run_case,
    run_function,
)

from .peers import Inputs, Peer, Run

PEER_BUDGETS = 20.0
"""Error budgets of ours (`fused_attn.validation.tolerance`) that a peer may use.

A budget is about 1e-6 of the largest element in fp32 and 1e-2 in bf16. Peers round more often than
ours, or sum in another order, which costs them a few budgets; 20 of them are still less than what a
wrong mask, another GELU or another eps changes, and less than the error of TF32 in fp32.
"""


class Agreement(NamedTuple):
    """How near the oracle a provider came."""

    error: float
    """The largest error beside the size of its tensor: max |x - oracle| / max |oracle|."""
    share: float
    """Of the budget, the largest part used."""


def require_correct(
    case: Case,
    backend: str | None,
    dtype: torch.dtype,
    device: str,
    direction: Direction = "forward+backward",
) -> Agreement:
    """How near ours is: outputs and gradients; of ``forward``, outputs alone.

    Raises:
        AssertionError: A result is outside its budget: a wrong kernel gets no time. Outputs and
            gradients count whatever the direction.
    """
    comparisons = _ours(case, backend, dtype, device)
    failed = [str(c) for c in comparisons if not c.passed]
    if failed:
        raise AssertionError(f"is wrong, so it is not timed: {'; '.join(failed)}")
    forward = [c for c in comparisons if not c.name.startswith("grad_")]
    return _worst(forward if direction == "forward" else comparisons)


def require_same_function(
    case: Case, peer: Peer, run: Run, dtype: torch.dtype, device: str, direction: Direction
) -> Agreement:
    """How near a peer is: outputs, and gradients where it has all outputs that ours has.

    Raises:
        AssertionError: It computes something else.
        Incomparable: The peer says that nothing can be compared.
    """
    wide, same = _expected(case, dtype, device)
    inputs = inputs_of(case, dtype, device)
    if direction == "forward":
        with torch.no_grad():
            outputs, gradients = run(inputs), {}
    else:
        outputs, gradients = run_function(case, inputs, run)
    found = dict(peer.comparable(case, inputs, outputs))
    if _outputs(wide) == found.keys():
        found |= gradients
    comparisons = [compare(name, found[name], wide[name], same[name]) for name in found]
    agreement = _worst(comparisons)
    if agreement.share > PEER_BUDGETS:
        wrong = "; ".join(str(c) for c in comparisons if c.share > PEER_BUDGETS)
        raise AssertionError(f"computes something else: {wrong}")
    return agreement


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """The case's inputs, which its providers and directions share: large ones take long to draw."""
    return case_inputs(case, dtype, device)


def forget() -> None:
    """Give up what is kept for a case's other providers and directions."""
    for kept in (inputs_of, _expected, _ours):
        kept.cache_clear()


@functools.lru_cache(maxsize=1)
def _expected(
    case: Case, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return oracle_and_reference(case, inputs_of(case, dtype, device))


@functools.lru_cache(maxsize=8)
def _ours(
    case: Case, backend: str | None, dtype: torch.dtype, device: str
) -> tuple[Comparison, ...]:
    actual = run_case(case, inputs_of(case, dtype, device), backend)
    wide, same = _expected(case, dtype, device)
    return tuple(compare(name, actual[name], wide[name], same[name]) for name in actual)


def _outputs(results: Inputs) -> set[str]:
    return {name for name in results if not name.startswith("grad_")}


def _worst(comparisons: list[Comparison] | tuple[Comparison, ...]) -> Agreement:
    return Agreement(
        max((c.max_error / c.size if c.size else 0.0 for c in comparisons), default=0.0),
        max((c.share for c in comparisons), default=0.0),
    )
