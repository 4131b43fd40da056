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

Run = Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
"""Computes a case's outputs from its inputs."""


@dataclass(frozen=True)
class Peer:
    """Another implementation of an op."""

    make: Callable[[Case], Run]
    """Prepares it for a case. It, or the first call, raises NotImplementedError with the reason
    where the peer cannot do what the case asks."""
    about: str
    """What it is, in a line of the report."""
    package: str = ""
    """The distribution that it needs beside torch, as PyPI calls it."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    differentiable: bool = True

    def absent_reason(self) -> str:
        """Why it cannot be used on this machine; empty where it can."""
        if self.package and version(self.package) is None:
            return f"{self.package} is not installed"
        return ""


def compiled(peer: Callable[[Case], Run]) -> Peer:
    """The same lines of PyTorch through ``torch.compile``, with static shapes."""

    def make(case: Case) -> Run:
        function = torch.compile(peer(case), dynamic=False)
        return lambda inputs: function(inputs)

    return Peer(make, "the same lines of PyTorch through torch.compile")


def peers_of(op: str, device: str) -> dict[str, Peer]:
    """By name, the peers of an op's benchmark for a kind of device, absent ones too."""
    peers: dict[str, Peer] = importlib.import_module(f"benchmarks.bench_{op}").PEERS
    return {name: peer for name, peer in peers.items() if device in peer.devices}
