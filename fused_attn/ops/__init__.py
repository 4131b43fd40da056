"""The operators: plain functions on tensors, each with several backends."""

from .add_layer_norm import add_layer_norm
from .additive_attention import additive_attention, additive_scores
from .attention import BlockMask, attention
from .beam_search import BeamSearchStep, TokenEdits, beam_search_step, token_edits
from .bias_activation_dropout import bias_activation_dropout
from .copy_distribution import copy_distribution, copy_nll
from .decode_attention import decode_attention
from .recurrent_cell import recurrent_cell, recurrent_layer

__all__ = [
    "BeamSearchStep",
    "BlockMask",
    "TokenEdits",
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
