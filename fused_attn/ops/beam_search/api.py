"""The public function ``beam_search_step``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_rank, check_tensor
from . import cpu, cuda, reference
from .contract import beam_search_step_fused
from .reference import beam_search_step_reference

_OP = "beam_search_step"
BACKENDS = {"cpu": cpu, "cuda": cuda, "reference": reference}


class BeamSearchStep(NamedTuple):
    """What one step of beam search decided; all tensors are ``[B, K]``."""

    tokens: Tensor
    """int64: the token that each next beam appends; never the end-of-sequence token, unless
    nothing goes on (V = 1), where it is that token with parent 0 and score -inf."""
    parents: Tensor
    """int64: the beam, 0..K-1, that each next beam continues."""
    scores: Tensor
    """Dtype of the running scores: the next ones, descending."""
    finished_scores: Tensor
    """Likewise: slot i holds the score of the candidate of rank i if it ends its sequence, else
    -inf."""
    finished_parents: Tensor
    """int64: the beam that the finished candidate continues; 0 where there is none."""


def beam_search_step(
    logits: Tensor, scores: Tensor, *, eos_token: int, backend: str | None = None
) -> BeamSearchStep:
    """One step of beam search for a batch: log-softmax, sum, top candidates, ends of sequence.

        total[b, k, v] = scores[b, k] + log_softmax(logits[b, k])[v]

    The 2K best candidates of ``total[b]`` are ranked. The K best that do not end their sequence
    become the next beams. Of the K best, those that end their sequence are returned as
    finished. 2K candidates always hold K that go on, since each beam has one end-of-sequence
    candidate.

    Equal logits of a beam rank by the lower token. Totals of different beams compare as rounded
    to fp32, ties to the lower beam; within a beam the higher logit ranks first even if rounding
    has made the totals equal. Candidates with score -inf or NaN (a beam with running score -inf
    or NaN, a row with NaN or +inf logits or all -inf) rank last, by beam and token, with score
    -inf. Deterministic; a sentence's results do not depend on the batch. Not differentiable:
    the results are detached.

    Args:
        logits: ``[B, K, V]``, fp32, fp16 or bf16 (fp64: reference only).
        scores: ``[B, K]`` fp32 (fp64: with fp64 logits only), running sums of
            log-probabilities. Start with 0 in the first beam and -inf in the others.
        eos_token: The token, in 0..V-1, that ends a sequence.
        backend: ``cpu``, ``cuda`` or ``reference``; default: the first that can.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or ``eos_token`` is not in the vocabulary.
        NotImplementedError: The named backend cannot run this call.

    Reference: Sutskever et al., 2014, https://arxiv.org/abs/1409.3215; the split into going on
    and finished is that of Hugging Face transformers' ``generate``.
    """
    check_tensor(_OP, "logits", logits)
    check_tensor(_OP, "scores", scores)
    check_rank(_OP, "logits", logits, "[B, K, V]")
    check_floating(_OP, "logits", logits)
    wide = (torch.float64,) if logits.dtype == torch.float64 else ()
    check_dtype(_OP, "scores", scores, (torch.float32, *wide))
    check_device(_OP, "scores", scores, "logits", logits)
    if not isinstance(eos_token, int):
        raise TypeError(f"{_OP}: eos_token must be an int, got {type(eos_token).__name__}")
    B, K, V = logits.shape
    if scores.shape != (B, K):
        raise ValueError(
            f"{_OP}: scores must have shape [B, K] with B = {B}, K = {K} (from logits), got "
            f"{list(scores.shape)}"
        )
    if K == 0:
        raise ValueError(f"{_OP}: logits must have at least one beam, got {list(logits.shape)}")
    if not 0 <= eos_token < V:
        raise ValueError(f"{_OP}: eos_token must be in 0..V-1 with V = {V}, got {eos_token}")
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        logits,
        lambda module: module.unsupported_reasons(logits),
        lambda: describe_tensor("logits", logits),
    )
    if name == "reference":
        with torch.no_grad():
            result = beam_search_step_reference(logits, scores, eos_token=eos_token)
    else:
        result = beam_search_step_fused(logits, scores, eos_token, name)
    return BeamSearchStep(*result)
