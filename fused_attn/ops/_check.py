"""Shape and dtype errors, in one wording.

A message is ``<op>: <what must hold>, got <what came>``. TypeError for type and dtype,
ValueError for value and shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
MAX_HEAD_SIZE = 256
"""Of the fused attention kernels."""


def check_tensor(op: str, name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the dtype is fp32, fp16 or bf16 (fp64 is for the reference)."""
    if tensor.dtype not in FLOATING and tensor.dtype != torch.float64:
        raise TypeError(
            f"{op}: {name} must have dtype float32, float16, bfloat16 or float64, got "
            f"{_name(tensor.dtype)}"
        )


def check_dtype(op: str, name: str, tensor: Tensor, expected: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype is one of ``expected``."""
    if tensor.dtype not in expected:
        names = " or ".join(dict.fromkeys(_name(dtype) for dtype in expected))
        raise TypeError(f"{op}: {name} must have dtype {names}, got {_name(tensor.dtype)}")


def check_same(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one dtype and one device."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other_name}, {_name(other.dtype)}, got "
            f"{_name(tensor.dtype)}"
        )
    check_device(op, name, tensor, other_name, other)


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, got "
            f"{tensor.device}"
        )


def check_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Raise ValueError unless the tensor has as many dimensions as ``layout`` names.

    ``layout`` is written as in the docstrings: ``[B, H, T, D]``.
    """
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape {layout}, got {list(tensor.shape)}")


def check_broadcastable(
    op: str, name: str, tensor: Tensor, layout: str, shape: tuple[int, ...]
) -> None:
    """Raise ValueError unless the tensor can be broadcast to ``shape``, which is ``layout``."""
    sizes = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        size != 1 and size != full for size, full in zip(sizes, shape, strict=True)
    ):
        raise ValueError(
            f"{op}: {name} must be broadcastable to {layout} = {list(shape)}, got "
            f"{list(tensor.shape)}"
        )


def check_seed(op: str, seed: Tensor | None, other_name: str, other: Tensor) -> None:
    """Raise unless the seed of dropout, where there is one, is ``[1]`` int64 beside ``other``."""
    if seed is None:
        return
    check_tensor(op, "seed", seed)
    check_dtype(op, "seed", seed, (torch.int64,))
    check_device(op, "seed", seed, other_name, other)
    if seed.dim() != 1 or seed.size(0) != 1:
        raise ValueError(f"{op}: seed must have shape [1], got {list(seed.shape)}")


def head_reasons(query: Tensor, value: Tensor) -> list[str]:
    """Why the fused attention kernels cannot take these heads; empty if they can."""
    reasons = []
    if query.dtype not in FLOATING:
        reasons.append(f"dtype {query.dtype}: float32, float16 or bfloat16 only")
    if query.size(-1) > MAX_HEAD_SIZE:
        reasons.append(f"head size {query.size(-1)} > {MAX_HEAD_SIZE}")
    if value.size(-1) > MAX_HEAD_SIZE:
        reasons.append(f"head size {value.size(-1)} of value > {MAX_HEAD_SIZE}")
    return reasons


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
