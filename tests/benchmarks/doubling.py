"""A small op with its cases and peers, as the benchmarks find one: `install` puts it in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import IncomparableError, Inputs, Peer, Run
from fused_attn.ops._cases import Case, Roof

ROOF = Roof(((1 << 10, 1e-6), (1 << 20, 1e-3)), {torch.float32: 1e12})


class Doubling(Case):
    op = "doubling"
    differentiable = ("x",)

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        return {"x": torch.randn(1000, generator=generator).to(device, dtype), "dropout_p": 0.0}

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        return (inputs["x"] * (3.0 if backend == "wrong" else 2.0),)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        return 2 * 1000 * itemsize

    def flops(self, backward: bool = False) -> int:
        return 1000


CASES = (
    Doubling(name="edge", kind="edge"),
    Doubling(name="thousand", kind="benchmark"),
    Doubling(name="again", kind="benchmark"),
    Doubling(name="rarely", kind="benchmark"),
    Doubling(name="large", kind="benchmark", gpu_only=True),
)
THOUSAND = CASES[1]


def adding(case: Case) -> Run:
    return lambda inputs: (inputs["x"] + inputs["x"],)


def tripling(case: Case) -> Run:
    return lambda inputs: (inputs["x"] * 3.0,)


class Detour(torch.autograd.Function):
    """Right forward, wrong backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def refusing(case: Case) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        raise NotImplementedError("cannot double")

    return run


def raising(case: Case) -> Run:
    raise RuntimeError("out of order")


def nothing_to_compare(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...]) -> Any:
    raise IncomparableError("doubles another tensor")


PEERS = {
    "eager": Peer(adding, "a sum"),
    "tripling": Peer(tripling, "another function"),
    "wrong_gradient": Peer(lambda case: lambda inputs: (Detour.apply(inputs["x"]),), "a detour"),
    "refusing": Peer(refusing, "one that cannot"),
    "raising": Peer(raising, "one that fails"),
    "not_installed": Peer(adding, "a package that is not there", packages=("no-such-package",)),
    "forward_only": Peer(adding, "without a gradient", differentiable=False),
    "unchecked": Peer(tripling, "not compared", comparable=nothing_to_compare),
    "gpu_only": Peer(adding, "for GPUs", devices=("cuda",)),
}


def install(
    monkeypatch: pytest.MonkeyPatch, ours: Callable[[str, str], dict[str, str | None]] | None = None
) -> None:
    """Make the op known for the length of a test."""
    from benchmarks import operators

    monkeypatch.setitem(sys.modules, "benchmarks.bench_doubling", _module(PEERS=PEERS))
    monkeypatch.setitem(sys.modules, "fused_attn.ops.doubling.cases", _module(CASES=CASES))
    if ours is not None:
        monkeypatch.setattr(operators, "our_providers", ours)


def _module(**attributes: Any) -> ModuleType:
    module = ModuleType("doubling")
    vars(module).update(attributes)
    return module
