"""Attention of one or a few new queries to a key-value cache."""

from .api import decode_attention

__all__ = ["decode_attention"]
