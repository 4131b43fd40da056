"""Scaled dot-product attention with every mask."""

from .api import attention
from .block_mask import BlockMask

__all__ = ["BlockMask", "attention"]
