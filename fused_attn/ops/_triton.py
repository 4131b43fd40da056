"""What the launchers of Triton kernels share. Imports no triton: kernels load when they run."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


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


def strided_rows(tensor: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The rows of ``[..., E]`` as a kernel reads them.

    Returns:
        The tensor, copied only if its rows are not contiguous or two strides do not describe
        them; and ``(inner, outer_stride, inner_stride)``: row ``r`` begins at element
        ``(r // inner) * outer_stride + (r % inner) * inner_stride``.
    """
    levels: list[tuple[int, int]] = []  # (size, stride) of the leading dimensions, innermost first
    contiguous = tensor.size(-1) == 1 or tensor.stride(-1) == 1
    for size, stride in reversed(list(zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if not contiguous or len(levels) > 2:
        tensor = tensor.contiguous()
        levels = [(tensor.shape[:-1].numel(), tensor.size(-1))]
    levels += [(1, 0)] * (2 - len(levels))
    (inner, inner_stride), (_, outer_stride) = levels
    return tensor, (max(inner, 1), outer_stride, inner_stride)
