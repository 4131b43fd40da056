"""What a search finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hypothesis:
    """One target that a search proposes for a source."""

    tokens: list[int]
    """Without the tokens that begin and end a target."""
    score: float
    """What the search ranks by: ``log_probability`` normalised by length."""
    log_probability: float
    """Natural logarithm; the end-of-sequence token's is part of it where ``complete``."""
    complete: bool
    """Whether the target ended by itself; False where it was cut at the longest length."""
