"""Whole sequence-to-sequence models."""

from .config import TransformerConfig
from .transformer import Transformer

__all__ = ["Transformer", "TransformerConfig"]
