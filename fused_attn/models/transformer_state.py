"""What a Transformer keeps between two steps of generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_CAPACITY = 32


class KeyValueCache:
    """Self-attention keys and values of every decoder layer, one position longer each step.

    A row is one target of the search. The buffer doubles when it is full; reordering copies
    the positions in use into a second buffer, and the two change places.

    Args:
        layers: L.
        max_length: The capacity never exceeds it.
    """

    def __init__(self, layers: int, max_length: int) -> None:
        self._layers, self._max_length = layers, max_length
        self._buffer: Tensor | None = None  # [R, L, 2, capacity, H, D]
        self._spare: Tensor | None = None
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's key and value of the present position.

        Args:
            layer: Index of the layer.
            key: ``[R, H, 1, D]``.
            value: Likewise.

        Returns:
            All keys and values so far: ``[R, H, length + 1, D]``, views of the buffer.
        """
        buffer = self._with_room(key)
        buffer[:, layer, 0, self.length] = key[:, :, 0]
        buffer[:, layer, 1, self.length] = value[:, :, 0]
        used = buffer[:, layer, :, : self.length + 1].transpose(2, 3)  # [R, 2, H, length + 1, D]
        return used[:, 0], used[:, 1]

    def advance(self) -> None:
        """Every layer has stored its position: go on to the next."""
        self.length += 1

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was; ``[R']`` with R' at most R."""
        if self._buffer is None:
            return
        if self._spare is None:
            self._spare = torch.empty_like(self._buffer)
        target = self._spare[: len(rows)]
        used = self._buffer[:, :, :, : self.length]
        torch.index_select(used, 0, rows, out=target[:, :, :, : self.length])
        self._buffer, self._spare = target, self._buffer[: len(rows)]

    def _with_room(self, key: Tensor) -> Tensor:
        if self._buffer is not None and self.length < self._buffer.size(3):
            return self._buffer
        R, H, _, D = key.shape
        capacity = min(max(_FIRST_CAPACITY, 2 * self.length), self._max_length)
        grown = key.new_empty(R, self._layers, 2, capacity, H, D)
        if self._buffer is not None:
            grown[:, :, :, : self.length] = self._buffer
        self._buffer, self._spare = grown, None
        return grown


@dataclass
class TransformerState:
    """B sources with K targets each, all of one length."""

    source_lengths: Tensor
    """``[B]``."""
    memory_keys: list[Tensor]
    """For each layer ``[B, H, S, D]``: the sources' keys, once for all K targets."""
    memory_values: list[Tensor]
    """Likewise."""
    cache: KeyValueCache
    """``B * K`` rows."""
    beam_size: int

    def reorder(self, parents: Tensor, sentences: Tensor | None) -> None:
        """See ``fused_attn.generation.Decoder``."""
        if sentences is None:
            sentences = torch.arange(len(parents), device=parents.device)
        else:
            self.source_lengths = self.source_lengths[sentences]
            self.memory_keys = [keys[sentences] for keys in self.memory_keys]
            self.memory_values = [values[sentences] for values in self.memory_values]
        rows = (sentences[:, None] * self.beam_size + parents).flatten()
        self.cache.reorder(rows)
