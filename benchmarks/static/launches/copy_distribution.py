"""``copy_distribution`` and ``copy_nll``."""

from __future__ import annotations

import torch

from fused_attn.ops.copy_distribution import triton as backend

from . import call, empty, quick

CALLS = (
    quick("bfloat16", gate=True, lengths=True),
    call("float32", gate=True, lengths=True),
    call("bfloat16", fp32_copy=True, lengths=True),
    # Rows that are not aligned.
    call("float16", V=50257, S=400),
)


def launch(
    dtype: str,
    V: int = 32000,
    S: int = 64,
    gate: bool = False,
    fp32_copy: bool = False,
    lengths: bool = False,
) -> None:
    """Forward and backward, with targets and without."""
    B, T = 16, 64
    kind = getattr(torch, dtype)
    beside = torch.float32 if fp32_copy else kind
    logits = empty(B, T, V, kind=kind)
    source = (
        empty(B, T, S, kind=beside),
        empty(B, 1, S, kind=torch.int64),
        empty(B, T, kind=beside) if gate else None,
        empty(B, kind=torch.int64) if lengths else None,
    )
    for targets in (empty(B, T, kind=torch.int64), None):
        output, lse = backend.forward(logits, *source, targets, V + 16, -100)
        backend.backward(output, logits, *source, targets, lse, -100)
