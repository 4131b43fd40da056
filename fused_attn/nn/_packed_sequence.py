"""The valid steps of a padded batch, one after another: what recurrent layers work on.

Rows are sorted by length, the longest first. Step 0 of all of them comes first, then step 1 of
those that have one, and so on: the layout of ``torch.nn.utils.rnn.PackedSequence``. So a step is a
block of rows, its state the first rows of a matrix, and no work is spent on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LENGTHS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class PackedBatch:
    """Where the steps of ``[B, T, ...]`` stand in ``[N, ...]``, and back."""

    shape: tuple[int, int]
    """B and T."""
    batch_sizes: Tensor
    """``[S]`` int64 on the host: how many sequences have a step s; S is the longest length."""
    positions: Tensor | None
    """``[N]``: the packed steps' places in ``[B * T]``; None: all places, step by step."""
    order: Tensor | None
    """``[B]``: the sequences, longest first; None: as they are."""

    @staticmethod
    def of(x: Tensor, lengths: Tensor | None) -> PackedBatch:
        """The batch ``x [B, T, ...]`` with these lengths ``[B]``; None: all of T."""
        B, T = x.shape[:2]
        full = PackedBatch((B, T), torch.full((T if B > 0 else 0,), B), None, None)
        if lengths is None:
            return full
        if lengths.dtype not in _LENGTHS:
            raise TypeError(
                f"RecurrentLayers: lengths must have dtype int32 or int64, got {lengths.dtype}"
            )
        if lengths.shape != (B,):
            raise ValueError(
                f"RecurrentLayers: lengths must have shape [B] with B = {B} (from x), got "
                f"{list(lengths.shape)}"
            )
        host = lengths.detach().cpu().long()
        if B > 0 and not 0 <= int(host.min()) <= int(host.max()) <= T:
            raise ValueError(
                f"RecurrentLayers: lengths must be in [0, T] with T = {T}, got {host.tolist()}"
            )
        if B > 0 and int(host.min()) == T:
            return full
        ordered, order = host.sort(descending=True, stable=True)
        longest = int(ordered[0]) if B > 0 else 0
        has_step = torch.arange(longest)[:, None] < ordered  # [S, B]
        step, row = has_step.nonzero().unbind(1)
        positions = order[row] * T + step
        return PackedBatch((B, T), has_step.sum(1), positions.to(x.device), order.to(x.device))

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, E]`` to ``[N, E]``."""
        if self.positions is None:
            return x.transpose(0, 1).reshape(-1, x.size(-1))
        return x.reshape(-1, x.size(-1)).index_select(0, self.positions)

    def unpack(self, data: Tensor) -> Tensor:
        """``[N, E]`` to ``[B, T, E]``, 0 where there is no step."""
        (B, T), E = self.shape, data.size(-1)
        if self.positions is None:
            return data.view(T, B, E).transpose(0, 1)
        padded = data.new_zeros(B * T, E)
        return padded.index_copy(0, self.positions, data).view(B, T, E)

    def sort(self, state: Tensor) -> Tensor:
        """``[L, B, H]`` to ``[L, n, H]``: sequences that have a step, longest first."""
        if self.order is None:
            return state
        return state.index_select(1, self.order[: self._active])

    def unsort(self, state: Tensor, initial: Tensor) -> Tensor:
        """Back; ``initial`` ``[L, B, H]`` is kept for sequences without a step."""
        if self.order is None:
            return state if self._active else initial
        return initial.index_copy(1, self.order[: self._active], state.to(initial.dtype))

    @property
    def _active(self) -> int:
        """How many sequences have a step."""
        return int(self.batch_sizes[0]) if self.batch_sizes.numel() > 0 else 0
