"""Loads the compiled library once, and remembers why it is absent."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch


@functools.cache
def load() -> str | None:
    """Load the compiled library.

    Returns:
        None when it is loaded, else the reason why it is not.
    """
    found = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(
        Path(__file__).parent.glob("_C*.pyd")
    )
    if not found:
        return (
            "the C++ extension was not built (no C++ compiler at installation): install g++, then "
            "`pip install --no-build-isolation --force-reinstall --no-deps fused_attn`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return (
            f"the C++ extension does not load with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}): build it again with this torch"
        )
    return None


def cpu_instruction_set() -> str:
    """Name of the instruction set that the CPU kernels use here, e.g. ``avx2``."""
    reason = load()
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.fused_attn_C.cpu_isa()


def compiled_instruction_sets() -> list[str]:
    """Names of the instruction sets that the CPU kernels were compiled for.

    Call it only after :func:`load` has returned None.
    """
    return torch.ops.fused_attn_C.compiled_instruction_sets()


def cuda_unavailable_reason() -> str:
    """Why the compiled library has no CUDA kernels; empty when it has them.

    Call it only after :func:`load` has returned None.
    """
    if not hasattr(torch.ops.fused_attn_C, "cuda_architectures"):
        return "the extension was built without CUDA kernels (nvcc and a CUDA torch are needed)"
    return ""


@functools.cache
def load_cuda_host() -> str | None:
    """Load the library that executes the CUDA kernels on CPU tensors: ``FUSED_ATTN_CUDA_HOST``.

    Returns:
        None when it is loaded, else the reason why it is not.
    """
    path = os.environ.get("FUSED_ATTN_CUDA_HOST", "")
    if path == "":
        return "runs on cuda tensors only, got cpu"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"FUSED_ATTN_CUDA_HOST does not load: {str(error).splitlines()[0]}"
    return None


def cuda_operators(device: torch.device) -> Any:
    """The private operators of the ``cuda`` backend for tensors on a device."""
    return torch.ops.fused_attn_cuda_host if device.type == "cpu" else torch.ops.fused_attn_C
