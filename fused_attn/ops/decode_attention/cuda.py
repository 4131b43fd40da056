"""The ``cuda`` backend: CUDA C++."""

from __future__ import annotations

from torch import Tensor

from fused_attn import _extension

from .._check import head_reasons


def unsupported_reasons(query: Tensor, value: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    return head_reasons(query, value)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    ancestry: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    return _extension.cuda_operators(query.device).decode_attention(
        query,
        key,
        value,
        key_lengths,
        ancestry,
        mask,
        alibi_slopes,
        is_causal,
        window,
        scale,
        softcap,
    )
