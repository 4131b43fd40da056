"""A decoder without a neural network, and searches written as plainly as possible."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BOS, EOS = 1, 2

Prefix = tuple[int, ...]


@dataclass
class PrefixState:
    """Sources and, for each, the K targets so far, as plain Python."""

    sources: list[Prefix]
    prefixes: list[list[Prefix]]


class PrefixDecoder:
    """Logits that are an arbitrary but fixed function of the source and the whole target.

    Any mistake in the order of beams, in lengths or in batching changes what it says.

    Args:
        vocabulary: V.
        usable: Tokens, besides the end, that get a finite logit; None: all.
        end_bonus: Added to the end's logit.
    """

    def __init__(
        self,
        vocabulary: int = 12,
        usable: tuple[int, ...] | None = None,
        end_bonus: float = 0.0,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vocabulary, self.usable, self.end_bonus = vocabulary, usable, end_bonus
        self.max_length, self.dtype = max_length, dtype
        self.bos_token, self.eos_token = BOS, EOS
        self.rows_stepped: list[int] = []

    def logits(self, source: Prefix, prefix: Prefix) -> list[float]:
        generator = random.Random(repr((source, prefix)))
        values = [generator.gauss(0.0, 2.0) for _ in range(self.vocabulary)]
        if self.usable is not None:
            for token in range(self.vocabulary):
                if token != EOS and token not in self.usable:
                    values[token] = -math.inf
        values[EOS] += self.end_bonus
        return values

    def log_probabilities(self, source: Prefix, prefix: Prefix) -> list[float]:
        logits = torch.tensor(self.logits(source, prefix), dtype=self.dtype)
        return logits.double().log_softmax(-1).tolist()

    def start(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> PrefixState:
        sources = [
            tuple(row[:length])
            for row, length in zip(source.tolist(), source_lengths.tolist(), strict=True)
        ]
        return PrefixState(sources, [[()] * beam_size for _ in sources])

    def step(self, tokens: Tensor, state: PrefixState) -> tuple[Tensor, PrefixState]:
        prefixes = [
            [(*prefix, token) for prefix, token in zip(beams, new, strict=True)]
            for beams, new in zip(state.prefixes, tokens.tolist(), strict=True)
        ]
        self.rows_stepped.append(len(prefixes))
        logits = [
            [self.logits(source, prefix[1:]) for prefix in beams]
            for source, beams in zip(state.sources, prefixes, strict=True)
        ]
        return torch.tensor(logits, dtype=self.dtype), PrefixState(state.sources, prefixes)

    def reorder(
        self, state: PrefixState, parents: Tensor, sentences: Tensor | None = None
    ) -> PrefixState:
        kept = range(len(state.sources)) if sentences is None else sentences.tolist()
        return PrefixState(
            [state.sources[i] for i in kept],
            [
                [state.prefixes[i][parent] for parent in row]
                for i, row in zip(kept, parents.tolist(), strict=True)
            ],
        )

    def attention(self, source: Prefix, prefix: Prefix) -> list[float]:
        """What the step that follows a prefix looks at: any numbers that sum to 1."""
        generator = random.Random(repr((source, prefix, "attention")))
        weights = [generator.random() ** 3 for _ in source]
        return [weight / sum(weights) for weight in weights]

    def cross_attention(self, state: PrefixState) -> Tensor:
        rows = [
            [self.attention(source, prefix[1:]) for prefix in beams]
            for source, beams in zip(state.sources, state.prefixes, strict=True)
        ]
        S = max(map(len, state.sources))
        return torch.tensor([[row + [0.0] * (S - len(row)) for row in rows_] for rows_ in rows])

    def align(
        self, source: Tensor, target: Tensor, source_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        weights = torch.zeros(len(source), target.size(1), source.size(1))
        lengths = zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)
        for i, (S, T) in enumerate(lengths):
            for t in range(T):
                prefix = tuple(target[i, 1 : t + 1].tolist())
                row = self.attention(tuple(source[i, :S].tolist()), prefix)
                weights[i, t, :S] = torch.tensor(row)
        return weights


class ReplacingDecoder(PrefixDecoder):
    """One that lets waiting sources enter a running batch."""

    def replace(self, state: PrefixState, sentences: Tensor, other: PrefixState) -> PrefixState:
        sources, prefixes = list(state.sources), list(state.prefixes)
        for i, row in enumerate(sentences.tolist()):
            sources[row], prefixes[row] = other.sources[i], other.prefixes[i]
        return PrefixState(sources, prefixes)


def every_target(
    model: PrefixDecoder, source: Prefix, max_length: int, min_length: int, length_penalty: float
) -> list[tuple[float, Prefix, bool]]:
    """All possible targets with their scores, best first: brute force."""
    assert model.usable is not None
    found = []
    for length in range(max_length + 1):
        for prefix in itertools.product(model.usable, repeat=length):
            total = score_of(model, source, prefix)
            if length == max_length:
                found.append((total / length**length_penalty, prefix, False))
            elif length >= min_length:
                total += model.log_probabilities(source, prefix)[EOS]
                found.append((total / (length + 1) ** length_penalty, prefix, True))
    return sorted(found, key=lambda entry: -entry[0])


def score_of(model: PrefixDecoder, source: Prefix, prefix: Prefix) -> float:
    """Sum of the log-probabilities of a target that has not ended."""
    return sum(model.log_probabilities(source, prefix[:t])[token] for t, token in enumerate(prefix))


@dataclass(frozen=True)
class Plain:
    """Options of ``plain_beam_search``, with the names that the library gives them."""

    beam_size: int
    max_length: int
    min_length: int = 0
    length_penalty: float = 1.0
    stopping: str = "heuristic"
    length_normalization: str = "power"
    coverage_penalty: float = 0.0
    groups: int = 1
    diversity_penalty: float = 0.0
    change: Callable[[Prefix, list[float]], list[float]] = lambda prefix, values: values
    """From a target so far and its log-probabilities to those that constraints leave."""

    def norm(self, length: int) -> float:
        base = float(length)
        if self.length_normalization == "gnmt":
            base = (5 + length) / 6
        return base**self.length_penalty

    def uncovered(self, model: PrefixDecoder, source: Prefix, prefix: Prefix) -> float:
        """The coverage penalty of a target for which every step up to that after prefix was."""
        if self.coverage_penalty == 0.0:
            return 0.0
        steps = [model.attention(source, prefix[:t]) for t in range(len(prefix) + 1)]
        covered = (min(1.0, sum(column)) for column in zip(*steps, strict=True))
        return self.coverage_penalty * sum(map(math.log, covered))


Found = list[tuple[float, Prefix, bool]]


def plain_beam_search(model: PrefixDecoder, source: Prefix, options: Plain) -> Found:
    """The documented algorithm on lists, one sentence at a time."""
    width = options.beam_size // options.groups
    running: list[list[tuple[float, Prefix]]] = [[(0.0, ())] for _ in range(options.groups)]
    pools: list[Found] = [[] for _ in range(options.groups)]
    done = [False] * options.groups
    for n in range(1, options.max_length + 1):
        chosen: list[int] = []
        for group in range(options.groups):
            candidates = []
            for total, prefix in running[group]:
                values = options.change(prefix, model.log_probabilities(source, prefix))
                for token, value in enumerate(values):
                    value -= options.diversity_penalty * chosen.count(token)
                    if value > -math.inf and not (token == EOS and n <= options.min_length):
                        candidates.append((total + value, prefix, token))
            candidates.sort(key=lambda candidate: -candidate[0])
            entrants: Found = []
            for total, prefix, token in candidates[:width]:
                score = total / options.norm(n) + options.uncovered(model, source, prefix)
                if token == EOS:
                    entrants.append((score, prefix, True))
            going_on = [candidate for candidate in candidates if candidate[2] != EOS][:width]
            if n == options.max_length:
                for total, prefix, token in going_on:
                    score = total / options.norm(n) + options.uncovered(model, source, prefix)
                    entrants.append((score, (*prefix, token), False))
            running[group] = [(total, (*prefix, token)) for total, prefix, token in going_on]
            if done[group]:
                continue
            chosen += [token for _, _, token in going_on]
            pool = sorted(pools[group] + entrants, key=lambda entry: -entry[0])[:width]
            pools[group] = pool
            if not going_on:
                done[group] = True
            elif len(pool) == width:
                best = going_on[0][0]
                reaches = options.stopping == "never" and options.length_penalty > 0
                horizon = options.norm(options.max_length if reaches else n)
                done[group] = options.stopping == "first" or best / horizon <= pool[-1][0]
        if all(done):
            break
    return sorted(itertools.chain.from_iterable(pools), key=lambda entry: -entry[0])
