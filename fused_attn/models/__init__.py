"""Whole sequence-to-sequence models."""

from .config import TransformerConfig

__all__ = ["TransformerConfig"]
