"""The public function ``beam_search_step``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_rank, check_tensor
from . import reference
from .reference import beam_search_step_reference

_OP = "beam_search_step"
BACKENDS = {"reference": reference}


class BeamSearchStep(NamedTuple):
    """What one step of beam search decided; all tensors are ``[B, K]``."""

    tokens: Tensor
    """int64: the token that each next beam appends; never the end-of-sequence token, unless
    fewer than K candidates go on (V = 1), where it is that token with score -inf."""
    parents: Tensor
    """int64: the beam, 0..K-1, that each next beam continues."""
    scores: Tensor
    """fp32: the next running scores, descending."""
    finished_scores: Tensor
    """fp32: slot i holds the score of the candidate of rank i if it ends its sequence, else
    -inf."""
    finished_parents: Tensor
    """int64: the beam that the finished candidate continues; 0 where there is none."""


def beam_search_step(
    logits: Tensor, scores: Tensor, *, eos_token: int, backend: str | None = None
) -> BeamSearchStep:
    """One step of beam search for a batch: log-softmax, sum, top candidates, ends of sequence.

        total[b, k, v] = scores[b, k] + log_softmax(logits[b, k])[v]

    The 2K best candidates of ``total[b]`` are ranked, ties broken by the lower flat index
    ``k * V + v``. The K best that do not end their sequence become the next beams. Of the K
    best, those that end their sequence are returned as finished. 2K candidates always hold K
    that go on, since each beam has one end-of-sequence candidate. Candidates with score -inf or
    NaN (a beam with running score -inf, a row with NaN logits) rank last, with score -inf.
    Sums in fp32. Deterministic. Not differentiable.

    Args:
        logits: ``[B, K, V]``, fp32, fp16 or bf16 (fp64: reference only).
        scores: ``[B, K]`` fp32, running sums of log-probabilities. Start with 0 in the first
            beam and -inf in the others.
        eos_token: The token, in 0..V-1, that ends a sequence.
        backend: ``cpu``, ``triton``, ``cuda`` or ``reference``; default: the first that can.

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
    check_dtype(_OP, "scores", scores, (torch.float32,))
    check_device(_OP, "scores", scores, "logits", logits)
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
        logits.device.type,
        lambda module: module.unsupported_reasons(logits, scores),
        lambda: describe_tensor("logits", logits),
    )
    if name != "reference":
        raise AssertionError("no fused backend is registered yet")
    with torch.no_grad():
        result = beam_search_step_reference(logits, scores, eos_token=eos_token)
    tokens, parents, next_scores, finished_scores, finished_parents = result
    return BeamSearchStep(tokens, parents, next_scores, finished_scores, finished_parents)
