"""Greedy search: the likeliest next token, one after the other."""

from __future__ import annotations

from torch import Tensor

from .generate import all_of, generate
from .hypothesis import Hypothesis
from .state import Decoder, State
from .strategies import NO_CONSTRAINTS, Constraints, Greedy


def greedy_search(
    model: Decoder[State],
    source: Tensor,
    source_lengths: Tensor | None = None,
    *,
    max_length: int | None = None,
    min_length: int = 0,
    constraints: Constraints = NO_CONSTRAINTS,
) -> list[Hypothesis]:
    """Decode each source by taking the likeliest next token until the target ends.

    Equal to beam search with one beam. Ties go to the lower token. A hypothesis depends on its
    source alone, not on the batch it was decoded in (up to the rounding of the model's own
    arithmetic). Its ``score`` is the mean log-probability of its tokens, the end's included.

    Args:
        model: A decoder; see ``fused_attn.generation.Decoder``.
        source: ``[B, S]`` token indices.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        max_length: Most tokens of a hypothesis, the end-of-sequence token included. Default:
            for each sentence twice its source's length plus 10, or the model's limit if that
            is lower.
        min_length: Fewest tokens of a hypothesis, the end-of-sequence token not included.
        constraints: What the targets must obey.

    Returns:
        B hypotheses, in the order of the sources.

    Raises:
        TypeError: ``model`` is no decoder, or an argument is of a wrong type.
        ValueError: A shape or a number is out of range, a source is empty or longer than the
            model allows, or the model's logits are of a wrong shape.
        GenerationError: A sentence has no result, since the model's logits held NaN or left
            nothing possible. The others' are in it.
    """
    results = generate(
        model,
        source,
        source_lengths,
        strategy=Greedy(),
        constraints=constraints,
        max_length=max_length,
        min_length=min_length,
    )
    return [result.best for result in all_of(results)]
