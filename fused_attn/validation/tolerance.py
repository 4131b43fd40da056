"""The error that a kernel may have, derived from data; the only tolerances in the project.

The oracle is the reference in fp64 on the same inputs. The budget is

    2 * error(reference in the kernel's dtype) + (eps(dtype) + 4 * eps(fp32)) * size(oracle)

once for the maximum error, with size = max |oracle|, and once for the root mean square, with
size = rms(oracle). The first term lets a kernel lose as much as plain PyTorch does and as much
again; the second covers cases in which the reference happens to be exact: one rounding at the
store and a few in the fp32 computation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FACTOR = 2.0
_COMPUTE_SLACK = 4.0 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Comparison:
    """How far one tensor is from the oracle, beside what is allowed."""

    name: str
    max_error: float
    max_budget: float
    rms_error: float
    rms_budget: float
    size: float = 0.0
    """max |oracle|: what an error is compared with."""
    problem: str = ""
    """What is wrong apart from the size of the error, e.g. a shape; empty if nothing is."""

    @property
    def passed(self) -> bool:
        """Both errors are within their budgets, and nothing else is wrong."""
        return (
            not self.problem
            and self.max_error <= self.max_budget
            and self.rms_error <= self.rms_budget
        )

    @property
    def share(self) -> float:
        """The larger part of a budget that was used: at most 1 when passed."""
        parts = [
            error / budget if budget > 0 else (0.0 if error == 0 else float("inf"))
            for error, budget in (
                (self.max_error, self.max_budget),
                (self.rms_error, self.rms_budget),
            )
        ]
        return max(parts)

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: max error {self.max_error:.3g} of {self.max_budget:.3g}, "
            f"rms {self.rms_error:.3g} of {self.rms_budget:.3g}"
        )


def compare(name: str, actual: Tensor, oracle: Tensor, same_precision: Tensor) -> Comparison:
    """Compare a kernel's tensor with the oracle's.

    Infinities must stand in the same places with the same sign (an lse of -inf is a result);
    NaN must not appear where the oracle has none, nor the other way round.

    Args:
        name: What it is, for the report.
        actual: The kernel's result, in its dtype.
        oracle: The reference's result in fp64, same shape.
        same_precision: The reference's result in the kernel's dtype, same shape.
    """
    if actual.shape != oracle.shape:
        return _wrong(name, f"shape {list(actual.shape)}, expected {list(oracle.shape)}")
    slack = torch.finfo(actual.dtype).eps + _COMPUTE_SLACK
    # Where the oracle is: on a GPU a large tensor is compared sooner than it is copied.
    got, want, low = (
        t.detach().to(oracle.device, torch.float64) for t in (actual, oracle, same_precision)
    )
    if not (got.isfinite().all() and want.isfinite().all()):
        if not torch.equal(got.isnan(), want.isnan()):
            return _wrong(name, f"{int((got.isnan() != want.isnan()).sum())} NaN out of place")
        special = want.isinf() | want.isnan()
        if not torch.equal(got.isinf(), want.isinf()) or not torch.equal(
            got[want.isinf()], want[want.isinf()]
        ):
            # A finite oracle beyond the range of fp16 is infinite in any fp16 result.
            overflow = want.abs() > torch.finfo(actual.dtype).max
            if not torch.equal(got.isinf() & ~overflow, want.isinf() & ~overflow):
                return _wrong(name, "infinities differ")
            special = special | overflow
        got, want, low = (t.masked_fill(special, 0.0) for t in (got, want, low))
    low = low.nan_to_num(0.0)
    if want.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0)
    error, reference_error = (got - want).abs(), (low - want).abs()
    return Comparison(
        name,
        max_error=error.max().item(),
        max_budget=_FACTOR * reference_error.max().item() + slack * want.abs().max().item(),
        rms_error=_rms(error),
        rms_budget=_FACTOR * _rms(reference_error) + slack * _rms(want),
        size=want.abs().max().item(),
    )


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _wrong(name: str, problem: str) -> Comparison:
    infinite = float("inf")
    return Comparison(name, infinite, 0.0, infinite, 0.0, problem=problem)
