"""Fused kernels and modules for attention-based sequence-to-sequence models in PyTorch."""

from .ops import (
    BeamSearchStep,
    BlockMask,
    TokenEdits,
    add_layer_norm,
    additive_attention,
    additive_scores,
    attention,
    beam_search_step,
    bias_activation_dropout,
    copy_distribution,
    copy_nll,
    decode_attention,
    recurrent_cell,
    recurrent_layer,
    token_edits,
)

__version__ = "0.1.0"

__all__ = [
    "BeamSearchStep",
    "BlockMask",
    "TokenEdits",
    "__version__",
    "add_layer_norm",
    "additive_attention",
    "additive_scores",
    "attention",
    "beam_search_step",
    "bias_activation_dropout",
    "copy_distribution",
    "copy_nll",
    "decode_attention",
    "recurrent_cell",
    "recurrent_layer",
    "token_edits",
]
