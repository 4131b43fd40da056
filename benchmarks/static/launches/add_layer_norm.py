"""``add_layer_norm``: widths, types, and what takes registers."""

from __future__ import annotations

from typing import Any

import torch

from fused_attn.ops.add_layer_norm import triton as backend

from . import call, empty, quick

# Dropout and the bias of the branch, in the sum and out of it; all that takes registers.
_PRE_NORM: dict[str, Any] = {"dropout_p": 0.1, "x_bias": True, "return_sum": True}
_POST_NORM: dict[str, Any] = {"dropout_p": 0.1, "x_bias": True}
_FP32_STREAM: dict[str, Any] = {"fp32_residual": True, "fp32_parameters": True}
CALLS = (
    # Many rows share a tile.
    call("bfloat16", width=1, x_bias=True),
    call("bfloat16", width=29, **_PRE_NORM),
    call("float32", width=29, is_rms=True, dropout_p=0.1),
    call("bfloat16", width=64, fp32_parameters=True),
    call("float32", width=256),
    quick("bfloat16", width=512, **_POST_NORM),
    call("float16", width=768, is_rms=True, residual=False),
    # Divisible by what 16 bytes hold, and not by 16, which triton looks for.
    quick("bfloat16", width=1000, x_bias=True),
    call("bfloat16", width=1021, **_POST_NORM),
    quick("float32", width=1021, **_POST_NORM, **_FP32_STREAM),
    quick("bfloat16", width=1024),
    call("bfloat16", width=1024, **_PRE_NORM, **_FP32_STREAM),
    call("float32", width=1024, **_POST_NORM),
    call("bfloat16", width=2048, return_sum=True, fp32_sum=True, is_rms=True),
    # One row a tile.
    call("bfloat16", width=4096),
    quick("bfloat16", width=4096, **_PRE_NORM),
    call("float32", width=4096, **_POST_NORM),
    call("bfloat16", width=5120, return_sum=True),
    call("bfloat16", width=8192, fp32_parameters=True),
    call("bfloat16", width=8192, return_sum=True, **_FP32_STREAM),
    # Slices of a row in the backward.
    call("float16", width=12288, is_rms=True, **_POST_NORM),
    call("bfloat16", width=16381, **_POST_NORM),
    call("float32", width=16384),
    # Two walks over a row in the forward.
    quick("bfloat16", width=65536, **_PRE_NORM),
    call("bfloat16", width=65536, **_POST_NORM),
)


def launch(
    dtype: str,
    width: int,
    rows: int = 16384,
    dropout_p: float = 0.0,
    is_rms: bool = False,
    x_bias: bool = False,
    residual: bool = True,
    fp32_residual: bool = False,
    fp32_parameters: bool = False,
    return_sum: bool = False,
    fp32_sum: bool = False,
) -> None:
    """Forward and backward on a GPU of 132 multiprocessors.

    RMSNorm has no bias. Every parameter needs a gradient.
    """
    kind = getattr(torch, dtype)
    parameter_kind = torch.float32 if fp32_parameters else kind
    residual_kind = torch.float32 if fp32_residual else kind
    sum_kind = torch.float32 if fp32_sum else residual_kind
    x, grad_output = empty(rows, width, kind=kind), empty(rows, width, kind=kind)
    branch_bias = empty(width, kind=parameter_kind) if x_bias else None
    stream = empty(rows, width, kind=residual_kind) if residual else None
    weight = empty(width, kind=parameter_kind)
    bias = None if is_rms else empty(width, kind=parameter_kind)
    seed = empty(1, kind=torch.int64) if dropout_p > 0.0 else None
    sum_dtype = sum_kind if return_sum else None
    backend.multiprocessor_count = lambda _: 132
    _, total, mean, rstd = backend.forward(
        x, branch_bias, stream, weight, bias, seed, 1e-5, dropout_p, is_rms, sum_dtype
    )
    separate = residual and (dropout_p > 0.0 or residual_kind != kind)
    sources = (total, None, None) if return_sum else (x, branch_bias, stream)
    backend.backward(
        grad_output,
        total if return_sum else None,
        *sources,
        mean,
        rstd,
        weight,
        seed,
        dropout_p,
        is_rms,
        return_sum,
        residual_kind if separate else None,
        x_bias,
        True,
        not is_rms,
    )
