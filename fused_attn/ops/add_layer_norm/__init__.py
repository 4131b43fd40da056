"""Layer normalisation of a residual plus a dropped-out branch."""

from .api import add_layer_norm

__all__ = ["add_layer_norm"]
