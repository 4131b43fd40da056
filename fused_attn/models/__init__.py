"""Whole sequence-to-sequence models."""

from .config import TransformerConfig
from .transformer import Transformer
from .transformer_quantized import QuantizedTransformer, quantize

__all__ = ["QuantizedTransformer", "Transformer", "TransformerConfig", "quantize"]
