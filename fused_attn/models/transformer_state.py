"""What a Transformer keeps between two steps of generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_CAPACITY = 32


class KeyValueCache:
    """Self-attention keys and values of every decoder layer, one position longer each step.

    A row of the buffer is a place among the K targets of a source, and holds what whoever stood
    there wrote; keys are never moved when targets change places. The ancestry says where each
    target's history lies. The buffer doubles when it is full, and is copied when sources leave.

    Args:
        layers: L.
        beam_size: K.
        max_length: The capacity never exceeds it.
    """

    def __init__(self, layers: int, beam_size: int, max_length: int) -> None:
        self._layers, self._beam_size, self._max_length = layers, beam_size, max_length
        self._buffer: Tensor | None = None  # [L, 2, B * K, H, capacity, D]
        # int32 [B, K, capacity]: the target among K whose row holds a position; its own row is
        # what a position that is not written yet says.
        self._ancestry: Tensor | None = None
        self.length = 0

    @property
    def ancestry(self) -> Tensor | None:
        """int32 ``[B, K, length + 1]``, the present position included; None where K = 1."""
        if self._ancestry is None or self._beam_size == 1:
            return None
        return self._ancestry[:, :, : self.length + 1]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's key and value of the present position.

        Args:
            layer: Index of the layer.
            key: ``[B * K, H, 1, D]``.
            value: Likewise.

        Returns:
            All keys and values so far, to be read through the ancestry:
            ``[B * K, H, length + 1, D]``, views of the buffer.
        """
        keys, values = self._with_room(key)[layer]
        keys[:, :, self.length] = key[:, :, 0]
        values[:, :, self.length] = value[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def advance(self) -> None:
        """Every layer has stored its position: go on to the next."""
        self.length += 1

    def reorder(self, parents: Tensor, sentences: Tensor | None) -> None:
        """See ``fused_attn.generation.Decoder``."""
        if self._buffer is None or self._ancestry is None:
            return
        if sentences is not None:
            beams = torch.arange(self._beam_size, device=sentences.device)
            rows = (sentences[:, None] * self._beam_size + beams).flatten()
            self._buffer = self._buffer.index_select(2, rows)
            self._ancestry = self._ancestry[sentences]
        used = self._ancestry[:, :, : self.length]
        used.copy_(used.gather(1, parents[:, :, None].expand(-1, -1, self.length)))

    def _with_room(self, key: Tensor) -> Tensor:
        if self._buffer is not None and self.length < self._buffer.size(4):
            return self._buffer
        capacity = min(max(_FIRST_CAPACITY, 2 * self.length), self._max_length)
        R, H, _, D = key.shape
        grown = key.new_empty(self._layers, 2, R, H, capacity, D)
        beams = torch.arange(self._beam_size, dtype=torch.int32, device=key.device)
        ancestry = beams[None, :, None].repeat(R // self._beam_size, 1, capacity)
        if self._buffer is not None and self._ancestry is not None:
            grown[..., : self.length, :] = self._buffer
            ancestry[:, :, : self.length] = self._ancestry
        self._buffer, self._ancestry = grown, ancestry
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

    def reorder(self, parents: Tensor, sentences: Tensor | None) -> None:
        """See ``fused_attn.generation.Decoder``."""
        if sentences is not None:
            self.source_lengths = self.source_lengths[sentences]
            self.memory_keys = [keys[sentences] for keys in self.memory_keys]
            self.memory_values = [values[sentences] for values in self.memory_values]
        self.cache.reorder(parents, sentences)
