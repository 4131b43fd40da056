"""Generating and copying in plain PyTorch: the specification of every backend."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Parts(NamedTuple):
    """What a row's distribution is summed from."""

    generated: Tensor
    """``[..., V]``: log of the probability of generating each word."""
    copied: Tensor
    """``[..., S]``: log of the probability of copying each position; detached."""
    weight: Tensor
    """``[..., S]``: ``copied`` is the log of ``weight * exp(log_scale)``."""
    log_scale: Tensor
    """``[..., S]`` or, of a gate, ``[..., 1]``."""
    tokens: Tensor
    """``[..., S]``; -1 where a position takes no part."""


def copy_distribution_reference(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    *,
    extended_size: int,
    source_lengths: Tensor | None,
) -> Tensor:
    """Log-probabilities, ``[..., extended_size]``; see the public function."""
    parts = _parts(logits, copy, source_tokens, gate, source_lengths)
    generated = F.pad(parts.generated, (0, extended_size - logits.size(-1)), value=-math.inf)
    is_listed = (parts.tokens >= 0) & (parts.tokens < extended_size)
    index = parts.tokens.where(is_listed, 0)
    # Sums are relative to the largest term of each word, so that no word is lost.
    copied = parts.copied.where(is_listed, -math.inf)
    largest = generated.detach().scatter_reduce(-1, index, copied, "amax")
    impossible = largest == -math.inf
    largest = largest.masked_fill(impossible, 0.0)
    terms = _terms(parts, largest.gather(-1, index)).where(is_listed, 0.0)
    total = (generated - largest).exp().scatter_add(-1, index, terms)
    log_probs = largest + total.masked_fill(impossible, 1.0).log()
    return log_probs.masked_fill(impossible, -math.inf)


def copy_nll_reference(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    targets: Tensor,
    gate: Tensor | None,
    *,
    source_lengths: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Negative log-probabilities of the targets, ``[...]``; see the public function."""
    V = logits.size(-1)
    ignored = targets == ignore_index
    # What an ignored row holds reaches nothing.
    logits = logits.masked_fill(ignored[..., None], 0.0)
    copy = copy.masked_fill(ignored[..., None], 0.0)
    gate = None if gate is None else gate.masked_fill(ignored, 0.0)
    parts = _parts(logits, copy, source_tokens, gate, source_lengths)
    is_generated = (targets >= 0) & (targets < V)
    index = targets.where(is_generated, 0)[..., None]
    generated = parts.generated.gather(-1, index).where(is_generated[..., None], -math.inf)
    matches = (parts.tokens == targets[..., None]) & (parts.tokens >= 0)
    copied = parts.copied.where(matches, -math.inf)
    largest = torch.cat([generated.detach(), copied], dim=-1).amax(dim=-1, keepdim=True)
    impossible = largest == -math.inf
    largest = largest.masked_fill(impossible, 0.0)
    terms = _terms(parts, largest).where(matches, 0.0)
    total = (generated - largest).exp().squeeze(-1) + terms.sum(dim=-1)
    impossible, largest = impossible.squeeze(-1), largest.squeeze(-1)
    nll = -(largest + total.masked_fill(impossible, 1.0).log())
    return nll.masked_fill(impossible, math.inf).masked_fill(ignored, 0.0)


def _parts(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
) -> _Parts:
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, copy = logits.to(compute), copy.to(compute)
    tokens = source_tokens.expand_as(copy)
    if source_lengths is not None:
        positions = torch.arange(copy.size(-1), device=copy.device)
        lengths = source_lengths.view(-1, *(1 for _ in copy.shape[1:]))
        tokens = tokens.masked_fill(positions >= lengths, -1)
    takes_part = tokens >= 0
    if gate is None:
        scores = copy.where(takes_part, -math.inf)
        lse = _log_sum_exp(torch.cat([logits, scores], dim=-1))
        copied = scores - lse
        return _Parts(logits - lse, copied.detach(), torch.ones_like(copied), copied, tokens)
    gate = gate.to(compute)[..., None]
    generated = F.logsigmoid(gate) + logits - _log_sum_exp(logits)
    weight = copy.where(takes_part, 0.0)
    log_scale = F.logsigmoid(-gate)
    return _Parts(generated, (weight.log() + log_scale).detach(), weight, log_scale, tokens)


def _terms(parts: _Parts, largest: Tensor) -> Tensor:
    """Probabilities of copying each position over e^largest.

    The exponential is also the gradient of the weight, and that of a weight of 0 might overflow.
    """
    limit = math.log(torch.finfo(largest.dtype).max) - 1.0
    return parts.weight * (parts.log_scale - largest).clamp(max=limit).exp()


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Over the last dimension, which stays; +inf where all are -inf, so that none has a share."""
    nothing = (logits == -math.inf).all(dim=-1, keepdim=True)
    lse = logits.masked_fill(nothing, 0.0).logsumexp(dim=-1, keepdim=True)
    return lse.masked_fill(nothing, math.inf)


def unsupported_reasons(*tensors: object, **flags: object) -> list[str]:
    """The reference runs every call."""
    return []
