"""What the launchers of Triton kernels share. Imports no triton: kernels load when they run."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied if it is not contiguous."""
    return None if tensor is None else tensor.contiguous()


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches on the current stream."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def multiprocessor_count(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; 1 where the interpreter runs the kernels."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 1


class Target(NamedTuple):
    """What launches are made for."""

    backend: str
    warp_size: int
    architecture: str
    """``sm_90``, ``gfx942``, ...; ``interpreter`` where there is no GPU."""

    def register_options(self, registers: int) -> dict[str, int]:
        """Launch options that let a thread have this many registers.

        Without them NVIDIA's assembler may choose fewer, for more threads at once, and spill.
        """
        return {"maxnreg": registers} if self.backend == "cuda" else {}


@functools.cache
def target() -> Target:
    """The GPU's, or the interpreter's where there is none."""
    from triton.runtime import driver

    try:
        active = driver.active.get_current_target()
    except RuntimeError:
        return Target("interpreter", 32, "interpreter")
    architecture = f"sm_{active.arch}" if active.backend == "cuda" else str(active.arch)
    return Target(active.backend, active.warp_size, architecture)


def with_scratch_memory(launch: Callable[[], None], like: Tensor) -> None:
    """Launches a kernel that makes tensor descriptors, whose memory comes from PyTorch.

    The caller's own allocator, if there is one, stays as it is.
    """
    if not like.is_cuda:
        launch()
        return
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=like.device)

    def launch_with_allocator() -> None:
        triton.set_allocator(allocate)
        launch()

    contextvars.copy_context().run(launch_with_allocator)


# Rows that one stride describes have this many on the inner level: more than a kernel divides by.
_ALL_ROWS = 2**31 - 1


class StridedRows(NamedTuple):
    """Where row ``r`` of a tensor begins, in elements: at

    ``(r // inner) * outer_stride + (r % inner) * inner_stride``.
    """

    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def has_one_stride(self) -> bool:
        """Row ``r`` begins at ``r * inner_stride``."""
        return self.inner == _ALL_ROWS


def strided_rows(tensor: Tensor) -> tuple[Tensor, StridedRows]:
    """The rows of ``[..., E]`` as a kernel reads them.

    Returns:
        The tensor, copied only if its rows are not contiguous or two strides do not describe
        them; and where they begin.
    """
    if tensor.is_contiguous():
        return tensor, StridedRows(_ALL_ROWS, 0, tensor.size(-1))
    levels: list[tuple[int, int]] = []  # (size, stride) of the leading dimensions, innermost first
    contiguous = tensor.size(-1) == 1 or tensor.stride(-1) == 1
    for size, stride in reversed(list(zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    # Kernels divide in 32 bits.
    divisible = len(levels) < 2 or (len(levels) == 2 and levels[0][0] * levels[1][0] <= _ALL_ROWS)
    if not contiguous or not divisible:
        tensor = tensor.contiguous()
        return tensor, StridedRows(_ALL_ROWS, 0, tensor.size(-1))
    if len(levels) == 2:
        return tensor, StridedRows(levels[0][0], levels[1][1], levels[0][1])
    return tensor, StridedRows(_ALL_ROWS, 0, levels[0][1] if levels else 0)


class Rows(NamedTuple):
    """Tensors of rows, and what a kernel is told of them."""

    tensors: list[Tensor | None]
    numbers: list[int]
    """Three a tensor; strides in units of ``STRIDE_UNIT``."""
    flags: dict[str, Any]


def rows_of(*tensors: Tensor | None) -> Rows:
    """The rows of tensors as kernels read them; copied where strides do not describe them."""
    found = [(None, None) if tensor is None else strided_rows(tensor) for tensor in tensors]
    layouts = [layout for _, layout in found if layout is not None]
    step = math.gcd(*(stride for layout in layouts for stride in layout[1:]))
    unit = min(step & -step, 16) or 16
    numbers: list[int] = []
    for _, layout in found:
        if layout is None:
            numbers += (0, 0, 0)
        else:
            numbers += (layout.inner, layout.outer_stride // unit, layout.inner_stride // unit)
    one_stride = all(layout.has_one_stride for layout in layouts)
    return Rows(
        [tensor for tensor, _ in found], numbers, {"ONE_STRIDE": one_stride, "STRIDE_UNIT": unit}
    )


# The tile of a sum of partial gradients: as many rows as there are programs, up to this many, and
# the columns that are then left of its elements.
_REDUCE_MAX_ROWS = 512
_REDUCE_TILE = 8192


def reduce_partials(partial: Tensor, gradients: Sequence[Tensor]) -> None:
    """Sum what the programs of a backward left, in one order.

    Args:
        partial: ``[K, programs, width]``, fp32, contiguous.
        gradients: K tensors ``[width]``, fp32, to be written; K is at most 3.
    """
    from ._triton_kernels import reduce_partials_kernel

    K, programs, width = partial.shape
    block_m = min(next_power_of_2(programs), _REDUCE_MAX_ROWS)
    block_n = min(_REDUCE_TILE // block_m, next_power_of_2(width))
    reduce_partials_kernel[(ceil_div(width, block_n), K)](
        partial,
        *(gradients[k % K] for k in range(3)),
        programs,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8,
    )
