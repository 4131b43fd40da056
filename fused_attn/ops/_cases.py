"""What a named case of an op is; each op's ``cases.py`` lists its own.

One list serves the tests, ``fused-attn validate`` and the benchmarks, so that nothing is timed
that was not checked.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "forward+backward"]
_PASSES = (("forward", False), ("backward", True))


@dataclass(frozen=True)
class Roof:
    """What a machine does at best, as measured on it: the model's two rates."""

    copies: tuple[tuple[int, float], ...]
    """Bytes read and written, and seconds, of copies of ascending size: a small one is bound by its
    launch and lies in a cache, a large one by memory."""
    products: Mapping[torch.dtype, float]
    """FLOP/s of a large matrix product."""

    def copy_seconds(self, moved: int) -> float:
        """Seconds of a copy that reads and writes so many bytes.

        Between two measured sizes a straight line on logarithmic axes; beyond them the rate of the
        largest, or the time of the smallest.
        """
        (least, shortest), (most, longest) = self.copies[0], self.copies[-1]
        if moved <= least:
            return shortest
        if moved >= most:
            return longest * moved / most
        for (low, before), (high, after) in itertools.pairwise(self.copies):
            if moved <= high:
                part = math.log(moved / low) / math.log(high / low)
                return before * (after / before) ** part
        raise AssertionError("sizes ascend")

    def product_seconds(self, flops: int, dtype: torch.dtype) -> float:
        """Seconds of so many operations at the rate of a matrix product.

        A dtype that was not measured has the best rate, so that the result stays a floor.
        """
        return flops / self.products.get(dtype, max(self.products.values()))


@dataclass(frozen=True)
class Part:
    """A call on some of the inputs whose results are some of the whole call's."""

    inputs: dict[str, Any]
    """Of the part."""
    output_shapes: tuple[tuple[int, ...], ...]
    """Of the whole call's outputs."""
    select: Callable[[Tensor], Tensor]
    """From an output, cotangent or gradient of the whole call to the part's."""


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

    def part(self, inputs: Mapping[str, Any]) -> Part | None:
        """Of a call too large for the oracle, a part that does not depend on the rest.

        None: the oracle can have the whole.
        """
        return None

    def flops(self, backward: bool = False) -> int:
        """Floating-point operations of the forward, or of the backward alone."""
        return 0

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Bytes that the forward, or the backward alone, must read and write at least once."""
        return 0

    def floor_seconds(self, roof: Roof, dtype: torch.dtype, direction: Direction) -> float:
        """The least time that the work can take under a roof: the longer of its two parts."""
        return max(self.floor_parts(roof, dtype, direction))

    def floor_parts(
        self, roof: Roof, dtype: torch.dtype, direction: Direction
    ) -> tuple[float, float]:
        """Seconds of a copy of :meth:`bytes_moved`, and of a product of :meth:`flops`."""
        moved, flops = self.work(dtype, direction)
        return roof.copy_seconds(moved) if moved else 0.0, roof.product_seconds(flops, dtype)

    def work(self, dtype: torch.dtype, direction: Direction) -> tuple[int, int]:
        """Bytes moved and floating-point operations of a direction."""
        passes = [backward for name, backward in _PASSES if name in direction]
        return (
            sum(self.bytes_moved(dtype.itemsize, backward=b) for b in passes),
            sum(self.flops(backward=b) for b in passes),
        )


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
