"""The public functions ``copy_distribution`` and ``copy_nll``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import INTEGERS, check_device, check_dtype, check_floating, check_tensor
from . import cpu, reference, triton
from .contract import copy_distribution_fused
from .reference import copy_distribution_reference, copy_nll_reference

BACKENDS = {"cpu": cpu, "triton": triton, "reference": reference}


def copy_distribution(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None = None,
    *,
    extended_size: int,
    source_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probabilities of the words that a decoder generates or copies; differentiable.

    With a gate, a pointer-generator: ``copy`` holds weights that sum to 1, such as attention's,

        p(y) = sigmoid(gate) * softmax(logits)[y]
             + sigmoid(-gate) * sum(copy[s], source_tokens[s] = y)

    Without, CopyNet, or a pointer network where V is tiny: ``copy`` holds scores,

        p(y) = (exp(logits[y]) + sum(exp(copy[s]), source_tokens[s] = y)) / Z
        Z    = sum(exp(logits)) + sum(exp(copy))

    A word >= V is one that only the source has, and is not generated. Computed in log space in
    fp32: a word that is merely improbable has a finite logarithm. Logits and scores of -inf are
    words and positions without a share. A word with p(y) = 0 has log-probability -inf, and what
    gradient arrives there is ignored. Where all logits are -inf nothing is generated, and nothing
    at all where there is nothing to copy either: no NaN.

    A position takes no part behind the source's length, nor where its token is negative, whatever
    ``copy`` holds there; its gradient is 0. One with a token >= ``extended_size`` counts in Z, and
    its word is not listed. Words that the source repeats are summed in the order of positions.
    Deterministic, the gradients too, for any number of threads.

    Args:
        logits: ``[B, ..., V]``, fp32, fp16 or bf16 (fp64: reference only).
        copy: ``[B, ..., S]``, dtype of ``logits`` or fp32.
        source_tokens: int64 with as many dimensions, ``[B or 1, ..., S]``, broadcast to the shape
            of ``copy``: words 0..``extended_size``-1.
        gate: ``[B, ...]``, dtype of ``logits`` or fp32: the logit of generating. Default: CopyNet.
        extended_size: Number of words of vocabulary and sources, at least V.
        source_lengths: ``[B]``, int32 or int64. Default: S.
        backend: ``cpu``, ``triton`` or ``reference``; default: the first that can.

    Returns:
        ``[B, ..., extended_size]``, fp32 (fp64 for fp64).

    Raises:
        TypeError: An argument is no tensor or no int, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or ``extended_size`` is below V.
        NotImplementedError: The named backend cannot run this call.

    Reference: pointer-generator: See et al., 2017, https://arxiv.org/abs/1704.04368; CopyNet: Gu et
    al., 2016, https://arxiv.org/abs/1603.06393; pointer network: Vinyals et al., 2015,
    https://arxiv.org/abs/1506.03134
    """
    op = "copy_distribution"
    _check(op, logits, copy, source_tokens, gate, source_lengths)
    _check_int(op, "extended_size", extended_size)
    if extended_size < logits.size(-1):
        raise ValueError(
            f"{op}: extended_size must be at least V = {logits.size(-1)} (from logits), got "
            f"{extended_size}"
        )
    name = _resolve(op, backend, logits)
    if name == "reference":
        return copy_distribution_reference(
            logits,
            copy,
            source_tokens,
            gate,
            extended_size=extended_size,
            source_lengths=source_lengths,
        )
    return copy_distribution_fused(
        logits, copy, source_tokens, gate, source_lengths, None, extended_size, 0, name
    )


