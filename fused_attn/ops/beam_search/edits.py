"""Changes to the log-probabilities of few tokens, and the usual rules that ask for them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._check import check_device, check_dtype, check_rank, check_tensor

_OP = "token_edits"


class TokenEdits(NamedTuple):
    """Changes to the log-probabilities of few tokens of each beam.

        log_probability[token] = factor * log_probability[token] + offset

    What a factor of 1 and an offset of 0 change is nothing: as if the token were not listed.
    """

    tokens: Tensor
    """``[B, K, N]`` int64; -1, or any number that is no token, where there is none. No token may
    be twice in a row of N."""
    factors: Tensor
    """``[B, K, N]`` fp32, > 0."""
    offsets: Tensor
    """``[B, K, N]`` fp32; -inf forbids the token."""


def token_edits(
    history: Tensor,
    lengths: Tensor,
    *,
    repetition_penalty: Tensor | None = None,
    no_repeat_ngram: Tensor | None = None,
    max_ngram: int = 0,
    banned_tokens: Tensor | None = None,
    bias_tokens: Tensor | None = None,
    biases: Tensor | None = None,
    blocked_end: Tensor | None = None,
    eos_token: int | None = None,
) -> TokenEdits:
    """The edits of a step of beam search that the usual rules of generation ask for.

    What several rules ask of one token is combined: its offsets add up, and a rule that forbids
    it wins. Plain PyTorch on the tensors' device, of a shape that depends on the arguments'
    shapes alone, so that it can be captured in a CUDA graph. Deterministic.

    Args:
        history: ``[B, K, T]`` int64, the tokens of each beam so far, that of the beginning
            included.
        lengths: ``[B]`` int64, in 0..T: how many of them there are.
        repetition_penalty: ``[B]`` fp32, > 0. Multiplies the log-probability of every token of
            the history, once; 1 changes nothing, more makes repetition rarer.
        no_repeat_ngram: ``[B]`` int64, in 0..max_ngram. With n > 0 a token is forbidden that
            would end an n-gram which the history holds already; 0 forbids nothing.
        max_ngram: Bounds the work. A greater n counts as 0.
        banned_tokens: ``[B, N]`` int64, -1 where there is none. Forbidden.
        bias_tokens: ``[B, N]`` int64, -1 where there is none.
        biases: ``[B, N]`` fp32, added to the log-probabilities of ``bias_tokens``, for a token
            that is listed repeatedly all of them. -inf forbids.
        blocked_end: ``[B]`` bool. True forbids ``eos_token``.
        eos_token: The token that ends a sequence.

    Returns:
        Edits of N = T tokens where one of the first two rules is asked for, and of one more for
        each of the other rules' tokens; in ascending order, with -1 in between.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, or one of a pair of arguments is missing.

    Reference: Keskar et al., 2019, https://arxiv.org/abs/1909.05858 (repetition penalty); Paulus
    et al., 2017, https://arxiv.org/abs/1705.04304 (no n-gram twice).
    """
    B, K, T = _check_history(history, lengths)
    _check_rules(
        history,
        {
            "repetition_penalty": (repetition_penalty, torch.float32, "[B]"),
            "no_repeat_ngram": (no_repeat_ngram, torch.int64, "[B]"),
            "banned_tokens": (banned_tokens, torch.int64, "[B, N]"),
            "bias_tokens": (bias_tokens, torch.int64, "[B, N]"),
            "biases": (biases, torch.float32, "[B, N]"),
            "blocked_end": (blocked_end, torch.bool, "[B]"),
        },
    )
    if not isinstance(max_ngram, int):
        raise TypeError(f"{_OP}: max_ngram must be an int, got {type(max_ngram).__name__}")
    if eos_token is not None and not isinstance(eos_token, int):
        raise TypeError(f"{_OP}: eos_token must be an int, got {type(eos_token).__name__}")
    if max_ngram < 0:
        raise ValueError(f"{_OP}: max_ngram must be at least 0, got {max_ngram}")
    if (bias_tokens is None) != (biases is None):
        raise ValueError(f"{_OP}: bias_tokens and biases must be given together, got one of them")
    if blocked_end is not None and eos_token is None:
        raise ValueError(f"{_OP}: blocked_end must be given with eos_token, got None")
    if bias_tokens is not None and biases is not None and bias_tokens.shape != biases.shape:
        raise ValueError(
            f"{_OP}: biases must have the shape of bias_tokens, {list(bias_tokens.shape)}, got "
            f"{list(biases.shape)}"
        )

    # Each rule gives slots: a token (-1: none), whether it is forbidden, its offset. A slot of the
    # history stands for a repetition too.
    tokens: list[Tensor] = []
    forbidden: list[Tensor] = []
    offsets: list[Tensor] = []
    penalised = 0  # slots at the beginning that are the history's
    if T > 0 and (repetition_penalty is not None or no_repeat_ngram is not None):
        exists = torch.arange(T, device=history.device) < lengths[:, None, None]  # [B, 1, T]
        used = torch.where(exists, history, -1)
        repeats = torch.zeros_like(used, dtype=torch.bool)
        if no_repeat_ngram is not None:
            repeats = _repeats(used, lengths, no_repeat_ngram, max_ngram) & (used >= 0)
        concerned = repeats
        if repetition_penalty is not None:
            concerned = concerned | (repetition_penalty != 1.0)[:, None, None]
        tokens.append(torch.where(concerned, used, -1))
        forbidden.append(repeats)
        offsets.append(torch.zeros_like(used, dtype=torch.float32))
        penalised = T
    if banned_tokens is not None:
        tokens.append(_for_beams(banned_tokens, K))
        forbidden.append(torch.ones_like(tokens[-1], dtype=torch.bool))
        offsets.append(torch.zeros_like(tokens[-1], dtype=torch.float32))
    if bias_tokens is not None and biases is not None:
        single, summed, excluded = _summed(bias_tokens, biases)
        tokens.append(_for_beams(single, K))
        forbidden.append(_for_beams(excluded, K))
        offsets.append(_for_beams(summed, K))
    if blocked_end is not None and eos_token is not None:
        end = torch.where(blocked_end, eos_token, -1)[:, None]  # [B, 1]
        tokens.append(_for_beams(end, K))
        forbidden.append(torch.ones_like(tokens[-1], dtype=torch.bool))
        offsets.append(torch.zeros_like(tokens[-1], dtype=torch.float32))
    if not tokens:
        none = history.new_empty(B, K, 0)
        return TokenEdits(none, none.float(), none.float())

    # Equal tokens become neighbours, and one slot of each run takes what all of it asks for.
    token, source = torch.cat(tokens, dim=2).sort(dim=2)  # [B, K, N]
    is_first = torch.ones_like(token, dtype=torch.bool)
    is_first[:, :, 1:] = token[:, :, 1:] != token[:, :, :-1]
    run = is_first.cumsum(dim=2) - 1
    # Exact in any order: integers, and offsets of which a run has one that is not 0.
    in_history = (source < penalised).long()
    in_history = torch.zeros_like(run).scatter_add_(2, run, in_history).gather(2, run) > 0
    excluded = torch.cat(forbidden, dim=2).gather(2, source).long()
    excluded = torch.zeros_like(run).scatter_add_(2, run, excluded).gather(2, run) > 0
    offset = torch.cat(offsets, dim=2).gather(2, source)
    offset = torch.zeros_like(offset).scatter_add_(2, run, offset).gather(2, run)

    token = torch.where(is_first & (token >= 0), token, -1)
    factor = torch.ones_like(offset)
    if repetition_penalty is not None:
        factor = torch.where(in_history, repetition_penalty[:, None, None], factor)
    offset = offset.masked_fill(excluded, -math.inf).masked_fill(token < 0, 0.0)
    return TokenEdits(token, factor, offset)


def _repeats(used: Tensor, lengths: Tensor, no_repeat_ngram: Tensor, max_ngram: int) -> Tensor:
    """``[B, K, T]``: whether the token here would end an n-gram of the history once more.

    It would if the n - 1 tokens before it are the history's last n - 1.
    """
    T = used.size(2)
    place = torch.arange(T, device=used.device)
    before = torch.ones_like(used, dtype=torch.bool)
    repeats = torch.zeros_like(before)
    for n in range(1, max_ngram + 1):
        if n > 1:
            # Token n - 1 before this place, and n - 1 before the end.
            back = n - 1
            last = (lengths[:, None, None] - back).clamp(0, T - 1)
            same = used.roll(back, dims=2) == used.gather(2, last.expand(-1, used.size(1), 1))
            before = before & same & (place >= back)
        repeats = repeats | (before & (no_repeat_ngram == n)[:, None, None])
    return repeats


def _summed(tokens: Tensor, biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token once, -1 in the place of the others; the sum of its biases; whether one is -inf.

    All ``[B, N]``. Biases add up in the order in which they came, by doubling: after the step of
    width w a slot has the sum of up to 2 w slots of its token, itself the last.
    """
    token, source = tokens.sort(dim=1, stable=True)
    bias = biases.gather(1, source)
    excluded = bias == -math.inf
    total = bias.masked_fill(excluded, 0.0)
    width, N = 1, tokens.size(1)
    while width < N:
        same = torch.zeros_like(excluded)
        same[:, width:] = token[:, width:] == token[:, :-width]
        total = total + torch.where(same, total.roll(width, dims=1), 0.0)
        excluded = excluded | (same & excluded.roll(width, dims=1))
        width *= 2
    is_last = torch.ones_like(excluded)
    is_last[:, :-1] = token[:, :-1] != token[:, 1:]
    return (
        torch.where(is_last, token, -1),
        total.masked_fill(~is_last, 0.0),
        excluded & is_last,
    )


