"""Log-probabilities of given targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._engine import Engine
from ._request import Job, Lengths, check_jobs, check_model
from .generate import all_of, make_settings
from .hypothesis import Hypothesis
from .state import Decoder, State
from .strategies import Constraints, Greedy

_SEARCH = "score"


@torch.inference_mode()
def score(
    model: Decoder[State],
    source: Tensor,
    targets: Sequence[Sequence[int]],
    source_lengths: Tensor | None = None,
    *,
    batch_size: int | None = None,
    alignments: bool = False,
) -> list[Hypothesis]:
    """What a model thinks of given targets: a search in which every token is forced.

    Args:
        model: A decoder.
        source: ``[B, S]`` token indices.
        targets: B sequences, without the tokens that begin and end them; they may be empty.
        source_lengths: ``[B]`` int32 or int64, in 1..S. Default: all S.
        batch_size: See ``generate``.
        alignments: See ``generate``.

    Returns:
        Each target with its log-probability, that of its end included, and its mean as ``score``;
        ``token_log_probabilities`` has them one by one.

    Raises:
        TypeError: See ``generate``.
        ValueError: See ``generate``; or there are not B targets, or one is longer than the model
            allows.
        GenerationError: A target is impossible, or the model's logits held NaN.
    """
    check_model(_SEARCH, model)
    prefixes = [[*target, model.eos_token] for target in targets]
    forced = Constraints(prefix=prefixes)
    jobs = check_jobs(_SEARCH, model, source, source_lengths, Lengths(None, 0), Constraints())
    if len(targets) != len(jobs):
        raise ValueError(
            f"{_SEARCH}: targets must be B = {len(jobs)} sequences (from source), got "
            f"{len(targets)}"
        )
    if not jobs:
        return []
    for i, target in enumerate(targets):
        if model.max_length is not None and len(target) >= model.max_length:
            raise ValueError(
                f"{_SEARCH}: every target must have fewer than {model.max_length} tokens (the "
                f"model's max_length), got {len(target)} for sentence {i}"
            )
    jobs = [
        Job(job.number, job.source, len(prefix), tuple(prefix))
        for job, prefix in zip(jobs, prefixes, strict=True)
    ]
    settings = make_settings(
        model, Greedy(), forced, Lengths(None, 0), batch_size, jobs[0].source, search=_SEARCH
    )
    engine = Engine(model, settings(alignments=alignments), source.device)
    found = dict(engine.run(iter(jobs)))
    return [result.best for result in all_of([found[i] for i in range(len(jobs))])]
