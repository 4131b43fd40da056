"""The public function ``beam_search_step``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_rank, check_tensor
from . import cpu, cuda, reference, triton
from .contract import beam_search_step_fused
from .edits import TokenEdits
from .reference import beam_search_step_reference

_OP = "beam_search_step"
BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}


class BeamSearchStep(NamedTuple):
    """What one step of beam search decided; tensors are ``[B, K]`` but for the last, ``[B]``."""

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
    invalid: Tensor
    """bool: whether a beam whose running score is above -inf has a NaN or +inf among the logits
    of the sentence's vocabulary. All of them -inf is not invalid, only impossible."""


def beam_search_step(
    logits: Tensor,
    scores: Tensor,
    *,
    eos_token: int,
    temperature: Tensor | None = None,
    edits: TokenEdits | None = None,
    forced_tokens: Tensor | None = None,
    shortlist: Tensor | None = None,
    backend: str | None = None,
) -> BeamSearchStep:
    """One step of beam search for a batch: log-softmax, sum, top candidates, ends of sequence.

        log_probability[b, k] = log_softmax(logits[b, k] / temperature[b])
        total[b, k, v]        = scores[b, k] + factor * log_probability[b, k, v] + offset

    with the factor and the offset that ``edits`` has for token v of the beam, else 1 and 0.

    The 2K best candidates of ``total[b]`` are ranked. The K best that do not end their sequence
    become the next beams. Of the K best, those that end their sequence are returned as
    finished. 2K candidates always hold K that go on, since each beam has one end-of-sequence
    candidate.

    Nothing is normalised again after an edit, nor where a token is forced: a forced token keeps
    its log-probability. With a shortlist the softmax is over its tokens; no other exists. The
    token that ends a sequence is edited, forced and listed like any other.

    Totals compare as rounded to fp32, ties go to the lower beam. Ties of a beam's own go to
    tokens that are not edited, among them to the higher logit (which rounding may have made an
    equal total), then to the lower token; among edited ones to the lower token. Candidates with
    score -inf or NaN (a beam with running score -inf or NaN, a row with NaN or +inf logits or all
    -inf, a token that is forbidden, not listed or not the forced one) rank last, by beam and
    token, with score -inf. Deterministic; a sentence's results do not depend on the batch. Not
    differentiable: the results are detached.

    The values of the tensors are not looked at before the kernels read them. What is no token
    of the vocabulary is left out: in ``edits`` and ``shortlist`` as if it were -1, in
    ``forced_tokens`` with nothing left possible.

    Args:
        logits: ``[B, K, V]``, fp32, fp16 or bf16 (fp64: reference only).
        scores: ``[B, K]`` fp32 (fp64: with fp64 logits only), running sums of
            log-probabilities. Start with 0 in the first beam and -inf in the others.
        eos_token: The token, in 0..V-1, that ends a sequence.
        temperature: ``[B]`` of the dtype of ``scores``, > 0. Divides the logits. Default: 1.
        edits: Changes to the log-probabilities of few tokens; ``token_edits`` makes them. Factors
            and offsets of the dtype of ``scores``. Default: none.
        forced_tokens: ``[B]`` int64, the only token that may follow in any beam of the sentence;
            -1 where all may. Default: all may.
        shortlist: ``[B, N]`` int64, the sentence's vocabulary: ascending tokens, then -1.
            Default: 0..V-1.
        backend: ``cpu``, ``cuda``, ``triton`` or ``reference``; default: the first that can.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or ``eos_token`` is not in the vocabulary.
        NotImplementedError: The named backend cannot run this call.

    Reference: Sutskever et al., 2014, https://arxiv.org/abs/1409.3215; the split into going on
    and finished, and edits of log-probabilities, are those of Hugging Face transformers'
    ``generate``.
    """
    _check(logits, scores, eos_token)
    options: dict[str, Tensor | None] = {
        "temperature": temperature,
        "edit_tokens": None,
        "edit_factors": None,
        "edit_offsets": None,
        "forced_tokens": forced_tokens,
        "shortlist": shortlist,
    }
    if edits is not None:
        if not isinstance(edits, TokenEdits):
            raise TypeError(f"{_OP}: edits must be a TokenEdits, got {type(edits).__name__}")
        options["edit_tokens"], options["edit_factors"], options["edit_offsets"] = edits
    _check_options(logits, scores, options)
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        logits,
        lambda module: module.unsupported_reasons(
            logits, edits, temperature, forced_tokens, shortlist
        ),
        lambda: describe_tensor("logits", logits),
    )
    if name == "reference":
        with torch.no_grad():
            result = beam_search_step_reference(logits, scores, eos_token=eos_token, **options)
    else:
        result = beam_search_step_fused(logits, scores, eos_token, **options, backend=name)
    return BeamSearchStep(*result)


def _check(logits: Tensor, scores: Tensor, eos_token: int) -> None:
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


# Layouts by the schema's names.
_OPTIONS = {
    "temperature": "[B]",
    "edit_tokens": "[B, K, N]",
    "edit_factors": "[B, K, N]",
    "edit_offsets": "[B, K, N]",
    "forced_tokens": "[B]",
    "shortlist": "[B, N]",
}
_INTEGERS = ("edit_tokens", "forced_tokens", "shortlist")


def _check_options(logits: Tensor, scores: Tensor, options: dict[str, Tensor | None]) -> None:
    B, K, _ = logits.shape
    edit_tokens = options["edit_tokens"]
    for option, layout in _OPTIONS.items():
        tensor = options[option]
        if tensor is None:
            continue
        name = option.replace("edit_", "edits.")
        check_tensor(_OP, name, tensor)
        check_rank(_OP, name, tensor, layout)
        check_dtype(_OP, name, tensor, (torch.int64 if option in _INTEGERS else scores.dtype,))
        check_device(_OP, name, tensor, "logits", logits)
        if tensor.size(0) != B or (layout == "[B, K, N]" and tensor.size(1) != K):
            sizes = f"B = {B}, K = {K}" if layout == "[B, K, N]" else f"B = {B}"
            raise ValueError(
                f"{_OP}: {name} must have shape {layout} with {sizes} (from logits), got "
                f"{list(tensor.shape)}"
            )
        if layout == "[B, K, N]" and edit_tokens is not None and tensor.shape != edit_tokens.shape:
            raise ValueError(
                f"{_OP}: {name} must have the shape of edits.tokens, {list(edit_tokens.shape)}, "
                f"got {list(tensor.shape)}"
            )
