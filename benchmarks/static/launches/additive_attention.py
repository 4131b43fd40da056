"""``additive_attention`` and ``additive_scores``: steps of decoding, features, odd widths."""

from __future__ import annotations

import torch

from fused_attn.ops.additive_attention import triton as backend
from fused_attn.ops.additive_attention.contract import AdditiveInputs

from . import call, empty, quick

CALLS = (
    quick("bfloat16", E=512, D=512, masked=True, fp32_parameters=True),
    # A step of decoding, or of training with location filters.
    quick("bfloat16", E=512, D=512, T=1, F=10, masked=True, fp32_parameters=True),
    call("bfloat16", E=512, D=512, F=10, masked=True, fp32_parameters=True),
    call("float32", E=512, D=512, masked=True),
    call("bfloat16", E=512, D=512, scores=True),
    # Rows that are not aligned.
    call("float32", E=250, D=250),
)


def launch(
    dtype: str,
    E: int,
    D: int,
    F: int = 0,
    B: int = 8,
    T: int = 64,
    S: int = 96,
    fp32_parameters: bool = False,
    masked: bool = False,
    scores: bool = False,
) -> None:
    """Forward and backward on a GPU of 132 multiprocessors.

    Every differentiable tensor needs a gradient; ``scores`` is ``additive_scores``.
    """
    floating = getattr(torch, dtype)
    parameters = torch.float32 if fp32_parameters else floating
    H = 1
    inputs = AdditiveInputs(
        query=empty(B, H, T, E, kind=floating),
        key=empty(B, H, S, E, kind=floating),
        value=None if scores else empty(B, H, S, D, kind=floating),
        score_weight=empty(H, E, kind=parameters),
        features=empty(B, H, T, S, F, kind=floating) if F > 0 else None,
        feature_weight=empty(H, F, E, kind=parameters) if F > 0 else None,
        mask=empty(B, 1, 1, S, kind=torch.bool) if masked else None,
        key_lengths=empty(B, kind=torch.int64) if masked else None,
    )
    backend.multiprocessor_count = lambda _: 132
    context, weights = backend.forward(inputs)
    backend.backward(
        None if scores else context,
        weights,
        inputs,
        None if scores else weights,
        [True, True, not scores, True, F > 0, F > 0],
    )
