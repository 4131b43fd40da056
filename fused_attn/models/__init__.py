"""Whole sequence-to-sequence models."""

from .config import TransformerConfig
from .rnn_config import RNNSeq2SeqConfig
from .rnn_network import DecoderOutputs
from .rnn_presets import RNN_PRESETS
from .rnn_seq2seq import RNNSeq2Seq
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
