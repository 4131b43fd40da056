"""Scaled dot-product attention with masks, lengths and an additive bias."""

from .api import attention

__all__ = ["attention"]
