"""Whole sequence-to-sequence models."""

from .config import TransformerConfig
from .rnn_config import RNN_PRESETS, RNNSeq2SeqConfig
from .rnn_seq2seq import DecoderOutputs, RNNSeq2Seq
from .transformer import Transformer
from .transformer_quantized import QuantizedTransformer, quantize

__all__ = [
    "RNN_PRESETS",
    "DecoderOutputs",
    "QuantizedTransformer",
    "RNNSeq2Seq",
    "RNNSeq2SeqConfig",
    "Transformer",
    "TransformerConfig",
    "quantize",
]
