"""Reads hypotheses off the history of a batch: the one transfer for sources that leave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._finished import Path
from ._request import Job
from ._slots import Slots
from .hypothesis import Hypothesis, Result
from .strategies import BeamSearch

if TYPE_CHECKING:
    from ._engine import Settings


@dataclass(frozen=True)
class Entry:
    """A hypothesis in a pool."""

    row: int
    """Place among those that are read."""
    path: Path
    score: float
    total: float
    """Sum of log-probabilities."""


def read_results(
    settings: Settings, model: Any, slots: Slots, rows: Tensor, jobs: list[Job]
) -> list[Result]:
    """What was found for the sources in some places.

    Args:
        settings: The engine's.
        model: Aligns, where that is asked for.
        slots: The batch.
        rows: ``[N]`` int64: the places.
        jobs: The sources in them.
    """
    K = settings.beam_size
    count = K
    is_ranked = isinstance(settings.strategy, BeamSearch)
    if isinstance(settings.strategy, BeamSearch):
        count = settings.strategy.num_hypotheses
    scores, sums, paths, failed = (
        tensor[rows].cpu().numpy()
        for tensor in (slots.pool_scores, slots.pool_sums, slots.pool_paths, slots.failed)
    )
    entries: list[Entry] = []
    for row in np.flatnonzero(failed == 0).tolist():
        taken = np.flatnonzero(scores[row] > -np.inf)
        if is_ranked:  # the pools of several groups: each is in order, all of them are not
            taken = taken[np.argsort(-scores[row, taken], kind="stable")]
        for place in taken[:count].tolist():
            path = Path.unpack(int(paths[row, place]), K)
            entries.append(Entry(row, path, float(scores[row, place]), float(sums[row, place])))
    hypotheses = read_hypotheses(slots, rows, entries, K)
    if settings.alignments and entries:
        hypotheses = _align(model, [jobs[entry.row] for entry in entries], hypotheses)
    found: list[list[Hypothesis]] = [[] for _ in jobs]
    for entry, hypothesis in zip(entries, hypotheses, strict=True):
        found[entry.row].append(hypothesis)
    return [
        Result(row, None if row else _why_nothing(settings.search, job.number, int(step)))
        for row, job, step in zip(found, jobs, failed, strict=True)
    ]


def read_hypotheses(
    slots: Slots, rows: Tensor, entries: list[Entry], beam_size: int
) -> list[Hypothesis]:
    """The hypotheses of entries, from the last step of each back to the first."""
    lengths = np.array([entry.path.length for entry in entries], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    moves = slots.moves[rows, :longest].cpu().numpy()
    sums = slots.sums[rows, :longest].cpu().numpy()
    row = np.array([entry.row for entry in entries], dtype=np.int64)
    beams = np.array([entry.path.beam for entry in entries], dtype=np.int64)
    N = len(entries)
    tokens, stood = np.zeros((2, N, longest), dtype=np.int64)
    totals = np.zeros((N, longest + 1))
    for t in range(longest - 1, -1, -1):
        on = np.flatnonzero(lengths > t)
        made = moves[row[on], t, beams[on]]
        tokens[on, t], stood[on, t] = made // beam_size, beams[on]
        totals[on, t + 1] = sums[row[on], t, beams[on]]
        beams[on] = made % beam_size
    found = []
    for i, entry in enumerate(entries):
        length = entry.path.length
        steps = np.diff(totals[i, : length + 1]).tolist()
        if entry.path.complete:
            steps.append(entry.total - float(totals[i, length]))
        found.append(
            Hypothesis(
                tokens[i, :length].tolist(),
                entry.score,
                entry.total,
                entry.path.complete,
                steps,
                stood[i, :length].tolist(),
            )
        )
    return found


def _align(model: Any, jobs: list[Job], hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    """The hypotheses with their alignments: targets are given to the model once more."""
    device = jobs[0].source.device
    targets = []
    for hypothesis in hypotheses:
        target = [model.bos_token, *hypothesis.tokens]
        targets.append(torch.tensor(target if hypothesis.complete else target[:-1], device=device))
    sources = [job.source for job in jobs]
    lengths, target_lengths = (
        torch.tensor([len(sequence) for sequence in sequences], device=device)
        for sequences in (sources, targets)
    )
    weights = model.align(
        pad_sequence(sources, batch_first=True),
        pad_sequence(targets, batch_first=True),
        lengths,
        target_lengths,
    )
    return [
        Hypothesis(
            **{**vars(hypothesis), "alignment": rows[: len(target), : len(source)].float().cpu()}
        )
        for hypothesis, rows, target, source in zip(
            hypotheses, weights, targets, sources, strict=True
        )
    ]


def _why_nothing(search: str, number: int, failed: int) -> str:
    if failed > 0:
        return (
            f"{search}: the model's logits must not hold NaN or +inf, got some at step {failed} "
            f"for sentence {number}"
        )
    return (
        f"{search}: the model's logits must be finite for some token that may follow at every "
        f"step, got none for sentence {number}"
    )
