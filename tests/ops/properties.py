"""What the property tests of ops share: a drawn case beside the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_attn.ops._cases import Case
from fused_attn.validation import case_inputs, compare, fused_backends, run_case
from fused_attn.validation.oracle import oracle_and_reference
from fused_attn.validation.tolerance import Comparison


def each_backend(op: str) -> pytest.MarkDecorator:
    """Parametrises ``backend`` with the op's fused ones."""
    backends = fused_backends(op, "cpu")
    none = pytest.param("", marks=pytest.mark.skip(reason=f"{op}: no fused backend is available"))
    return pytest.mark.parametrize("backend", backends or [none])


def assert_agrees(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Raise AssertionError where a backend is beyond the error budget.

    The budget is made of the error that the reference happens to have, and with few numbers that
    may be luck: a wrong kernel is far beyond it, or beyond it with other numbers too.
    """
    for numbers in range(3):
        failed = [c for c in _compared(case, dtype, backend, numbers) if not c.passed]
        if not failed:
            return
        assert all(c.share < 2.0 for c in failed), "\n".join(map(str, failed))
    raise AssertionError("\n".join(map(str, failed)))


def _compared(case: Case, dtype: torch.dtype, backend: str, numbers: int) -> list[Comparison]:
    """Outputs one by one, gradients together; the case's name decides on its numbers."""
    case = replace(case, name=f"{case.name} {numbers}")
    inputs = case_inputs(case, dtype, "cpu")
    results = [run_case(case, inputs, backend), *oracle_and_reference(case, inputs)]
    return [compare(name, *tensors) for name, tensors in _joined(results).items()]


def _joined(results: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Tensors by name, and all gradients as one.

    Where a query sees a single key, its logit has no gradient but rounding errors, of the size of
    the numbers that cancel; so has a normalised row of one or two numbers. Beside the other
    gradients these are small; alone they have no scale.
    """
    table: dict[str, list[Tensor]] = {}
    for result in results:
        gradients = [t.flatten() for n, t in result.items() if n.startswith("grad_")]
        wide = torch.promote_types(gradients[0].dtype, gradients[-1].dtype)
        table.setdefault("gradients", []).append(torch.cat([g.to(wide) for g in gradients]))
        for name, tensor in result.items():
            if not name.startswith("grad_"):
                table.setdefault(name, []).append(tensor)
    return table
