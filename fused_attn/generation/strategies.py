"""How to choose among a model's continuations, and what they must obey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Stopping = Literal["heuristic", "first", "never"]
LengthNormalization = Literal["power", "gnmt"]


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """K targets of each source, continued side by side; see docs/generation.md for the rules.

        score = log_probability / n ** length_penalty                 power
        score = log_probability / ((5 + n) / 6) ** length_penalty     gnmt
                + coverage_penalty * sum_s log(min(coverage[s], 1))

    n counts the end-of-sequence token; coverage[s] is the attention that source position s got
    over all steps.

    Args:
        beam_size: K, at most the size of the vocabulary.
        num_hypotheses: How many to return for each source, at most K.
        length_penalty: 0 ranks by log-probability; more favours longer targets.
        length_normalization: ``power`` or ``gnmt``.
        coverage_penalty: Weight of what the source is not covered by, at least 0. The model must
            have ``cross_attention``.
        stopping: When a source with K finished hypotheses is done: ``first``: at once;
            ``heuristic``: when its best target, scored as it stands, is not better than the worst
            of them; ``never``: when it cannot become better.
        temperature: Divides the logits, above 0.
        groups: Beams are cut into that many groups, each with a search of its own.
        diversity_penalty: Subtracted from a token's log-probability for each beam of an earlier
            group that has just chosen it.

    Raises:
        TypeError: A field is of a wrong type.
        ValueError: A field is out of range.

    Reference: Wu et al., 2016 (gnmt and coverage), https://arxiv.org/abs/1609.08144;
    Vijayakumar et al., 2016 (groups), https://arxiv.org/abs/1610.02424.
    """

    beam_size: int = 4
    num_hypotheses: int = 1
    length_penalty: float = 1.0
    length_normalization: LengthNormalization = "power"
    coverage_penalty: float = 0.0
    stopping: Stopping = "heuristic"
    temperature: float = 1.0
    groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beam_size", "num_hypotheses", "groups"):
            _check_count("beam_search", name, getattr(self, name))
        for name in ("length_penalty", "coverage_penalty", "diversity_penalty"):
            _check_number("beam_search", name, getattr(self, name))
        _check_positive("beam_search", "temperature", self.temperature)
        _check_choice("beam_search", "stopping", self.stopping, get_args(Stopping))
        _check_choice(
            "beam_search",
            "length_normalization",
            self.length_normalization,
            get_args(LengthNormalization),
        )
        if self.num_hypotheses > self.beam_size:
            raise ValueError(
                f"beam_search: num_hypotheses must be at most beam_size = {self.beam_size}, got "
                f"{self.num_hypotheses}"
            )
        if self.beam_size % self.groups != 0:
            raise ValueError(
                f"beam_search: groups must divide beam_size = {self.beam_size}, got {self.groups}"
            )
        if self.coverage_penalty < 0.0:
            raise ValueError(
                f"beam_search: coverage_penalty must be at least 0, got {self.coverage_penalty}"
            )


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The likeliest next token, one after the other: equal to beam search with one beam."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Tokens drawn at random, by their probability.

    The log-probabilities after the constraints are divided by ``temperature``; then the ``top_k``
    likeliest tokens are kept, and of these the fewest that hold ``top_p`` of the probability
    before ``top_k``. One number of Philox is drawn for a token, keyed by the seed, the number of
    the source in its call, the sample and the position: a sample depends neither on the batch nor
    on what else is sampled.

    A sample's log-probability and score are the model's own, as greedy search has them, whatever
    the temperature.

    Args:
        num_samples: How many targets of each source.
        temperature: Above 0; towards 0 the choice is the likeliest token's.
        top_k: At least 1. Default: all tokens.
        top_p: In (0, 1]. Default: all of the probability.
        seed: Default: drawn from PyTorch's generator.

    Raises:
        TypeError: A field is of a wrong type.
        ValueError: A field is out of range.

    Reference: Fan et al., 2018 (top k), https://arxiv.org/abs/1805.04833; Holtzman et al., 2020
    (top p), https://arxiv.org/abs/1904.09751.
    """

    num_samples: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_count("sample", "num_samples", self.num_samples)
        _check_positive("sample", "temperature", self.temperature)
        if self.top_k is not None:
            _check_count("sample", "top_k", self.top_k)
        if self.top_p is not None:
            _check_number("sample", "top_p", self.top_p)
            if not 0.0 < self.top_p <= 1.0:
                raise ValueError(f"sample: top_p must be in (0, 1], got {self.top_p}")
        if self.seed is not None and not is_integer(self.seed):
            raise TypeError(f"sample: seed must be an int, got {self.seed!r}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"sample: seed must be in 0..2**63-1, got {self.seed}")


Strategy = BeamSearch | Greedy | Sampling


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What targets must obey; each lowers or forbids log-probabilities, and renormalises nothing.

    They change the log-probabilities after the softmax, as processors in the beam search of
    Hugging Face's ``generate`` do; only a shortlist acts before it.

    Args:
        repetition_penalty: Multiplies the log-probability of every token that the target has
            already, the one that begins it included; above 1 discourages.
        no_repeat_ngram_size: No n-gram of that many tokens occurs twice; 0: no such rule.
        banned_tokens: Never chosen.
        token_bias: Added to the log-probabilities of these tokens.
        prefix: Every target begins with these tokens, whatever the other constraints say; their
            log-probabilities, the model's own, count. Either one sequence for all sources or one
            for each.
        shortlist: The vocabulary: other tokens do not exist and have no probability. Should hold
            the end-of-sequence token. Either one sequence for all sources or one for each.

    Raises:
        TypeError: A field is of a wrong type.
        ValueError: A field is out of range.

    Reference: Keskar et al., 2019 (repetition penalty), https://arxiv.org/abs/1909.05858; Paulus
    et al., 2018 (n-grams), https://arxiv.org/abs/1705.04304.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    banned_tokens: Sequence[int] = ()
    token_bias: Mapping[int, float] = field(default_factory=dict)
    prefix: Sequence[int] | Sequence[Sequence[int]] = ()
    shortlist: Sequence[int] | Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        _check_positive("constraints", "repetition_penalty", self.repetition_penalty)
        if not is_integer(self.no_repeat_ngram_size):
            raise TypeError(
                "constraints: no_repeat_ngram_size must be an int, got "
                f"{self.no_repeat_ngram_size!r}"
            )
        if self.no_repeat_ngram_size < 0:
            raise ValueError(
                "constraints: no_repeat_ngram_size must be at least 0, got "
                f"{self.no_repeat_ngram_size}"
            )
        _check_tokens("banned_tokens", self.banned_tokens)
        _check_tokens("token_bias", list(self.token_bias))
        for value in self.token_bias.values():
            _check_number("constraints", "token_bias's values", value)
        for name, rows in (("prefix", self.prefix), ("shortlist", self.shortlist)):
            for tokens in per_source(rows, 1) if rows is not None else ():
                _check_tokens(name, tokens)

    @property
    def looks_back(self) -> bool:
        """Whether they depend on the tokens chosen before."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0


def per_source(tokens: Any, count: int) -> list[Sequence[int]]:
    """One sequence of tokens for each of ``count`` sources; all of them where there are several."""
    if len(tokens) > 0 and all(isinstance(entry, Sequence) for entry in tokens):
        return list(tokens)
    return [tokens] * count


def is_integer(value: object) -> bool:
    """An int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(owner: str, name: str, value: object) -> None:
    if not is_integer(value):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}")


def _check_number(owner: str, name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite, got {value}")


def _check_positive(owner: str, name: str, value: object) -> None:
    _check_number(owner, name, value)
    if not value > 0.0:  # type: ignore[operator]
        raise ValueError(f"{owner}: {name} must be above 0, got {value}")


def _check_choice(owner: str, name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(known)}, got {value!r}")


def _check_tokens(name: str, tokens: object) -> None:
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise TypeError(f"constraints: {name} must be a sequence of tokens, got {tokens!r}")
    for token in tokens:
        if not is_integer(token):
            raise TypeError(f"constraints: {name} must hold ints, got {token!r}")
        if token < 0:
            raise ValueError(f"constraints: {name} must hold tokens of at least 0, got {token}")


NO_CONSTRAINTS = Constraints()
