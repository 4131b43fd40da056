"""What a recurrent sequence-to-sequence model keeps between two steps of generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rnn_decoder import Carried
from .rnn_encoder import RecurrentState

_NAME = "RNNSeq2Seq"


class RNNState:
    """B sources with K targets each; a target's history is of one size, however long it is.

    Args:
        program: What computes a step; the search hands it from step to step with the state.
        carried: Of K targets for each source.
        memory: What the attention reads; None without attention.
        source_lengths: ``[B]``, in tokens or frames.
        lengths: ``[B]``, in what the encoder made of them.
        context: ``[B, H]``: the sources as one vector each.
        keys: ``[B, S', A]`` or None; see ``Sources``.
        tokens: ``[B, S']`` or None.
        table: ``[B, 3 + S', E]`` or None.
        beam_size: K.
    """

    def __init__(
        self,
        program: Any,
        carried: Carried,
        *,
        memory: Any,
        source_lengths: Tensor,
        lengths: Tensor,
        context: Tensor,
        keys: Tensor | None,
        tokens: Tensor | None,
        table: Tensor | None,
        beam_size: int,
    ) -> None:
        self.program, self.beam_size = program, beam_size
        self.recurrent = tuple(part.clone() for part in carried.recurrent)
        self.feed, self.attention, self.memory = carried.feed, carried.attention, memory
        self.source_lengths, self.lengths = source_lengths.clone(), lengths.clone()
        self.context, self.keys = context.clone(), keys
        self.tokens = None if tokens is None else tokens.clone()
        self.table = table
        self.looked: Tensor | None = None
        """``[B, K, S']``: where the last step looked; None where it is not the last any more."""
        self.has_stepped = False
        self._first_rows = torch.arange(len(lengths), device=lengths.device)[:, None] * beam_size

    def carried(self) -> Carried:
        """What the next step begins with."""
        return Carried(self.recurrent, self.feed, self.attention)

    def advance(self, carried: Carried, looked: Tensor | None) -> None:
        """Keep what a step returned, in the tensors that are there."""
        _copy(self.recurrent, carried.recurrent)
        if self.feed is not None and carried.feed is not None:
            self.feed.copy_(carried.feed)
        if self.attention is not None:
            self.attention.copy_(carried.attention)
        self.looked, self.has_stepped = looked, True

    def reorder(self, parents: Tensor, sentences: Tensor | None) -> None:
        """See ``fused_attn.generation.Decoder``."""
        self.looked = None
        first = self._first_rows
        if sentences is not None:
            first = first[sentences]
            self._select(sentences)
        rows = (first + parents).flatten()  # [B' * K]
        recurrent = tuple(part.index_select(1, rows) for part in self.recurrent)
        feed = self.feed
        if feed is not None:
            feed = feed.flatten(0, 1).index_select(0, rows).view(*parents.shape, -1)
        if sentences is not None:
            self.recurrent, self.feed = recurrent, feed
        else:
            _copy(self.recurrent, recurrent)
            if self.feed is not None and feed is not None:
                self.feed.copy_(feed)
        if self.attention is not None:
            self.attention.select(parents, sentences)

    def replace(self, sentences: Tensor, other: RNNState) -> None:
        """See ``fused_attn.generation.Decoder``."""
        if len(sentences) != len(other.lengths):
            raise ValueError(
                f"{_NAME}: sentences must have shape [N] with N = {len(other.lengths)} "
                f"(from other), got {list(sentences.shape)}"
            )
        if other.beam_size != self.beam_size:
            raise ValueError(
                f"{_NAME}: other must have beam_size = {self.beam_size} (from state), got "
                f"{other.beam_size}"
            )
        if other.has_stepped:
            raise ValueError(
                f"{_NAME}: other must come from start, got a state that has made steps"
            )
        self.looked = None
        beams = torch.arange(self.beam_size, device=sentences.device)
        rows = (sentences[:, None] * self.beam_size + beams).flatten()
        for part, new in zip(self.recurrent, other.recurrent, strict=True):
            part.index_copy_(1, rows, new)
        for name in ("source_lengths", "lengths", "feed", "context"):
            mine, new = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.index_copy_(0, sentences, new.to(mine.dtype))
        for name in ("keys", "tokens", "table"):
            mine, new = getattr(self, name), getattr(other, name)
            if mine is not None:
                setattr(self, name, _replaced(mine, sentences, new))
        if self.memory is not None:
            self.memory.replace(sentences, other.memory)
            self.attention.replace(sentences, other.attention)

    def cross_attention(self) -> Tensor:
        """``[B, K, S']``; see ``fused_attn.generation.Decoder``."""
        if self.looked is None:
            raise ValueError(
                f"{_NAME}: cross_attention needs a step that was made last, got a state that was "
                "started, reordered or replaced since"
            )
        return self.looked

    def _select(self, sentences: Tensor) -> None:
        """Keep some sources."""
        for name in ("source_lengths", "lengths", "context", "keys", "tokens", "table"):
            mine = getattr(self, name)
            if mine is not None:
                setattr(self, name, mine.index_select(0, sentences))
        if self.memory is not None:
            self.memory.select(sentences)
        self._first_rows = self._first_rows[: len(sentences)]


def _copy(state: RecurrentState, new: RecurrentState) -> None:
    for part, other in zip(state, new, strict=True):
        part.copy_(other)


def _replaced(tensor: Tensor, sentences: Tensor, new: Tensor) -> Tensor:
    """``[B, S, ...]`` with new rows of perhaps another S; another tensor where they are longer."""
    used, size = tensor.size(1), new.size(1)
    if used < size:
        grown = tensor.new_zeros(len(tensor), size, *tensor.shape[2:])
        grown[:, :used] = tensor
        tensor = grown
    tensor[:, :size].index_copy_(0, sentences, new)
    return tensor
