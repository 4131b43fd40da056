"""Nested jagged tensors are packed batches by another name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .arguments import OP

_RAGGED = 2


def unnest(
    query: Any, key: Any, value: Any, others: Iterable[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """Packed tensors ``[N, H, D]``, their offsets, and the lengths of the longest sequences.

    Args:
        query: Nested, ``[B, H, j, D]``.
        key: Nested, ``[B, Hk, j, D]``.
        value: Nested, ``[B, Hk, j, Dv]``, with the offsets of ``key``.
        others: Arguments that must not be given beside nested tensors.

    Raises:
        TypeError: Some tensors are nested and others are not.
        ValueError: They are not jagged in dimension 2, have holes, or disagree.
    """
    tensors: dict[str, Any] = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not getattr(tensor, "is_nested", False):
            raise TypeError(f"{OP}: {name} must be nested as query is")
        if (
            tensor.layout != torch.jagged
            or tensor.dim() != 4
            or tensor._ragged_idx != _RAGGED
            or tensor.lengths() is not None
        ):
            raise ValueError(
                f"{OP}: {name} must be a jagged tensor [B, H, j, D] without holes: "
                "nested_tensor([[length, H, D], ...], layout=torch.jagged).transpose(1, 2)"
            )
    if any(tensor is not None for tensor in others):
        raise ValueError(f"{OP}: nested tensors already say the lengths: give no others")
    if key.size(_RAGGED) != value.size(_RAGGED):
        raise ValueError(f"{OP}: value must have the sequence lengths of key")
    return (
        *(tensor.values().transpose(0, 1) for tensor in (query, key, value)),
        query.offsets(),
        key.offsets(),
        query._get_max_seqlen(),
        key._get_max_seqlen(),
    )


def renest(rows: Tensor, like: Any) -> Tensor:
    """``[N, H, Dv]`` as nested ``[B, H, j, Dv]`` with the offsets of ``like``."""
    nested = torch.nested.nested_tensor_from_jagged(
        rows,
        like.offsets(),
        min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )
    return nested.transpose(1, _RAGGED)
