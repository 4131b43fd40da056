"""A module of ours beside torch.nn's with the same parameters, run on the same inputs.

The oracle is torch.nn's module in fp64 and the budget the project's own, from torch.nn's error in
fp32: see ``fused_attn.validation.tolerance``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_attn.nn
from fused_attn.validation.tolerance import compare


def make_twins(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """``torch.nn``'s module and ours, with random parameters loaded strictly from each other.

    The parameters are the same in whatever order tests run.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        # torch.nn.TransformerEncoder says when its nested tensors are out of reach.
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        theirs = getattr(nn, name)(*args, **kwargs)
    ours = getattr(fused_attn.nn, name)(*args, **kwargs)
    share_parameters(theirs, ours)
    return theirs, ours


def share_parameters(theirs: nn.Module, ours: nn.Module) -> None:
    """Randomise their parameters, load them into ours strictly, and back."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Biases start at 0 and norms at 1, which would hide what is done with them.
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


Call = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, ...]]


class Result(NamedTuple):
    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    """Of floating-point inputs and of parameters; empty where grad is disabled."""


def run(module: nn.Module, inputs: Mapping[str, Any], call: Call) -> Result:
    leaves = {
        name: value.detach().clone().requires_grad_(torch.is_grad_enabled())
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = call(module, {**inputs, **leaves})
    detached = tuple(output.detach() for output in outputs)
    if not torch.is_grad_enabled():
        return Result(detached, {})
    generator = torch.Generator().manual_seed(2)
    cotangents = [
        torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
        for output in outputs
    ]
    wanted = {**leaves, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(
        outputs,
        list(wanted.values()),
        cotangents,
        allow_unused=True,
        materialize_grads=True,
    )
    return Result(detached, dict(zip(wanted, gradients, strict=True)))


def check_twins(
    theirs: nn.Module, ours: nn.Module, inputs: Mapping[str, Any], call: Call
) -> tuple[Tensor, ...]:
    """Compare outputs and every gradient; our outputs are returned.

    All gradients are judged together, each divided by its own size: the error of one small
    tensor in one run is a matter of luck, that of all of them is not.
    """
    wide_inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    oracle = run(copy.deepcopy(theirs).double(), wide_inputs, call)
    peer = run(theirs, inputs, call)
    actual = run(ours, inputs, call)
    assert actual.gradients.keys() == oracle.gradients.keys()
    comparisons = [
        compare(f"output_{i}", *tensors)
        for i, tensors in enumerate(zip(actual.outputs, oracle.outputs, peer.outputs, strict=True))
    ]
    if oracle.gradients:
        sizes = _sizes(oracle.gradients)
        comparisons.append(
            compare(
                "gradients",
                _flat(actual.gradients, sizes),
                _flat(oracle.gradients, sizes),
                _flat(peer.gradients, sizes),
            )
        )
    failures = [str(comparison) for comparison in comparisons if not comparison.passed]
    assert not failures, "\n".join(failures)
    return actual.outputs


def _sizes(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of each; where one is nothing but rounding, a thousandth of the largest."""
    sizes = {name: g.double().square().mean().sqrt().item() for name, g in gradients.items()}
    floor = 1e-3 * max(sizes.values())
    return {name: max(size, floor) for name, size in sizes.items()}


def _flat(gradients: dict[str, Tensor], sizes: dict[str, float]) -> Tensor:
    return torch.cat([gradient.flatten() / sizes[name] for name, gradient in gradients.items()])