def copy_nll(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    targets: Tensor,
    gate: Tensor | None = None,
    *,
    source_lengths: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Negative log-probabilities of targets that a decoder generates or copies; differentiable.

        nll = -log p(target)

    with the p of :func:`copy_distribution`, whose rules hold, and whose tensor of all words is not
    made. A target with p = 0, such as a word that neither vocabulary nor source has, has nll = +inf
    and no gradient. A row whose target is ``ignore_index`` has nll = 0 and no gradient, whatever it
    holds.

    Args:
        logits: ``[B, ..., V]``, fp32, fp16 or bf16 (fp64: reference only).
        copy: ``[B, ..., S]``, dtype of ``logits`` or fp32: weights with a gate, else scores.
        source_tokens: int64 with as many dimensions, ``[B or 1, ..., S]``, broadcast to the shape
            of ``copy``.
        targets: ``[B, ...]``, int64: words as those of ``source_tokens``, or ``ignore_index``.
        gate: ``[B, ...]``, dtype of ``logits`` or fp32: the logit of generating. Default: CopyNet.
        source_lengths: ``[B]``, int32 or int64. Default: S.
        ignore_index: The target of rows without a loss.
        backend: ``cpu``, ``triton`` or ``reference``; default: the first that can.

    Returns:
        ``[B, ...]``, fp32 (fp64 for fp64): one number a target, not reduced.

    Raises:
        TypeError: An argument is no tensor or no int, or of a wrong dtype.
        ValueError: Shapes or devices disagree.
        NotImplementedError: The named backend cannot run this call.

    Reference: See et al., 2017, https://arxiv.org/abs/1704.04368; Gu et al., 2016,
    https://arxiv.org/abs/1603.06393
    """
    op = "copy_nll"
    _check(op, logits, copy, source_tokens, gate, source_lengths)
    check_tensor(op, "targets", targets)
    check_dtype(op, "targets", targets, (torch.int64,))
    _check_rows(op, "targets", targets, logits)
    _check_int(op, "ignore_index", ignore_index)
    name = _resolve(op, backend, logits)
    if name == "reference":
        return copy_nll_reference(
            logits,
            copy,
            source_tokens,
            targets,
            gate,
            source_lengths=source_lengths,
            ignore_index=ignore_index,
        )
    return copy_distribution_fused(
        logits,
        copy,
        source_tokens,
        gate,
        source_lengths,
        targets,
        logits.size(-1),
        ignore_index,
        name,
    )


def _resolve(op: str, backend: str | None, logits: Tensor) -> str:
    return resolve(
        op,
        BACKENDS,
        backend,
        logits,
        lambda module: module.unsupported_reasons(logits),
        lambda: describe_tensor("logits", logits),
    )


def _check(
    op: str,
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
) -> None:
    check_tensor(op, "logits", logits)
    check_floating(op, "logits", logits)
    if logits.dim() < 2 or logits.size(-1) == 0:
        raise ValueError(
            f"{op}: logits must have shape [B, ..., V] with V >= 1, got {list(logits.shape)}"
        )
    rows = list(logits.shape[:-1])
    check_tensor(op, "copy", copy)
    check_dtype(op, "copy", copy, (logits.dtype, torch.float32))
    check_device(op, "copy", copy, "logits", logits)
    if copy.dim() != logits.dim() or copy.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"{op}: copy must have shape [B, ..., S] with B, ... = {rows} (from logits), got "
            f"{list(copy.shape)}"
        )
    check_tensor(op, "source_tokens", source_tokens)
    check_dtype(op, "source_tokens", source_tokens, (torch.int64,))
    check_device(op, "source_tokens", source_tokens, "logits", logits)
    # As many dimensions, since [B, S] would be taken for the [T, S] of copy where B = T.
    if (
        source_tokens.dim() != copy.dim()
        or source_tokens.size(-1) != copy.size(-1)
        or any(
            size != 1 and size != full
            for size, full in zip(source_tokens.shape, copy.shape, strict=True)
        )
    ):
        raise ValueError(
            f"{op}: source_tokens must have the shape of copy, {list(copy.shape)}, or 1 in place "
            f"of leading sizes, got {list(source_tokens.shape)}"
        )
    if gate is not None:
        check_tensor(op, "gate", gate)
        check_dtype(op, "gate", gate, (logits.dtype, torch.float32))
        _check_rows(op, "gate", gate, logits)
    if source_lengths is not None:
        check_tensor(op, "source_lengths", source_lengths)
        check_dtype(op, "source_lengths", source_lengths, INTEGERS)
        check_device(op, "source_lengths", source_lengths, "logits", logits)
        if source_lengths.dim() != 1 or source_lengths.size(0) != logits.size(0):
            raise ValueError(
                f"{op}: source_lengths must have shape [B] with B = {logits.size(0)} (from "
                f"logits), got {list(source_lengths.shape)}"
            )


def _check_rows(op: str, name: str, tensor: Tensor, logits: Tensor) -> None:
    check_device(op, name, tensor, "logits", logits)
    if tensor.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: {name} must have shape [B, ...] = {list(logits.shape[:-1])} (from logits), got "
            f"{list(tensor.shape)}"
        )


def _check_int(op: str, name: str, value: object) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
