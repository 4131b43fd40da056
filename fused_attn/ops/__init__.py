"""The operators: plain functions on tensors, each with several backends."""

from .add_layer_norm import add_layer_norm
from .attention import BlockMask, attention
from .beam_search import BeamSearchStep, TokenEdits, beam_search_step, token_edits
from .bias_activation_dropout import bias_activation_dropout
from .decode_attention import decode_attention
from .recurrent_cell import recurrent_cell, recurrent_layer

__all__ = [
    "BeamSearchStep",
    "BlockMask",
    "TokenEdits",
    "add_layer_norm",
    "attention",
    "beam_search_step",
    "bias_activation_dropout",
    "decode_attention",
    "recurrent_cell",
    "recurrent_layer",
    "token_edits",
]
