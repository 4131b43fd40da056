"""What generation finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Hypothesis:
    """One target that a search proposes for a source."""

    tokens: list[int]
    """Without the tokens that begin and end a target."""
    score: float
    """What the search ranks by: ``log_probability`` normalised by length, less penalties."""
    log_probability: float
    """Natural logarithm; the end-of-sequence token's is part of it where ``complete``."""
    complete: bool
    """Whether the target ended by itself; False where it was cut at the longest length."""
    token_log_probabilities: list[float] = field(default_factory=list, compare=False)
    """One a token, the end-of-sequence token's last where ``complete``; their sum is
    ``log_probability`` up to the rounding of the running sums that they are differences of."""
    beams: list[int] = field(default_factory=list, compare=False)
    """Its ancestry: in which beam, 0..K-1, it stood after each token."""
    alignment: Tensor | None = field(default=None, compare=False)
    """``[tokens, S]``, where it was asked for: how much each token, the end's included where
    ``complete``, looks at each source position; rows sum to 1."""


@dataclass(frozen=True)
class Result:
    """What was found for one source."""

    hypotheses: list[Hypothesis]
    """Best first; samples in the order that they were drawn. Empty where ``error`` is set."""
    error: str | None = None
    """Why nothing was found; None where something was."""

    @property
    def best(self) -> Hypothesis:
        """The first hypothesis.

        Raises:
            GenerationError: There is none.
        """
        if self.error is not None:
            raise GenerationError(self.error, [self])
        return self.hypotheses[0]


class GenerationError(ValueError):
    """Some sources have no result; ``results`` holds those of all, with the others' intact."""

    def __init__(self, message: str, results: list[Result]) -> None:
        super().__init__(message)
        self.results = results
