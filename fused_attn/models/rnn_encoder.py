"""The reader of a recurrent sequence-to-sequence model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.nn import RecurrentLayers

from .rnn_config import RNNSeq2SeqConfig

RecurrentState = tuple[Tensor, ...]
"""``(hidden,)``, for an LSTM ``(hidden, cell)``; each ``[L, B, H]``."""


class Encoded(NamedTuple):
    """Sources that were read."""

    memory: Tensor
    """``[B, S', H]``, 0 behind a length, in the source's own order."""
    lengths: Tensor | None
    """``[B]``: of the memory; None where all are S'."""
    state: RecurrentState
    """At the end of reading, both directions side by side; of a source of length 0 it is 0."""


class FrontEnd(nn.Module):
    """From frames ``[B, S, F]`` to what the encoder reads, ``[B, ceil(S / r), E]``.

    ``linear``: a linear map of each r frames in a row. ``convolution``: a convolution of 2 r + 1
    frames with stride r, and one of three of its positions, both rectified. Whatever lies behind a
    length is taken for zeros.

    Args:
        kind: ``"linear"`` or ``"convolution"``.
        features: F.
        size: E.
        reduction: r.
    """

    def __init__(self, kind: str, features: int, size: int, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.margin = reduction if kind == "convolution" else 0
        self.width = reduction + self.margin + (kind == "convolution")
        self.projection = nn.Linear(self.width * features, size)
        self.refinement = nn.Linear(3 * size, size) if kind == "convolution" else None

    def forward(self, frames: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The positions, and how many each source has."""
        S, r = frames.size(1), self.reduction
        frames = _mask(frames, lengths)
        positions = -(-S // r)
        reduced = None if lengths is None else (lengths + r - 1) // r
        end = (positions - 1) * r + self.width - self.margin  # of the last window
        x = self.projection(_windows(frames, self.width, r, (self.margin, end - S)))
        if self.refinement is None:
            return x, reduced
        x = _mask(x.relu(), reduced)
        return self.refinement(_windows(x, 3, 1, (1, 1))).relu(), reduced


def _windows(x: Tensor, width: int, stride: int, margins: tuple[int, int]) -> Tensor:
    """``[B, S, F] -> [B, n, F * width]``: neighbouring positions side by side."""
    return F.pad(x, (0, 0, *margins)).unfold(1, width, stride).flatten(2)


def _mask(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return x
    behind = torch.arange(x.size(1), device=x.device) >= lengths[:, None]
    return x.masked_fill(behind[:, :, None], 0.0)


class RNNEncoder(nn.Module):
    """Recurrent layers over embedded sources.

    Args:
        config: The model's.
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.reverses = config.reverse_source
        self.directions = 2 if config.bidirectional else 1
        self.recurrence = RecurrentLayers(
            config.cell,
            config.embedding_size,
            config.hidden_size // self.directions,
            config.num_encoder_layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout,
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Encoded:
        """Read ``[B, S', E]``."""
        if self.reverses:
            x = _reverse(x, lengths)
        memory, state = self.recurrence(x, lengths)
        if self.reverses:
            memory = _reverse(memory, lengths)
        return Encoded(memory, lengths, tuple(self._merge(part) for part in state))

    def _merge(self, state: Tensor) -> Tensor:
        """``[L * directions, B, h] -> [L, B, H]``."""
        if self.directions == 1:
            return state
        return state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence from its end; what lies behind stays there."""
    if lengths is None:
        return x.flip(1)
    index = torch.arange(x.size(1), device=x.device)
    mirrored = lengths[:, None] - 1 - index
    index = torch.where(mirrored >= 0, mirrored, index)
    return x.gather(1, index[:, :, None].expand_as(x))
