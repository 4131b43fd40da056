"""What is benchmarked: each op's benchmark cases, ours and plain PyTorch on the same inputs.

A `bench_<op>.py` names its op and gives `peer(case)`; everything else is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.ops._cases import Case
from fused_attn.validation import case_inputs, check_case, op_cases

Run = Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
"""Computes a case's outputs from its inputs."""

Call = Callable[[], object]
"""To be timed."""


def benchmark_cases(op: str, device: str = "cpu") -> list[Case]:
    """The op's cases of kind ``benchmark`` for a device.

    On a GPU, whose time is lent by the minute, those of its size alone, where the op has any.
    """
    cases = [case for case in op_cases(op) if case.kind == "benchmark"]
    large = [case for case in cases if case.gpu_only]
    if device == "cuda" and large:
        return large
    return [case for case in cases if not case.gpu_only]


def directions(case: Case) -> tuple[str, ...]:
    """``forward``, and ``forward+backward`` where the case has gradients."""
    return ("forward", "forward+backward") if case.differentiable else ("forward",)


def require_correct(case: Case, dtype: torch.dtype) -> None:
    """Raise unless our result is within the error budget: a wrong kernel gets no time.

    Raises:
        AssertionError: It is not.
    """
    failed = [str(c) for c in check_case(case, None, dtype) if not c.passed]
    if failed:
        raise AssertionError(f"{case.op} {case.name} is wrong, so it is not timed: {failed}")


def ours(case: Case) -> Run:
    """The public function with the default backend."""
    return lambda inputs: case.run(inputs, None)


def bind(case: Case, run: Run, inputs: Mapping[str, Any], direction: str) -> Call:
    """A call without arguments, to be timed."""
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return run(inputs)

        return forward
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in case.differentiable
        if isinstance(inputs.get(name), Tensor)
    }
    call = {**inputs, **leaves}
    roots = [o for o in run(call) if o.requires_grad]
    cotangents = [torch.randn_like(o) for o in roots]

    def forward_and_backward() -> object:
        outputs = [o for o in run(call) if o.requires_grad]
        return torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)

    return forward_and_backward


def total(count: Callable[..., int], *arguments: int, direction: str) -> int:
    """Sum of the forward's count and, in that direction, the backward's."""
    forward = count(*arguments)
    return forward + (count(*arguments, backward=True) if "backward" in direction else 0)


def copy_of(moved: int, device: torch.device | str) -> Call:
    """A copy that reads half of the bytes and writes half: the floor of what memory bounds."""
    source = torch.randint(256, (max(1, moved // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def parametrize(op: str) -> pytest.MarkDecorator:
    """Rows (case, direction) of an op's benchmark."""
    return pytest.mark.parametrize(
        ("case", "direction"),
        [
            pytest.param(case, direction, id=f"{case.name}-{direction}")
            for case in benchmark_cases(op)
            for direction in directions(case)
        ],
    )


def time_provider(benchmark: Any, case: Case, direction: str, provider: str, run: Run) -> None:
    """Time one provider with pytest-benchmark; ours is checked first."""
    dtype = case.dtypes[0]
    if provider == "fused_attn":
        require_correct(case, dtype)
    benchmark.group = f"{case.op} {case.name} {direction}"
    benchmark.extra_info.update(provider=provider, dtype=str(dtype))
    benchmark(bind(case, run, case_inputs(case, dtype, "cpu"), direction))
