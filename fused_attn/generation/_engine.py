"""The loop that all strategies share: a batch whose places are taken by waiting sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fused_attn.ops import BeamSearchStep

from ._choosing import Chooser
from ._finished import Finished, pack_path
from ._graph import StepRunner
from ._reading import read_results
from ._request import Job, check_logits, check_weights, steps_between_looks, worth_compacting
from ._slots import Slots, move, row_index
from .hypothesis import Result
from .strategies import BeamSearch, Constraints, Greedy, Sampling, Strategy

# Steps that there is room for at first; doubled when they are used up.
_FIRST_CAPACITY = 32


@dataclass(frozen=True)
class Settings:
    """What an engine is told once."""

    search: str
    """Name of the search, for messages."""
    strategy: Strategy
    constraints: Constraints
    min_length: int
    batch_size: int
    alignments: bool = False
    keeps_prefixes: bool = False
    """Keep the targets in order, though no constraint needs them."""

    @property
    def beam_size(self) -> int:
        """K."""
        if isinstance(self.strategy, BeamSearch):
            return self.strategy.beam_size
        return self.strategy.num_samples if isinstance(self.strategy, Sampling) else 1

    @property
    def groups(self) -> int:
        """G."""
        return self.strategy.groups if isinstance(self.strategy, BeamSearch) else 1


@dataclass
class Engine:
    """Decodes sources with a model.

    Every source has a place of its own in a batch of at most ``batch_size``; all that decides
    about it depends on that place alone. When sources have finished, waiting ones take their
    places (``Decoder.replace``), and when none wait the places are given up.

    On a GPU nothing in a step makes the host wait; it looks every few steps which sources are
    done. What a place computes after its source is done changes nothing.
    """

    model: Any
    settings: Settings
    device: torch.device
    state: Any = None
    occupants: list[Job | None] = field(default_factory=list)
    """Who has each place; None once its result is out."""
    ages: list[int] = field(default_factory=list)
    """Steps since each place was taken: what ``Slots.steps`` says, without asking the device."""

    def __post_init__(self) -> None:
        settings = self.settings
        self.slots: Slots
        self._chooser = Chooser(
            settings.strategy,
            settings.constraints,
            self.model.eos_token,
            settings.min_length,
            self.device,
        )
        strategy = settings.strategy
        self._covers = isinstance(strategy, BeamSearch) and strategy.coverage_penalty > 0.0
        self._has_beams = isinstance(strategy, BeamSearch)
        # Where looking costs nothing, work that is not needed is left out.
        self._may_look = self.device.type == "cpu"
        self._patience = steps_between_looks(self.device)
        self._steps = 0
        self._runner = StepRunner(self)

    # --- the loop ---------------------------------------------------------------------------

    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[int, Result]]:
        """Each source's number and result, as they finish."""
        while self.begin(jobs):
            while self.is_running:
                self.advance()
                yield from self.finished(jobs)

    @property
    def is_running(self) -> bool:
        """Whether some place is taken."""
        return any(job is not None for job in self.occupants)

    def begin(self, jobs: Iterator[Job]) -> bool:
        """A new batch of waiting sources; whether there were any."""
        batch = _take(jobs, self.settings.batch_size)
        if not batch:
            return False
        self.slots = self._fresh(batch, _FIRST_CAPACITY)
        self.state = self.model.start(*_sources(batch), self.settings.beam_size)
        self.occupants, self.ages, self._steps = list(batch), [0] * len(batch), 0
        self._runner.begin(self.slots.capacity)
        return True

    def advance(self) -> None:
        """One step of every place."""
        if max(self.ages) >= self.slots.capacity:
            self.slots.grow(2 * self.slots.capacity)
            self._runner.begin(self.slots.capacity)
        self._runner.run()
        self.ages = [age + 1 for age in self.ages]
        self._steps += 1

    def finished(self, jobs: Iterator[Job]) -> Iterator[tuple[int, Result]]:
        """Results of the sources that are done, if it is time to look; then their places go."""
        capacity = self.model.max_length
        # No place may go on for longer than the model can: it is done, and must be given up.
        is_full = capacity is not None and max(self.ages) >= capacity
        if not is_full and self._steps % self._patience != 0:
            return
        done = self.slots.done.all(dim=1).tolist()
        rows = [i for i, job in enumerate(self.occupants) if job is not None and done[i]]
        if rows:
            yield from self._results(rows)
            for row in rows:
                self.occupants[row] = None
        vacant = [i for i, job in enumerate(self.occupants) if job is None]
        if not vacant or len(vacant) == len(self.occupants):
            return
        # Reading a few sources together costs little more than reading one.
        if len(vacant) >= max(1, len(self.occupants) // 8) and hasattr(self.model, "replace"):
            arriving = _take(jobs, len(vacant))
            if arriving:
                self._admit(vacant[: len(arriving)], arriving)
                vacant = vacant[len(arriving) :]
        active = len(self.occupants) - len(vacant)
        if vacant and (is_full or worth_compacting(active, len(self.occupants))):
            self._compact([i for i, job in enumerate(self.occupants) if job is not None])

    # --- places -----------------------------------------------------------------------------

    def _admit(self, rows: list[int], jobs: list[Job]) -> None:
        index = torch.tensor(rows, device=self.device)
        fresh = self._fresh(jobs, self.slots.capacity)
        self.slots.put(index, fresh)
        other = self.model.start(*_sources(jobs), self.settings.beam_size)
        self.state = self.model.replace(self.state, index, other)
        for row, job in zip(rows, jobs, strict=True):
            self.occupants[row], self.ages[row] = job, 0
        self._runner.begin(self.slots.capacity)

    def _compact(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.slots.select(index)
        same = torch.arange(self.settings.beam_size, device=self.device).expand(len(rows), -1)
        self.state = self.model.reorder(self.state, same, index)
        self.occupants = [self.occupants[row] for row in rows]
        self.ages = [self.ages[row] for row in rows]
        self._runner.begin(self.slots.capacity)

    def _fresh(self, jobs: list[Job], capacity: int) -> Slots:
        B, K, G = len(jobs), self.settings.beam_size, self.settings.groups
        device = self.device
        scores = torch.zeros(B, K, device=device)
        if self._has_beams:
            # All beams are alike, so one of each group has children.
            scores.fill_(-torch.inf)
            scores[:, :: K // G] = 0.0
        minus_infinity = torch.full((B, K), -torch.inf, device=device)
        keeps_prefixes = self.settings.keeps_prefixes or self.settings.constraints.looks_back
        lengths = [len(job.source) for job in jobs]
        return Slots(
            tokens=torch.full((B, K), self.model.bos_token, device=device),
            scores=scores,
            steps=torch.zeros(B, 1, dtype=torch.int64, device=device),
            limits=torch.tensor([[job.limit] for job in jobs], device=device),
            source_lengths=torch.tensor([[length] for length in lengths], device=device),
            numbers=torch.tensor([[job.number] for job in jobs], device=device),
            done=torch.zeros(B, G, dtype=torch.bool, device=device),
            failed=torch.zeros(B, dtype=torch.int64, device=device),
            pool_scores=minus_infinity,
            pool_sums=minus_infinity.clone(),
            pool_paths=torch.zeros(B, K, dtype=torch.int64, device=device),
            moves=torch.zeros(B, capacity, K, dtype=torch.int64, device=device),
            sums=torch.zeros(B, capacity, K, device=device),
            prefixes=(
                torch.full((B, K, capacity + 1), self.model.bos_token, device=device)
                if keeps_prefixes
                else None
            ),
            forced=_table([job.prefix for job in jobs], 1, device)
            if self.settings.constraints.prefix
            else None,
            shortlist=_table([sorted(set(job.shortlist or ())) for job in jobs], 0, device)
            if self.settings.constraints.shortlist is not None
            else None,
            coverage=torch.zeros(B, K, max(lengths), device=device) if self._covers else None,
        )

    # --- a step -----------------------------------------------------------------------------

    def step(self) -> None:
        """Tensors on the device alone, changed in place: a CUDA graph can hold it."""
        slots, K = self.slots, self.settings.beam_size
        logits, self.state = self.model.step(slots.tokens, self.state)
        check_logits(
            self.settings.search,
            logits,
            len(slots.tokens),
            K,
            self.model.eos_token,
            K if self._has_beams else 1,
        )
        coverage: Tensor | None = None
        if slots.coverage is not None:
            weights = self.model.cross_attention(self.state)
            coverage = slots.coverage
            check_weights(self.settings.search, weights, coverage)
            # What is behind is behind every source's length.
            S = min(weights.size(2), coverage.size(2))
            coverage[..., :S] += weights[..., :S]
        step = self._chooser.choose(logits, slots)
        at = row_index(slots.steps, K)
        slots.moves.scatter_(1, at, move(step.tokens, step.parents)[:, None])
        slots.sums.scatter_(1, at, step.scores[:, None])
        n = slots.steps + 1  # [B, 1]
        fails = step.invalid & ~slots.done.all(dim=1)
        if self._has_beams:
            self._rank(step, n, coverage)
        else:
            self._collect(step, n)
        if not self._may_look or bool(fails.any()):
            slots.failed.copy_(torch.where(fails, n[:, 0], slots.failed))
            slots.done |= fails[:, None]
        if slots.prefixes is not None:
            _follow(slots.prefixes, step.parents)
            slots.prefixes.scatter_(2, n[:, :, None].expand(-1, K, 1), step.tokens[:, :, None])
        if coverage is not None:
            _follow(coverage, step.parents)
        slots.tokens.copy_(step.tokens)
        slots.scores.copy_(step.scores)
        slots.steps.copy_(n)
        if K > 1 and self._has_beams:
            self.state = self.model.reorder(self.state, step.parents)

    def _rank(self, step: BeamSearchStep, n: Tensor, coverage: Tensor | None) -> None:
        """Let what ends, and what is cut, enter the pools; close those that are settled."""
        slots, G = self.slots, self.settings.groups
        K = self.settings.beam_size
        strategy = self.settings.strategy
        assert isinstance(strategy, BeamSearch)
        norm = self._norm(n)
        open_ = ~slots.done[:, :, None]  # [B, G, 1]
        entrants: list[Finished] = []

        def enter(sums: Tensor, allowed: Tensor, origins: Tensor, paths: Tensor) -> None:
            """``origins`` are the beams, before the step, whose coverage counts."""
            scores = sums / norm
            if coverage is not None:
                penalty = _uncovered(coverage, slots.source_lengths).gather(1, origins)
                scores = scores + strategy.coverage_penalty * penalty
            scores, sums, paths = (x.unflatten(1, (G, -1)) for x in (scores, sums, paths))
            allowed = allowed & open_ & (sums > -torch.inf)
            entrants.append(Finished(scores.masked_fill(~allowed, -torch.inf), sums, paths))

        if not self._may_look or bool((step.finished_scores > -torch.inf).any()):
            enter(
                step.finished_scores,
                (n > self.settings.min_length)[:, :, None],
                step.finished_parents,
                pack_path(slots.steps, step.finished_parents, K, complete=True),
            )
        is_last = slots.limits <= n  # [B, 1]
        if not self._may_look or bool(is_last.any()):
            beams = torch.arange(K, device=self.device).expand_as(step.scores)
            enter(
                step.scores,
                is_last[:, :, None],
                step.parents,
                pack_path(n, beams, K, complete=False),
            )
        if entrants:
            merged = slots.pool(G).merge(entrants)
            for name, part in zip(("scores", "sums", "paths"), merged, strict=True):
                getattr(slots, f"pool_{name}").copy_(part.flatten(1))

        best = step.scores[:, :: K // G]  # [B, G]
        worst = slots.pool(G).scores[:, :, -1]  # -inf until the pool is full
        if strategy.stopping == "first":
            # A beam at -inf has no future either.
            stops = (worst > -torch.inf) | (best == -torch.inf)
        elif strategy.stopping == "never" and strategy.length_penalty > 0.0:
            stops = best / self._norm(slots.limits) <= worst
        else:
            stops = best / norm <= worst
        slots.done |= stops | is_last

    def _norm(self, lengths: Tensor) -> Tensor:
        strategy = self.settings.strategy
        assert isinstance(strategy, BeamSearch)
        base = lengths.double()
        if strategy.length_normalization == "gnmt":
            base = (base + 5.0) / 6.0
        return (base**strategy.length_penalty).float()

    def _collect(self, step: BeamSearchStep, n: Tensor) -> None:
        """Keep what each target has come to, as long as it goes on; place k is that of target k."""
        slots, K = self.slots, self.settings.beam_size
        targets = torch.arange(K, device=self.device).expand_as(step.tokens)
        ended = step.finished_scores > -torch.inf
        if isinstance(self.settings.strategy, Greedy):
            ended &= n > self.settings.min_length
        was_going = (slots.scores > -torch.inf) & ~slots.done
        sums = torch.where(ended, step.finished_scores, step.scores)
        paths = torch.where(
            ended,
            pack_path(slots.steps, targets, K, complete=True),
            pack_path(n, targets, K, complete=False),
        )
        for name, value in (("scores", sums / n), ("sums", sums), ("paths", paths)):
            kept = getattr(slots, f"pool_{name}")
            kept.copy_(torch.where(was_going, value, kept))
        step.scores.masked_fill_(ended, -torch.inf)
        slots.done |= (step.scores == -torch.inf).all(dim=1, keepdim=True) | (slots.limits <= n)

    # --- results ----------------------------------------------------------------------------

    def _results(self, rows: list[int]) -> Iterator[tuple[int, Result]]:
        jobs = [job for row in rows if (job := self.occupants[row]) is not None]
        index = torch.tensor(rows, device=self.device)
        results = read_results(self.settings, self.model, self.slots, index, jobs)
        for job, result in zip(jobs, results, strict=True):
            yield job.number, result


def _take(jobs: Iterator[Job], count: int) -> list[Job]:
    return list(itertools.islice(jobs, count))


def _sources(jobs: list[Job]) -> tuple[Tensor, Tensor]:
    """``[N, S]`` and ``[N]``."""
    sources = [job.source for job in jobs]
    lengths = torch.tensor([len(source) for source in sources], device=sources[0].device)
    return pad_sequence(sources, batch_first=True), lengths


def _table(rows: Sequence[Sequence[int]], spare: int, device: torch.device) -> Tensor:
    """Token sequences as ``[B, N + spare]``, followed by -1."""
    width = max(map(len, rows)) + spare
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


def _follow(rows: Tensor, parents: Tensor) -> None:
    """Let each beam of ``[B, K, N]`` continue its parent, in place."""
    rows.copy_(rows.gather(1, parents[:, :, None].expand(-1, -1, rows.size(2))))


def _uncovered(coverage: Tensor, source_lengths: Tensor) -> Tensor:
    """``[B, K]``: log of the coverage, at most 0, summed over each source."""
    smallest = torch.finfo(coverage.dtype).tiny
    behind = torch.arange(coverage.size(2), device=coverage.device) >= source_lengths  # [B, S]
    logs = coverage.clamp(smallest, 1.0).log()
    return logs.masked_fill(behind[:, None], 0.0).sum(dim=2)
