"""The tokens and parents of a whole search, from which hypotheses are read off at its end."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class History:
    """Every step's tokens and parents, kept on the device until the search is over.

    Nothing is copied when beams change places: a hypothesis is the path from its last beam
    back to the first step. Sentences that leave the batch keep their part of the history.
    """

    def __init__(self, B: int, device: torch.device) -> None:
        self._total = B
        self._steps: list[tuple[Tensor, Tensor]] = []
        # From step number `first` on, row i of a step is sentence rows[i].
        self._segments: list[tuple[int, Tensor]] = [(0, torch.arange(B, device=device))]

    @property
    def sentences(self) -> Tensor:
        """``[B']`` int64: the sentence in each row of the batch."""
        return self._segments[-1][1]

    def append(self, tokens: Tensor, parents: Tensor) -> None:
        """Add a step: beam k of row i appended ``tokens[i, k]`` to beam ``parents[i, k]``."""
        self._steps.append((tokens, parents))

    def keep(self, rows: Tensor) -> None:
        """From the next step on, the batch consists of these of its rows."""
        self._segments.append((len(self._steps), self.sentences[rows]))

    def read(
        self, sentences: np.ndarray, beams: np.ndarray, lengths: np.ndarray
    ) -> list[list[int]]:
        """The tokens of N hypotheses, each given by its sentence, last beam and length.

        A hypothesis of length n is beam ``beams[i]`` of its sentence after n steps.
        """
        N = len(sentences)
        beams = beams.copy()
        longest = int(lengths.max(initial=0))
        found = np.zeros((N, longest), dtype=np.int64)
        ends = [first for first, _ in self._segments[1:]] + [len(self._steps)]
        for (first, rows), end in zip(reversed(self._segments), reversed(ends), strict=True):
            if first >= min(end, longest):
                continue
            tokens = torch.stack([step[0] for step in self._steps[first:end]]).cpu().numpy()
            parents = torch.stack([step[1] for step in self._steps[first:end]]).cpu().numpy()
            row_of = np.zeros(self._total, dtype=np.int64)
            row_of[rows.cpu().numpy()] = np.arange(len(rows))
            row = row_of[sentences]
            for t in range(min(end, longest) - 1, first - 1, -1):
                on = np.flatnonzero(lengths > t)
                found[on, t] = tokens[t - first, row[on], beams[on]]
                beams[on] = parents[t - first, row[on], beams[on]]
        return [path[:length].tolist() for path, length in zip(found, lengths, strict=True)]
