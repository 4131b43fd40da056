"""Decoding strategies for any model that follows the ``Decoder`` protocol."""

from .beam import beam_search
from .function_decoder import FunctionDecoder
from .generate import generate, generate_each
from .greedy import greedy_search
from .hypothesis import GenerationError, Hypothesis, Result
from .sample import sample
from .scoring import score
from .state import Decoder
from .strategies import BeamSearch, Constraints, Greedy, Sampling
from .streaming import stream

__all__ = [
    "BeamSearch",
    "Constraints",
    "Decoder",
    "FunctionDecoder",
    "GenerationError",
    "Greedy",
    "Hypothesis",
    "Result",
    "Sampling",
    "beam_search",
    "generate",
    "generate_each",
    "greedy_search",
    "sample",
    "score",
    "stream",
]
