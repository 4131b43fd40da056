"""What follows the matrix products of a recurrent layer's step, and all of its steps."""

from .api import recurrent_cell
from .layer import layer_is_fused, recurrent_layer

__all__ = ["layer_is_fused", "recurrent_cell", "recurrent_layer"]
