"""``bias_activation_dropout``: activations, gates, and widths that take most registers."""

from __future__ import annotations

import torch

from fused_attn.ops.bias_activation_dropout import triton as backend

from . import call, empty, quick

CALLS = (
    quick("bfloat16", width=4096, activation="gelu", dropout_p=0.1),
    call("bfloat16", width=4096, activation="identity"),
    quick("bfloat16", width=1376, activation="gelu_tanh", gated=True, dropout_p=0.1),
    call("float16", width=2048, activation="silu", gated=True),
    call("float32", width=2048, activation="relu", dropout_p=0.1, fp32_parameters=True),
    call("float32", width=2048, activation="gelu", gated=True, dropout_p=0.1),
    call("bfloat16", width=29, activation="gelu", gated=True, dropout_p=0.1),
    quick("float32", width=16381, activation="gelu", gated=True, dropout_p=0.1),
)


def launch(
    dtype: str,
    width: int,
    activation: str,
    gated: bool = False,
    dropout_p: float = 0.0,
    fp32_parameters: bool = False,
    rows: int = 4096,
) -> None:
    """Forward with a residual, and backward, on a GPU of 128 multiprocessors."""
    kind = getattr(torch, dtype)
    columns = 2 * width if gated else width
    x = empty(rows, columns, kind=kind)
    branch, grad = (empty(rows, width, kind=kind) for _ in range(2))
    bias = empty(columns, kind=torch.float32 if fp32_parameters else kind)
    seed = empty(1, kind=torch.int64)
    kinds = (activation, gated, dropout_p)
    backend.multiprocessor_count = lambda _: 128
    backend.forward(x, bias, branch, seed, *kinds)
    passes = activation == "identity" and not gated
    backend.backward(
        grad, None if passes else x, None if passes else bias, seed, *kinds, True, True
    )
