"""What a named case of an op is; each op's ``cases.py`` lists its own.

One list serves the tests, ``fused-attn validate`` and the benchmarks, so that nothing is timed
that was not checked.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case(abc.ABC):
    """A call of an op's public function, made from a seed."""

    name: str
    """Unique within the op, e.g. ``causal_ragged``."""
    kind: Literal["edge", "typical", "benchmark"]
    """Edge cases are small and strange, typical ones small and ordinary, benchmark ones large."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    gradcheck: bool = False
    """Small and smooth enough for numerical differentiation of the reference in fp64."""

    gpu_only: bool = False
    """A benchmark too large for a CPU."""

    op: ClassVar[str]
    differentiable: ClassVar[tuple[str, ...]] = ()
    """Inputs whose gradients are checked, where they are there."""

    @abc.abstractmethod
    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Keyword arguments of the public function, without ``backend``.

        The generator is a CPU generator: values are drawn on the CPU in fp32 and moved, so a
        case is the same on every device.
        """

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Call the public function and return its outputs as a tuple."""

    def comparable(
        self, inputs: Mapping[str, Any], outputs: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """Floating-point tensors, by name, that must agree with the oracle's within the budget."""
        return {f"output_{i}": output for i, output in enumerate(outputs)}

    def flops(self, backward: bool = False) -> int:
        """Floating-point operations of the forward, or of the backward alone."""
        return 0

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Bytes that the forward, or the backward alone, must read and write at least once."""
        return 0


# --- arrangements of attention's inputs --------------------------------------------------------

Inputs = dict[str, Any]


def heads_last(inputs: Inputs) -> None:
    """Lay query, key and value out as a projection to ``[B, T, H * D]`` gives them."""
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)


def columns_first(inputs: Inputs) -> None:
    """Lay out the columns of query, key and value one after the other."""
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].transpose(2, 3).contiguous().transpose(2, 3)


def shared_keys(inputs: Inputs) -> None:
    """One head of keys and values for all, as in multi-query attention, without copies."""
    for name in ("key", "value"):
        inputs[name] = inputs[name][:, :1].expand_as(inputs[name])


def large_logits(inputs: Inputs) -> None:
    """Make the weights of one key nearly 1."""
    inputs["query"] = inputs["query"] * 64.0
