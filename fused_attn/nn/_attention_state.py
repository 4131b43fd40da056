"""What an attention over a source keeps: the source, and where its targets have looked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AttentionMemory:
    """B sources, projected once for all steps; from ``RecurrentAttention.read``.

    What lies behind a source's length is 0 in the memory that keys and values were made from.
    """

    key: Tensor
    """``[B, H, S, E]``, or ``[B, 1, S, E]`` where the heads share keys."""
    value: Tensor
    """``[B, H, S, D]``. Without projections it is the same tensor as ``key``."""
    lengths: Tensor | None = None
    """``[B]`` int32 or int64; None: every source has length S."""

    def visible(self) -> Tensor | None:
        """``[B, S]`` bool, True in front of each length; None where there are no lengths."""
        if self.lengths is None:
            return None
        return torch.arange(self.key.size(2), device=self.key.device) < self.lengths[:, None]

    def select(self, sentences: Tensor) -> AttentionMemory:
        """Keep the sources ``sentences [N]`` int64, in that order. Changes and returns ``self``."""
        is_shared = self.value is self.key
        self.key = self.key.index_select(0, sentences)
        self.value = self.key if is_shared else self.value.index_select(0, sentences)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, sentences)
        return self

    @torch.no_grad()
    def replace(self, rows: Tensor, other: AttentionMemory) -> AttentionMemory:
        """Let new sources take the place of others. Changes and returns ``self``.

        Writes in place, but where a new source is longer than any before.

        Args:
            rows: ``[N]`` int64, without repetition: the sources that leave.
            other: N sources from the same module; source i takes the place of ``rows[i]``.

        Raises:
            ValueError: One of the two has no lengths, or there are not N sources.
        """
        if self.lengths is None or other.lengths is None:
            raise ValueError("AttentionMemory: replace needs lengths in self and other, got None")
        _check_rows("AttentionMemory", rows, other.key)
        is_shared = self.value is self.key
        self.key = _replaced(self.key, rows, other.key, 2)
        self.value = self.key if is_shared else _replaced(self.value, rows, other.value, 2)
        self.lengths.index_copy_(0, rows, other.lengths.to(self.lengths.dtype))
        return self


@dataclass
class AttentionState:
    """Where K targets of each of B sources have looked; from ``RecurrentAttention.initial``.

    A tensor is None where the attention has no use for it. They are fp32 (fp64 in a module of
    fp64), and those of a state that ``forward`` or ``step`` returned are differentiable.
    """

    previous: Tensor | None = None
    """``[B, K, H, S]``: the weights of the last step."""
    coverage: Tensor | None = None
    """``[B, K, H, S]``: the sum of the weights of all steps."""

    @torch.no_grad()
    def select(self, parents: Tensor, sentences: Tensor | None = None) -> AttentionState:
        """Let target k of source i continue ``parents[i, k]`` of source ``sentences[i]``.

        Changes and returns ``self``; without ``sentences`` in place, at the same addresses.

        Args:
            parents: ``[N, K]`` int64.
            sentences: ``[N]`` int64: the sources that stay. Default: all, N = B.
        """
        self.previous = _selected(self.previous, parents, sentences)
        self.coverage = _selected(self.coverage, parents, sentences)
        return self

    @torch.no_grad()
    def replace(self, rows: Tensor, other: AttentionState) -> AttentionState:
        """Let the targets of new sources take the place of others. Changes and returns ``self``.

        Writes in place, but where a new source is longer than any before.

        Args:
            rows: ``[N]`` int64, without repetition: the sources that leave.
            other: The state of N sources with the same K.

        Raises:
            ValueError: There are not N sources, or K differs.
        """
        for name in ("previous", "coverage"):
            mine, new = getattr(self, name), getattr(other, name)
            if mine is None or new is None:
                continue
            _check_rows("AttentionState", rows, new)
            if mine.size(1) != new.size(1):
                raise ValueError(
                    f"AttentionState: other must have K = {mine.size(1)} targets a source, got "
                    f"{new.size(1)}"
                )
            setattr(self, name, _replaced(mine, rows, new, 3))
        return self

    @torch.no_grad()
    def copy_(self, other: AttentionState) -> AttentionState:
        """Write what ``other`` holds into the tensors of ``self``, whose addresses stay.

        So a CUDA graph can repeat a step: ``state.copy_(attention.step(query, memory, state)[2])``.
        """
        if self.previous is not None and other.previous is not None:
            self.previous.copy_(other.previous)
        if self.coverage is not None and other.coverage is not None:
            self.coverage.copy_(other.coverage)
        return self


def _selected(tensor: Tensor | None, parents: Tensor, sentences: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    source = tensor if sentences is None else tensor.index_select(0, sentences)
    index = parents[:, :, None, None].expand(-1, -1, *tensor.shape[2:])
    moved = source.gather(1, index)
    return tensor.copy_(moved) if sentences is None else moved


def _replaced(tensor: Tensor, rows: Tensor, new: Tensor, dim: int) -> Tensor:
    """``tensor`` with ``new`` in its rows, 0 behind it along ``dim``; a larger one if need be."""
    used, size = tensor.size(dim), new.size(dim)
    if used < size:
        shape = list(tensor.shape)
        shape[dim] = size
        grown = tensor.new_zeros(shape)
        grown.narrow(dim, 0, used).copy_(tensor)
        tensor = grown
    tensor.narrow(dim, 0, size).index_copy_(0, rows, new.to(tensor.dtype))
    if size < used:
        tensor.narrow(dim, size, used - size).index_fill_(0, rows, 0.0)
    return tensor


def _check_rows(name: str, rows: Tensor, new: Tensor) -> None:
    if rows.dim() != 1 or rows.size(0) != new.size(0):
        raise ValueError(
            f"{name}: rows must have shape [N] with N = {new.size(0)} (from other), got "
            f"{list(rows.shape)}"
        )
