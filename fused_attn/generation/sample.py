"""Sampling: targets drawn at random."""

from __future__ import annotations

from torch import Tensor

from .generate import all_of, generate
from .hypothesis import Hypothesis
from .state import Decoder, State
from .strategies import NO_CONSTRAINTS, Constraints, Sampling


def sample(
    model: Decoder[State],
    source: Tensor,
    source_lengths: Tensor | None = None,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    max_length: int | None = None,
    min_length: int = 0,
    constraints: Constraints = NO_CONSTRAINTS,
) -> list[list[Hypothesis]]:
    """Draw targets of each source; see ``fused_attn.generation.Sampling``.

    With the same seed the same samples, whatever the batch: each depends on the seed, the number
    of its source, its own number and the model's logits.

    Args:
        model: A decoder.
        source: ``[B, S]`` token indices.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        num_samples: How many of each source.
        temperature: Above 0.
        top_k: Keep the likeliest tokens.
        top_p: Keep the likeliest tokens that hold this much probability.
        seed: Default: drawn from PyTorch's generator.
        max_length: See ``beam_search``.
        min_length: See ``beam_search``.
        constraints: What the targets must obey.

    Returns:
        For each source its samples, in the order that they were drawn in.

    Raises:
        TypeError: See ``beam_search``.
        ValueError: See ``beam_search``.
        GenerationError: See ``beam_search``.
    """
    results = generate(
        model,
        source,
        source_lengths,
        strategy=Sampling(
            num_samples=num_samples,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        ),
        constraints=constraints,
        max_length=max_length,
        min_length=min_length,
    )
    return [result.hypotheses for result in all_of(results)]
