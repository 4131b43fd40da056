"""Runs a case three times: by the backend, by the reference likewise, and by the oracle in fp64."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops._cases import Case

from .tolerance import Comparison, compare


def case_inputs(case: Case, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """The case's inputs; the same values whenever and wherever they are made."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.op}/{case.name}".encode()))
    return case.inputs(dtype, torch.device(device), generator)


def run_case(
    case: Case, inputs: Mapping[str, Any], backend: str | None, backward: bool = True
) -> dict[str, Tensor]:
    """Run the public function and, where the case has gradients, its backward.

    Cotangents are drawn from a fixed seed by output, so every run of a case has the same ones.

    Returns:
        Tensors by name: the case's comparable outputs, and ``grad_<input>``.
    """
    outputs, gradients = run_function(
        case, inputs, lambda call: case.run(call, backend), backward=backward
    )
    return {**case.comparable(inputs, outputs), **gradients}


def run_function(
    case: Case,
    inputs: Mapping[str, Any],
    function: Callable[[Mapping[str, Any]], tuple[Tensor, ...]],
    backward: bool = True,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """:func:`run_case` of any function of the case's inputs.

    Returns:
        The detached outputs, and ``grad_<input>`` by name.
    """
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in case.differentiable
        if backward and isinstance(inputs.get(name), Tensor)
    }
    outputs = function({**inputs, **leaves})
    detached = tuple(o.detach() for o in outputs)
    if not leaves:
        return detached, {}
    roots = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(0)
    # Drawn in bf16's few bits, so that the cotangents are the same numbers in every dtype.
    cotangents = [
        torch.randn(o.shape, generator=generator).bfloat16().to(o.device).to(o.dtype) for o in roots
    ]
    gradients = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
    return detached, {
        f"grad_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def check_case(
    case: Case, backend: str | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Comparison]:
    """Compare a backend's outputs and gradients on a case with the oracle's."""
    inputs = case_inputs(case, dtype, device)
    actual = run_case(case, inputs, backend)
    wide, same = oracle_and_reference(case, inputs)
    return [compare(name, actual[name], wide[name], same[name]) for name in actual]


def oracle_and_reference(
    case: Case, inputs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """:func:`run_case` of the fp64 oracle, and of the reference in the inputs' dtype."""
    return run_case(case, widen(inputs), "reference"), run_case(case, inputs, "reference")


def widen(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with floating-point tensors in fp64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