def _for_beams(values: Tensor, K: int) -> Tensor:
    return values[:, None].expand(-1, K, -1)


def _check_history(history: Tensor, lengths: Tensor) -> tuple[int, int, int]:
    check_tensor(_OP, "history", history)
    check_tensor(_OP, "lengths", lengths)
    check_rank(_OP, "history", history, "[B, K, T]")
    check_dtype(_OP, "history", history, (torch.int64,))
    check_dtype(_OP, "lengths", lengths, (torch.int64,))
    check_device(_OP, "lengths", lengths, "history", history)
    B, K, T = history.shape
    if lengths.shape != (B,):
        raise ValueError(
            f"{_OP}: lengths must have shape [B] with B = {B} (from history), got "
            f"{list(lengths.shape)}"
        )
    return B, K, T


def _check_rules(history: Tensor, rules: dict[str, tuple[Tensor | None, torch.dtype, str]]) -> None:
    B = history.size(0)
    for name, (rule, dtype, layout) in rules.items():
        if rule is None:
            continue
        check_tensor(_OP, name, rule)
        check_rank(_OP, name, rule, layout)
        check_dtype(_OP, name, rule, (dtype,))
        check_device(_OP, name, rule, "history", history)
        if rule.size(0) != B:
            raise ValueError(
                f"{_OP}: {name} must have shape {layout} with B = {B} (from history), got "
                f"{list(rule.shape)}"
            )
