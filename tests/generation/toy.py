"""A decoder without a neural network, and searches written as plainly as possible."""

from __future__ import annotations

import itertools
import math
import random
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


def plain_beam_search(
    model: PrefixDecoder,
    source: Prefix,
    beam_size: int,
    max_length: int,
    min_length: int,
    length_penalty: float,
    stopping: str,
) -> list[tuple[float, Prefix, bool]]:
    """The documented algorithm on lists, one sentence at a time."""
    running: list[tuple[float, Prefix]] = [(0.0, ())]
    pool: list[tuple[float, Prefix, bool]] = []
    for n in range(1, max_length + 1):
        candidates = sorted(
            (
                (total + value, prefix, token)
                for total, prefix in running
                for token, value in enumerate(model.log_probabilities(source, prefix))
                if value > -math.inf and not (token == EOS and n <= min_length)  # passed over
            ),
            key=lambda candidate: -candidate[0],
        )
        for total, prefix, token in candidates[:beam_size]:
            if token == EOS:
                pool.append((total / n**length_penalty, prefix, True))
            elif n == max_length:
                pool.append((total / n**length_penalty, (*prefix, token), False))
        running = [
            (total, (*prefix, token)) for total, prefix, token in candidates if token != EOS
        ][:beam_size]
        pool = sorted(pool, key=lambda entry: -entry[0])[:beam_size]
        if not running:
            break
        if len(pool) == beam_size:
            best = running[0][0]
            horizon = max_length if stopping == "never" and length_penalty > 0 else n
            if stopping == "first" or best / horizon**length_penalty <= pool[-1][0]:
                break
    return pool
