"""The hypotheses that a search holds on to: where each ended, not what it says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._history import History
from .hypothesis import Hypothesis


class Finished(NamedTuple):
    """N hypotheses of each sentence in the batch, best first; all tensors are ``[B, N]``."""

    scores: Tensor
    """fp32, normalised; -inf marks a place that is not taken."""
    sums: Tensor
    """fp32, sums of log-probabilities."""
    paths: Tensor
    """int64: length, last beam and completeness, packed by ``pack_path``."""

    @classmethod
    def none(cls, B: int, N: int, device: torch.device) -> Finished:
        """All places free."""
        return cls(
            scores=torch.full((B, N), -torch.inf, device=device),
            sums=torch.full((B, N), -torch.inf, device=device),
            paths=torch.zeros(B, N, dtype=torch.int64, device=device),
        )

    def rows(self, rows: Tensor) -> Finished:
        """Those of some sentences only."""
        return Finished(*(field[rows] for field in self))

    def merge(self, others: list[Finished]) -> Finished:
        """The N best of these and of ``others``; among equals, those that were there first."""
        scores, order = torch.cat([self.scores, *(other.scores for other in others)], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        N = self.scores.size(1)
        order = order[:, :N]
        sums = torch.cat([self.sums, *(other.sums for other in others)], dim=1)
        paths = torch.cat([self.paths, *(other.paths for other in others)], dim=1)
        return Finished(scores[:, :N], sums.gather(1, order), paths.gather(1, order))


def pack_path(length: int, beams: Tensor, beam_size: int, complete: bool) -> Tensor:
    """A hypothesis as one integer: beam ``beams`` after ``length`` steps."""
    return beams * 2 + (2 * beam_size * length + complete)


def read_hypotheses(
    search: str,
    parts: list[tuple[Tensor, Finished]],
    history: History,
    beam_size: int,
) -> list[list[Hypothesis]]:
    """What was found for every sentence, best first; the one transfer at the end of a search.

    Args:
        search: Name of the search, for messages.
        parts: Sentence numbers ``[B']`` and what was found for them; together every sentence
            once.
        history: The search's.
        beam_size: K.

    Raises:
        ValueError: Nothing was found for a sentence.
    """
    order = np.argsort(torch.cat([sentences for sentences, _ in parts]).cpu().numpy())
    scores, sums, paths = (
        torch.cat(fields).cpu().numpy()[order]
        for fields in zip(*(finished for _, finished in parts), strict=True)
    )
    taken = scores > -np.inf
    if not taken.any(axis=1).all():
        raise ValueError(
            f"{search}: the model's logits must be finite for some token at every step, got "
            f"none for sentence {int(np.argmin(taken.any(axis=1)))}"
        )
    sentences, places = np.nonzero(taken)
    packed = paths[sentences, places]
    texts = history.read(
        sentences,
        beams=packed // 2 % beam_size,
        lengths=packed // (2 * beam_size),
    )
    found: list[list[Hypothesis]] = [[] for _ in order]
    for i, place, path, tokens in zip(sentences, places, packed, texts, strict=True):
        found[i].append(
            Hypothesis(tokens, float(scores[i, place]), float(sums[i, place]), bool(path % 2))
        )
    return found
