"""Which GPU backend is the fastest, where that was measured.

A row belongs here when both backends were timed on that architecture in one run, and the run is in
the repository. Where there is no row, the order is that of ``_backend.py``. No row is here yet:
nothing has been measured on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fastest(NamedTuple):
    """The fastest backend of an op for a class of shapes on an architecture."""

    op: str
    architecture: str
    """``sm_90``, for example."""
    dtype: torch.dtype
    smallest: int
    """Size of the last dimension (head size, width, vocabulary), from this ..."""
    largest: int
    """... to this."""
    backend: str
    measurement: str
    """Where the times are: a file under ``benchmarks/results/``."""


FASTEST: tuple[Fastest, ...] = ()


def fastest(op: str, tensor: Tensor, table: tuple[Fastest, ...] = FASTEST) -> str:
    """Name of the fastest backend for a call on this tensor; empty where none was measured.

    Args:
        op: Name of the op, as in errors.
        tensor: The call's first tensor, on a GPU.
        table: What was measured.
    """
    rows = [row for row in table if row.op == op and row.dtype == tensor.dtype]
    if not rows:
        return ""
    major, minor = torch.cuda.get_device_capability(tensor.device)
    size = tensor.size(-1)
    for row in rows:
        if row.architecture == f"sm_{major}{minor}" and row.smallest <= size <= row.largest:
            return row.backend
    return ""
