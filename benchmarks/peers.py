"""What a benchmark of an op has beside ours: the peers of a case, present, absent or refusing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from fused_attn.ops._cases import Case

from .results import version

# A backward that is timed by itself runs again and again on the same residuals, which compiled code
# would otherwise write over.
torch._functorch.config.donated_buffer = False

Inputs = Mapping[str, Any]
Run = Callable[[Inputs], tuple[Tensor, ...]]
"""Computes a case's outputs from its inputs."""


class IncomparableError(Exception):
    """What a peer computes cannot be compared with the oracle's; the message says why."""


def same_outputs(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """A peer's outputs as `Case.comparable` names ours, one after the other."""
    return {f"output_{i}": output for i, output in enumerate(outputs)}


def unless_dropout(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Likewise where nothing is dropped: a peer drops other elements, of numbers of its own.

    Raises:
        IncomparableError: There is dropout.
    """
    if inputs.get("dropout_p", 0.0) > 0.0:
        raise IncomparableError("drops other elements than the oracle")
    return same_outputs(case, inputs, outputs)


@dataclass(frozen=True)
class Peer:
    """Another implementation of an op."""

    make: Callable[[Case], Run]
    """Prepares it for a case. It, or the first call, raises NotImplementedError with the reason
    where the peer cannot do what the case asks."""
    about: str
    """What it is, in a line of the report."""
    packages: tuple[str, ...] = ()
    """The distributions that it needs beside torch, as PyPI calls them."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    differentiable: bool = True
    comparable: Callable[[Case, Inputs, tuple[Tensor, ...]], dict[str, Tensor]] = same_outputs
    """By the names of `Case.comparable`, what must be as the oracle has it; raises
    :class:`IncomparableError` where nothing can be."""
    uses_torch_memory: bool = True
    """Its tensors are torch's, so that what it holds can be told."""

    def absent_reason(self) -> str:
        """Why it cannot be used on this machine; empty where it can."""
        missing = [package for package in self.packages if version(package) is None]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            return f"{' and '.join(missing)} {verb} not installed"
        return ""


def compiled(peer: Peer) -> Peer:
    """The same lines of PyTorch through ``torch.compile``, with static shapes."""

    def make(case: Case) -> Run:
        function = torch.compile(peer.make(case), dynamic=False)
        return lambda inputs: function(inputs)

    return Peer(make, "the same lines of PyTorch through torch.compile", comparable=peer.comparable)


def bound(make: Callable[[Case], Run], about: str) -> Peer:
    """Work that is a part of the case's: a time below which hardly anything could come.

    It is another function, so it is not compared.
    """

    def another(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        raise IncomparableError("is a part of the work, for a bound")

    return Peer(make, about, comparable=another)


def prepared(prepare: Callable[[Inputs], Callable[[], tuple[Tensor, ...]]]) -> Run:
    """A run that prepares each set of inputs when it first sees it, in a call that is not timed."""
    # With the inputs, so that an id is not that of others after them.
    known: dict[int, tuple[Inputs, Callable[[], tuple[Tensor, ...]]]] = {}

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if id(inputs) not in known:
            known[id(inputs)] = (inputs, prepare(inputs))
        return known[id(inputs)][1]()

    return run


def peers_of(op: str, device: str) -> dict[str, Peer]:
    """By name, the peers of an op's benchmark for a kind of device, absent ones too."""
    peers: dict[str, Peer] = importlib.import_module(f"benchmarks.bench_{op}").PEERS
    return {name: peer for name, peer in peers.items() if device in peer.devices}
