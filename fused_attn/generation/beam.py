"""Beam search: the K likeliest targets so far, continued side by side."""

from __future__ import annotations

from torch import Tensor

from .generate import all_of, generate
from .hypothesis import Hypothesis
from .state import Decoder, State
from .strategies import NO_CONSTRAINTS, BeamSearch, Constraints, Stopping


def beam_search(
    model: Decoder[State],
    source: Tensor,
    source_lengths: Tensor | None = None,
    *,
    beam_size: int = 4,
    max_length: int | None = None,
    min_length: int = 0,
    length_penalty: float = 1.0,
    stopping: Stopping = "heuristic",
    num_hypotheses: int = 1,
    constraints: Constraints = NO_CONSTRAINTS,
) -> list[list[Hypothesis]]:
    """Decode each source with K beams; the results are those of Hugging Face's ``generate``.

    In each step the K targets of a sentence are continued by every token and the continuations
    are ranked by their sum of log-probabilities. The K best that do not end go on. Those among
    the K best that end, n tokens long with the end-of-sequence token, enter the sentence's pool
    of finished hypotheses with

        score = log_probability / n ** length_penalty

    and the pool keeps its K best. At the sentence's longest length the targets that go on enter
    the pool as they are. A sentence stops there, or as soon as its pool is full and

    - ``heuristic`` (``early_stopping=False``): the best target that goes on, scored as if it
      ended with its present length, does not exceed the pool's worst score;
    - ``first`` (``early_stopping=True``): at once;
    - ``never`` (``early_stopping="never"``): it does not exceed it when scored with the length,
      up to the longest, that favours it most. Then nothing in the beam can change the pool.

    Ties go to the lower beam and token, and to what finished first. A sentence's hypotheses
    depend on that sentence alone, not on the batch it was decoded in (up to the rounding of
    the model's own arithmetic). ``generate`` has more options: other length normalisations, a
    coverage penalty, diverse groups, alignments, results of their own for sentences that fail.

    Args:
        model: A decoder; see ``fused_attn.generation.Decoder``.
        source: ``[B, S]`` token indices.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        beam_size: K, at most the size of the vocabulary.
        max_length: Most tokens of a hypothesis, the end-of-sequence token included. Default:
            for each sentence twice its source's length plus 10, or the model's limit if that
            is lower.
        min_length: Fewest tokens of a hypothesis, the end-of-sequence token not included.
            Shorter ends are passed over; no probability is redistributed.
        length_penalty: 0 ranks by log-probability, 1 by the mean of a token; more favours
            longer hypotheses.
        stopping: The rule above.
        num_hypotheses: At most K.
        constraints: What the targets must obey.

    Returns:
        For each source its ``num_hypotheses`` best hypotheses, best first; fewer where the
        model leaves fewer than that possible.

    Raises:
        TypeError: ``model`` is no decoder, or an argument is of a wrong type.
        ValueError: A shape or a number is out of range, a source is empty or longer than the
            model allows, or the model's logits are of a wrong shape.
        GenerationError: A sentence has no result, since the model's logits held NaN or left
            nothing possible. The others' are in it.

    Reference: Sutskever et al., 2014, https://arxiv.org/abs/1409.3215; length penalty and
    stopping as documented for ``generate`` in Hugging Face transformers.
    """
    results = generate(
        model,
        source,
        source_lengths,
        strategy=BeamSearch(
            beam_size=beam_size,
            length_penalty=length_penalty,
            stopping=stopping,
            num_hypotheses=num_hypotheses,
        ),
        constraints=constraints,
        max_length=max_length,
        min_length=min_length,
    )
    return [result.hypotheses for result in all_of(results)]
