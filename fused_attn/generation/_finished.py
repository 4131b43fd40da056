"""The hypotheses that a search holds on to: where each ended, not what it says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Finished(NamedTuple):
    """N hypotheses of each sentence or group, best first; all tensors are ``[..., N]``."""

    scores: Tensor
    """fp32, normalised; -inf marks a place that is not taken."""
    sums: Tensor
    """fp32, sums of log-probabilities."""
    paths: Tensor
    """int64: length, last beam and completeness, packed by ``pack_path``."""

    def merge(self, others: list[Finished]) -> Finished:
        """The N best of these and of ``others``; among equals, those that were there first."""
        scores, order = torch.cat([self.scores, *(other.scores for other in others)], dim=-1).sort(
            dim=-1, descending=True, stable=True
        )
        N = self.scores.size(-1)
        order = order[..., :N]
        sums = torch.cat([self.sums, *(other.sums for other in others)], dim=-1)
        paths = torch.cat([self.paths, *(other.paths for other in others)], dim=-1)
        return Finished(scores[..., :N], sums.gather(-1, order), paths.gather(-1, order))


def pack_path(lengths: Tensor, beams: Tensor, beam_size: int, complete: bool) -> Tensor:
    """A hypothesis as one integer: beam ``beams`` after ``lengths`` tokens."""
    return beams * 2 + (lengths * (2 * beam_size) + int(complete))


class Path(NamedTuple):
    """``pack_path`` undone."""

    length: int
    beam: int
    complete: bool

    @classmethod
    def unpack(cls, packed: int, beam_size: int) -> Path:
        """The path that an integer stands for."""
        return cls(packed // (2 * beam_size), packed // 2 % beam_size, bool(packed % 2))
