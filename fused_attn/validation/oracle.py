"""Runs a case three times: by the backend, by the reference likewise, and by the oracle in fp64."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    cotangents: Sequence[Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """:func:`run_case` of any function of the case's inputs.

    Args:
        case: Whose inputs they are.
        inputs: Of the function.
        function: Returns its outputs.
        backward: Whether gradients are wanted, where the case has them.
        cotangents: Of the outputs that have a gradient. Default: drawn.

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
    if cotangents is None:
        cotangents = _cotangents([o.shape for o in roots])
    cotangents = [c.to(o.dtype).to(o.device) for c, o in zip(cotangents, roots, strict=True)]
    gradients = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
    return detached, {
        f"grad_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _cotangents(shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Drawn in bf16's few bits, so that the cotangents are the same numbers in every dtype.
    return [torch.randn(tuple(s), generator=generator).bfloat16() for s in shapes]


def check_case(
    case: Case, backend: str | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Comparison]:
    """Compare a backend's outputs and gradients on a case with the oracle's."""
    inputs = case_inputs(case, dtype, device)
    actual = run_case(case, inputs, backend)
    wide, same = oracle_and_reference(case, inputs)
    return compare_results(case, inputs, actual, wide, same)


def compare_results(
    case: Case,
    inputs: Mapping[str, Any],
    actual: Mapping[str, Tensor],
    wide: Mapping[str, Tensor],
    same: Mapping[str, Tensor],
) -> list[Comparison]:
    """Compare results by name with the oracle's, which may be those of a part."""
    part = case.part(inputs)
    select = part.select if part is not None else lambda tensor: tensor
    return [compare(name, select(actual[name]), wide[name], same[name]) for name in actual]


def oracle_and_reference(
    case: Case, inputs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """:func:`run_case` of the fp64 oracle, and of the reference in the inputs' dtype.

    Of the part that the case names, where the whole is too large (`Case.part`).
    """
    part = case.part(inputs)
    if part is None:
        return run_case(case, widen(inputs), "reference"), run_case(case, inputs, "reference")
    cotangents = [part.select(c) for c in _cotangents(part.output_shapes)]

    def run(given: Mapping[str, Any]) -> dict[str, Tensor]:
        outputs, gradients = run_function(
            case, given, lambda call: case.run(call, "reference"), cotangents=cotangents
        )
        return {**case.comparable(given, outputs), **gradients}

    return run(widen(part.inputs)), run(part.inputs)


def widen(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with floating-point tensors in fp64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
