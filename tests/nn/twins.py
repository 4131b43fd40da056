"""A module of ours beside torch.nn's with the same parameters, run on the same inputs.

The oracle is torch.nn's module in fp64 and the budget the project's own, from torch.nn's error in
fp32: see ``fused_attn.validation.tolerance``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fused_attn.nn
from fused_attn.validation.tolerance import compare


def make_twins(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """``torch.nn``'s module and ours, with random parameters loaded strictly from each other."""
    with warnings.catch_warnings():
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


def run(module: nn.Module, inputs: Mapping[str, Any], call: Call) -> dict[str, Tensor]:
    """Outputs, and gradients of floating-point inputs and parameters where grad is enabled."""
    leaves = {
        name: value.detach().clone().requires_grad_(torch.is_grad_enabled())
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = call(module, {**inputs, **leaves})
    result = {f"output_{i}": output.detach() for i, output in enumerate(outputs)}
    if not torch.is_grad_enabled():
        return result
    generator = torch.Generator().manual_seed(2)
    cotangents = [
        torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
        for output in outputs
    ]
    parameters = dict(module.named_parameters())
    wanted = {**leaves, **parameters}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
        result[f"grad_{name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return result


def check_twins(
    theirs: nn.Module, ours: nn.Module, inputs: Mapping[str, Any], call: Call
) -> dict[str, Tensor]:
    """Compare outputs and every gradient; what ours gave is returned."""
    wide_inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    oracle = run(copy.deepcopy(theirs).double(), wide_inputs, call)
    peer = run(theirs, inputs, call)
    actual = run(ours, inputs, call)
    assert actual.keys() == oracle.keys()
    failures = [
        str(comparison)
        for name in actual
        if not (comparison := compare(name, actual[name], oracle[name], peer[name])).passed
    ]
    assert not failures, "\n".join(failures)
    return actual
