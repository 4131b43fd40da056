"""What a named case of an op is; each op's ``cases.py`` lists its own.

One list serves the tests, ``fused-attn validate`` and the benchmarks, so that nothing is timed
that was not checked.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "forward+backward"]

ELEMENTARY = 12
"""Operations that e^x counts in :meth:`Case.vector_flops`, and any other smooth function of one
number (tanh, a sigmoid, erf, GELU, or a derivative): six multiply-adds.

That is a polynomial of degree 4 with a reduction of its argument, or a shorter one beside a table;
the special-function unit of an NVIDIA GPU, an eighth as wide as the others, takes as long as 16.
"""
_PASSES = (("forward", False), ("backward", True))


@dataclass(frozen=True)
class Roof:
    """What a machine does at best: the model's three rates."""

    copies: tuple[tuple[int, float], ...]
    """Bytes moved, and seconds, of copies (or reads, where these are faster) of ascending size: a
    small one is bound by its launch and lies in a cache, a large one by memory."""
    products: Mapping[torch.dtype, float]
    """FLOP/s of a large matrix product."""
    vector: float | None = None
    """FLOP/s outside of matrix products, in fp32. None: what the best product has."""

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

    def vector_seconds(self, flops: int) -> float:
        """Seconds of so many operations outside of matrix products."""
        return flops / (self.vector or max(self.products.values()))


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

    # The three counts are lower bounds for any kernel that keeps the op's residuals: nothing is in
    # them that one could leave out, be it small. A boolean mask is taken to show everything.

    def flops(self, backward: bool = False) -> int:
        """Floating-point operations of the forward, or of the backward alone, as one reports them.

        Of matrix products where an op is made of them, a multiply-add being two; else all.
        """
        return 0

    def vector_flops(self, backward: bool = False) -> int:
        """Floating-point operations that no matrix product does: default all.

        An op with products names the others here. Those of :meth:`flops` and these may run at the
        same time, on units of their own.
        """
        return self.flops(backward)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Bytes that the forward, or the backward alone, must read and write at least once.

        What a row or a batch shares, such as a bias of the width, is small and not counted.
        """
        return 0

    def floor_seconds(self, roof: Roof, dtype: torch.dtype, direction: Direction) -> float:
        """The least time that the work can take under a roof: the longer of its two parts."""
        return max(self.floor_parts(roof, dtype, direction))

    def floor_parts(
        self, roof: Roof, dtype: torch.dtype, direction: Direction
    ) -> tuple[float, float]:
        """Seconds of a copy of :meth:`bytes_moved`, and of the operations.

        These are the longer of :meth:`flops` at the rate of a product and :meth:`vector_flops` at
        that of everything else.
        """
        moved, flops = self.work(dtype, direction)
        vector = sum(self.vector_flops(backward=b) for b in _backward(direction))
        operations = max(roof.product_seconds(flops, dtype), roof.vector_seconds(vector))
        return roof.copy_seconds(moved) if moved else 0.0, operations

    def work(self, dtype: torch.dtype, direction: Direction) -> tuple[int, int]:
        """Bytes moved and floating-point operations of a direction."""
        passes = _backward(direction)
        return (
            sum(self.bytes_moved(dtype.itemsize, backward=b) for b in passes),
            sum(self.flops(backward=b) for b in passes),
        )


def _backward(direction: Direction) -> list[bool]:
    return [backward for name, backward in _PASSES if name in direction]


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
