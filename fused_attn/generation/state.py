"""What generation needs of a model: a decoder that goes one token forward at a time."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

State = TypeVar("State")
"""Whatever a decoder keeps between two steps; generation only hands it back."""


class Decoder(Protocol[State]):
    """A model that generation can drive; every decoding strategy works with every decoder.

    The state belongs to the search: ``step`` and ``reorder`` may change it in place and return
    it, and the search uses only what they returned last.
    """

    @property
    def bos_token(self) -> int:
        """Starts every target; the first token that ``step`` sees."""
        ...

    @property
    def eos_token(self) -> int:
        """Ends a target."""
        ...

    @property
    def max_length(self) -> int | None:
        """Most tokens in a source, and most steps; None where there is no limit."""
        ...

    def start(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> State:
        """Read the sources; called once.

        Args:
            source: ``[B, S]`` token indices (or ``[B, S, ...]`` features), B and S at least 1.
            source_lengths: ``[B]`` int64, each in 1..S; what lies behind must be ignored.
            beam_size: K, the continuations of each source that will be held at a time.
        """
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Append one token to each of the K targets of each source.

        Args:
            tokens: ``[B, K]`` int64.
            state: What ``start``, ``step`` or ``reorder`` returned last.

        Returns:
            Logits ``[B, K, V]`` of the token that comes next, and the new state.
        """
        ...

    def reorder(self, state: State, parents: Tensor, sentences: Tensor | None = None) -> State:
        """Let every target continue another of the same source; sources may leave.

        Target k of source i of the new state continues target ``parents[i, k]`` of source
        ``sentences[i]`` of the old state.

        Args:
            state: What ``step`` returned last.
            parents: ``[B', K]`` int64 in 0..K-1.
            sentences: ``[B']`` int64, ascending and without repetition: the sources that stay.
                None: all of them, B' = B.
        """
        ...
