"""Words generated from a vocabulary or copied from the source: one distribution over both."""

from .api import copy_distribution, copy_nll

__all__ = ["copy_distribution", "copy_nll"]
