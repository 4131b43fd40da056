"""What follows the matrix products of a recurrent layer's step."""

from .api import recurrent_cell

__all__ = ["recurrent_cell"]
