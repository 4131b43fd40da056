"""Decoding strategies for any model that follows the ``Decoder`` protocol."""

from .beam import beam_search
from .greedy import greedy_search
from .hypothesis import Hypothesis
from .state import Decoder

__all__ = ["Decoder", "Hypothesis", "beam_search", "greedy_search"]
