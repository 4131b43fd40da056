"""``recurrent_cell``: its kinds, types, and sizes."""

from __future__ import annotations

import torch

from fused_attn.ops.recurrent_cell import triton as backend
from fused_attn.ops.recurrent_cell.contract import GATES

from . import call, empty, quick

CALLS = (
    quick("bfloat16", kind="lstm", size=1024),
    quick("bfloat16", kind="gru", size=512, fp32_state=True),
    call("float32", kind="lstm", size=512),
    call("float32", kind="gru", size=320),
    call("float16", kind="tanh", size=256),
    call("bfloat16", kind="relu", size=256),
    # A width without a common divisor takes most registers.
    call("bfloat16", kind="lstm", size=29),
)


def launch(dtype: str, kind: str, size: int, fp32_state: bool = False, rows: int = 4096) -> None:
    """Forward and backward."""
    floating = getattr(torch, dtype)
    gates = [empty(rows, GATES[kind] * size, kind=floating) for _ in range(2)]
    state = None
    if kind in ("lstm", "gru"):
        state = empty(rows, size, kind=torch.float32 if fp32_state else floating)
    new_hidden, new_cell = backend.forward(*gates, state, kind)
    backend.backward(
        new_hidden,
        new_cell if kind == "lstm" else None,
        *gates,
        state,
        kind,
        state is not None,
    )
