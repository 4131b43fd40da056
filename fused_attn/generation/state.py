"""What generation needs of a model: a decoder that goes one token forward at a time."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

State = TypeVar("State")
"""Whatever a decoder keeps between two steps; generation only hands it back."""


class Decoder(Protocol[State]):
    """A model that generation can drive; every decoding strategy works with every decoder.

    The state belongs to the search: the methods may change it in place and return it, and the
    search uses only what they returned last.

    A decoder may have more, and generation does more with it:

    - ``replace(state, sentences, other) -> state``: source i of ``other``, a state that ``start``
      has just made, takes the place of source ``sentences[i]`` (``[N]`` int64); the others go on
      from where they are. Then waiting sources enter a running batch as others finish. Without
      it a new batch begins when the last source of the old one has finished.
    - ``cross_attention(state) -> [B, K, S]``: how much the last step looked at each source
      position, 0 behind the source's length. The coverage penalty needs it.
    - ``align(source, target, source_lengths, target_lengths) -> [B, T, S]``: how much each
      position of given targets, which begin with ``bos_token``, looks at each source position.
      Alignments need it.
    - ``decodes_on_static_shapes``: True where ``step`` and ``reorder`` use tensors on the device
      alone, change them in place and keep all shapes, so that a CUDA graph can hold them; and
      ``reserve(state, capacity) -> state``, which makes room for ``capacity`` positions.
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
        """Read sources: once at the beginning, and once for those that enter together later.

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
            state: What ``start``, ``step``, ``reorder`` or ``replace`` returned last.

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
