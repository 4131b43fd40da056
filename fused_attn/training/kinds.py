"""The kinds of models that checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig, Transformer, TransformerConfig

KIND = "type"
"""The field of a checkpoint's configuration that names the kind; absent for a Transformer."""


def model_fields(model: Transformer | RNNSeq2Seq) -> dict[str, Any]:
    """Return a model's configuration as plain values, as a checkpoint holds it."""
    fields = model.config.to_dict()
    return {KIND: "rnn", **fields} if isinstance(model, RNNSeq2Seq) else fields


def build_model(fields: Mapping[str, Any]) -> Transformer | RNNSeq2Seq:
    """The inverse of ``model_fields``, with fresh weights.

    Raises:
        ValueError: A field is unknown or missing, or has a wrong value.
        TypeError: A field is of a wrong type.
    """
    rest = dict(fields)
    kind = rest.pop(KIND, "transformer")
    if kind == "transformer":
        return Transformer(TransformerConfig.from_dict(rest))
    if kind == "rnn":
        return RNNSeq2Seq(RNNSeq2SeqConfig.from_dict(rest))
    raise ValueError(f"build_model: {KIND} must be transformer or rnn, got {kind!r}")
