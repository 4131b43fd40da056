"""What a Transformer keeps between two steps of generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_NAME = "Transformer"
_FIRST_CAPACITY = 32


class Position(NamedTuple):
    """Where the tokens of one step stand."""

    common: int | None
    """The position of all of them; None where sources differ, or only the device knows."""
    rows: Tensor | None
    """int64 ``[B * K]``: each row's position, where there is no common one."""
    key_lengths: Tensor | None
    """int64 ``[B * K]``: one more; None where no key lies behind."""
    ancestry: Tensor | None
    """int32 ``[B, K, extent]``; None where K = 1."""
    extent: int
    """Keys that attention looks at, the present ones included."""


class KeyValueCache:
    """Self-attention keys and values of every decoder layer, one position longer each step.

    A row of the buffer is a place among the K targets of a source, and holds what whoever stood
    there wrote; keys are never moved when targets change places. The ancestry says where each
    target's history lies. The buffer doubles when it is full, and is copied when sources leave.

    Each source has a position of its own. The host knows them all, and writes a slice where they
    are one; after ``reserve`` it looks at none, and a step depends on tensors of the device alone.

    Args:
        like: Gives dtype and device.
        layers: L.
        sources: B.
        beam_size: K.
        heads: H.
        head_size: D.
        max_length: The capacity never exceeds it.
    """

    def __init__(
        self,
        like: Tensor,
        *,
        layers: int,
        sources: int,
        beam_size: int,
        heads: int,
        head_size: int,
        max_length: int,
    ) -> None:
        self.beam_size, self.max_length = beam_size, max_length
        self._sources = sources
        # [L, 2, B * K, H, capacity, D]
        self._buffer = like.new_empty(layers, 2, sources * beam_size, heads, 0, head_size)
        # int32 [B, K, capacity]: the target among K whose row holds a position; what it says of
        # positions that are not written yet means nothing.
        self._ancestry = torch.empty(sources, beam_size, 0, dtype=torch.int32, device=like.device)
        # int64 [B]: tokens that each source's targets have.
        self.positions = torch.zeros(sources, dtype=torch.int64, device=like.device)
        # The same on the host; after `reserve` they are out of date.
        self._known = [0] * sources
        # After `reserve`: steps that the capacity still allows.
        self._steps_left: int | None = None
        self._beams = torch.arange(beam_size, dtype=torch.int32, device=like.device)
        self._rows = torch.arange(sources * beam_size, device=like.device)

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self._buffer.size(4)

    @property
    def bytes(self) -> int:
        """Memory held: ``2 L B K H D capacity itemsize`` and the ancestry's ``4 B K capacity``."""
        return self._buffer.nbytes + self._ancestry.nbytes

    def known_positions(self) -> list[int]:
        """Tokens that each source's targets have; asks the device after ``reserve``."""
        if self._steps_left is not None:
            self._known = self.positions.tolist()
        return self._known

    def begin(self) -> Position:
        """Make room for the next position, and say where it is.

        Raises:
            ValueError: A target has ``max_length`` tokens already, or after ``reserve`` as many as
                there is room for.
        """
        K = self.beam_size
        if self._steps_left is not None:
            if self._steps_left == 0:
                raise ValueError(
                    f"{_NAME}: step needs a position more than state has reserved, got a capacity "
                    f"of {self.capacity}"
                )
            common, extent = None, self.capacity
        else:
            last = max(self._known, default=0)
            if last >= self.max_length:
                raise ValueError(
                    f"{_NAME}: target must have at most {self.max_length} tokens "
                    f"(config.max_length), got {last + 1}"
                )
            self._grow(last + 1, last)
            common = last if min(self._known, default=0) == last else None
            extent = last + 1
        rows = key_lengths = None
        if common is None:
            rows = self.positions[:, None].expand(-1, K).flatten()  # [B * K]
            key_lengths = rows + 1
        ancestry = None
        if K > 1:
            ancestry = self._ancestry[:, :, :extent]
            if common is None:
                index = self.positions[:, None, None].expand(-1, K, 1)
                ancestry.scatter_(2, index, self._beams[:, None].expand(len(ancestry), K, 1))
            else:
                ancestry[:, :, common] = self._beams
        return Position(common, rows, key_lengths, ancestry, extent)

    def append(self, layer: int, position: Position, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values of the present position.

        Args:
            layer: Index of the layer.
            position: From ``begin``.
            entries: ``[B * K, 2, H, D]``: keys and values.

        Returns:
            All keys and values, to be read through the ancestry and the lengths:
            ``[B * K, H, extent, D]``, views of the buffer.
        """
        buffer = self._buffer[layer]
        if position.common is None:
            buffer[:, self._rows, :, position.rows] = entries
        else:
            buffer[:, :, :, position.common] = entries.transpose(0, 1)
        keys, values = buffer[:, :, :, : position.extent].unbind(0)
        return keys, values

    def advance(self) -> None:
        """Every layer has stored its position: go on to the next."""
        self.positions.add_(1)
        if self._steps_left is None:
            self._known = [position + 1 for position in self._known]
        else:
            self._steps_left -= 1

    def reserve(self, capacity: int) -> None:
        """See ``TransformerDecoding.reserve``."""
        last = max(self.known_positions(), default=0)
        if not last <= capacity <= self.max_length:
            raise ValueError(
                f"{_NAME}: capacity must be in {last}..{self.max_length} (the tokens of the "
                f"longest target and config.max_length), got {capacity}"
            )
        if capacity > self.capacity:
            self._resize(capacity, last)
        self._steps_left = self.capacity - last

    def reorder(self, parents: Tensor, sentences: Tensor | None) -> None:
        """See ``fused_attn.generation.Decoder``."""
        K = self.beam_size
        if sentences is not None:
            known = self.known_positions()
            if len(set(known)) <= 1:
                self._known = known[: len(sentences)]
            else:
                self._known = [known[i] for i in sentences.tolist()]
            beams = torch.arange(K, device=sentences.device)
            rows = (sentences[:, None] * K + beams).flatten()
            self._buffer = self._buffer.index_select(2, rows)
            self._ancestry = self._ancestry[sentences]
            self.positions = self.positions[sentences]
            self._rows = self._rows[: len(rows)]
            self._count_steps()
        if K == 1:
            return
        used = self._ancestry
        if self._steps_left is None:
            used = used[:, :, : max(self._known, default=0)]
        used.copy_(used.gather(1, parents[:, :, None].expand(-1, -1, used.size(2))))

    def restart(self, sentences: Tensor) -> None:
        """Let sources ``[N]`` begin anew."""
        known = list(self.known_positions())
        for i in sentences.tolist():
            known[i] = 0
        self._known = known
        self.positions.index_fill_(0, sentences, 0)
        self._count_steps()

    def _count_steps(self) -> None:
        if self._steps_left is not None:
            self._steps_left = self.capacity - max(self._known, default=0)

    def _grow(self, needed: int, used: int) -> None:
        if needed > self.capacity:
            self._resize(min(max(_FIRST_CAPACITY, 2 * used), self.max_length), used)

    def _resize(self, capacity: int, used: int) -> None:
        L, _, R, H, _, D = self._buffer.shape
        grown = self._buffer.new_empty(L, 2, R, H, capacity, D)
        ancestry = self._ancestry.new_zeros(*self._ancestry.shape[:2], capacity)
        grown[..., :used, :] = self._buffer[..., :used, :]
        ancestry[..., :used] = self._ancestry[..., :used]
        self._buffer, self._ancestry = grown, ancestry


class TransformerState:
    """B sources with K targets each.

    Args:
        program: What computes a step; the search hands it from step to step with the state.
        source_lengths: ``[B]``.
        memory: ``[L, 2, B, H, S, D]``: the sources' keys and values of every decoder layer, once
            for all K targets.
        beam_size: K.
        max_length: Most tokens of a target.
    """

    def __init__(
        self,
        program: Any,
        source_lengths: Tensor,
        memory: Tensor,
        *,
        beam_size: int,
        max_length: int,
    ) -> None:
        self.program = program
        self.source_lengths = source_lengths
        self.memory = memory
        L, _, B, H, _, D = memory.shape
        self.cache = KeyValueCache(
            memory,
            layers=L,
            sources=B,
            beam_size=beam_size,
            heads=H,
            head_size=D,
            max_length=max_length,
        )
        # Queries [B * K, H, 1, D] and lse [B * K, H, 1] of the last layer's cross-attention in the
        # last step.
        self.looked: tuple[Tensor, Tensor] | None = None

    @property
    def cache_bytes(self) -> int:
        """Memory of keys, values and ancestry.

        ``2 L B K H D capacity itemsize`` for self-attention, ``2 L B H S D itemsize`` for
        cross-attention and ``4 B K capacity`` for the ancestry. The capacity is 0 until the first
        step.
        """
        return self.cache.bytes + self.memory.nbytes

    @property
    def memory_keys(self) -> list[Tensor]:
        """For each layer ``[B, H, S, D]``."""
        return list(self.memory[:, 0].unbind(0))

    @property
    def memory_values(self) -> list[Tensor]:
        """For each layer ``[B, H, S, D]``."""
        return list(self.memory[:, 1].unbind(0))

    def reorder(self, parents: Tensor, sentences: Tensor | None) -> None:
        """See ``fused_attn.generation.Decoder``."""
        self.looked = None
        if sentences is not None:
            self.source_lengths = self.source_lengths[sentences]
            self.memory = self.memory.index_select(2, sentences)
        self.cache.reorder(parents, sentences)

    def replace(self, sentences: Tensor, other: TransformerState) -> None:
        """See ``fused_attn.generation.Decoder``."""
        if len(sentences) != len(other.source_lengths):
            raise ValueError(
                f"{_NAME}: sentences must have shape [N] with N = {len(other.source_lengths)} "
                f"(from other), got {list(sentences.shape)}"
            )
        if other.cache.beam_size != self.cache.beam_size:
            raise ValueError(
                f"{_NAME}: other must have beam_size = {self.cache.beam_size} (from state), got "
                f"{other.cache.beam_size}"
            )
        if other.cache.capacity > 0 and any(other.cache.known_positions()):
            raise ValueError(
                f"{_NAME}: other must come from start, got a state that has made steps"
            )
        self.looked = None
        S = other.memory.size(4)
        used = self.memory.size(4)
        if used < S:
            shape = list(self.memory.shape)
            shape[4] = S
            grown = self.memory.new_empty(shape)
            grown[..., :used, :] = self.memory
            self.memory = grown
        self.memory[..., :S, :].index_copy_(2, sentences, other.memory)
        self.source_lengths.index_copy_(
            0, sentences, other.source_lengths.to(self.source_lengths.dtype)
        )
        self.cache.restart(sentences)

    def cross_attention(self) -> Tensor:
        """See ``fused_attn.generation.Decoder``."""
        if self.looked is None:
            raise ValueError(
                f"{_NAME}: cross_attention needs a step that was made last, got a state that was "
                "started, reordered or replaced since"
            )
        query, lse = self.looked
        keys = self.memory[-1, 0]  # [B, H, S, D]
        B, H, S, D = keys.shape
        query = query.view(B, -1, H, 1, D).transpose(1, 2).float()  # [B, H, K, 1, D]
        lse = lse.view(B, -1, H, 1).transpose(1, 2)  # [B, H, K, 1]
        # A product and a sum, since a matrix product's rounding depends on its shape.
        logits = (query * keys[:, :, None].float()).sum(-1) * D**-0.5  # [B, H, K, S]
        behind = torch.arange(S, device=keys.device) >= self.source_lengths[:, None]  # [B, S]
        weights = (logits - lse).exp().masked_fill(behind[:, None, None], 0.0)
        return weights.mean(1)
