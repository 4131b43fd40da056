"""One step of each strategy: from logits to the next tokens of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.ops import (
    BeamSearchStep,
    TokenEdits,
    beam_search_step,
    token_edits,
)
from fused_attn.ops._philox import random_words

from ._slots import Slots, last_row
from .strategies import BeamSearch, Constraints, Greedy, Sampling, Strategy

# The most positions that a sample's random numbers are numbered by.
_POSITIONS = 1 << 20

# Candidates looked at first where top_p decides how many it takes.
_FIRST_CANDIDATES = 64


class Chooser:
    """Turns logits into a step, by a strategy and under constraints.

    Args:
        strategy: BeamSearch, Greedy or Sampling.
        constraints: What the targets must obey.
        eos_token: Ends a target.
        min_length: Fewest tokens of a target, the end not counted.
        device: Of the logits.
    """

    def __init__(
        self,
        strategy: Strategy,
        constraints: Constraints,
        eos_token: int,
        min_length: int,
        device: torch.device,
    ) -> None:
        self._strategy, self._eos_token, self._min_length = strategy, eos_token, min_length
        self._looks_back = constraints.looks_back
        self._penalty = constraints.repetition_penalty
        self._ngram = constraints.no_repeat_ngram_size
        self._banned: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None
        if constraints.banned_tokens:
            self._banned = torch.tensor([list(constraints.banned_tokens)], device=device)
        if constraints.token_bias:
            self._bias = (
                torch.tensor([list(constraints.token_bias)], device=device),
                torch.tensor(
                    [list(constraints.token_bias.values())], dtype=torch.float32, device=device
                ),
            )
        self._seed: Tensor | None = None
        if isinstance(strategy, Sampling):
            seed = strategy.seed
            if seed is None:
                seed = int(torch.randint(0, 2**62, ()))
            self._seed = torch.tensor([seed], dtype=torch.int64, device=device)

    def choose(self, logits: Tensor, slots: Slots) -> BeamSearchStep:
        """The next tokens, parents and scores, and what ends; see ``beam_search_step``.

        Of samples, slot k of what ends is sample k and not the one of rank k.
        """
        if isinstance(self._strategy, BeamSearch):
            return self._beams(self._strategy, logits, slots)
        if isinstance(self._strategy, Greedy):
            return self._step(logits, slots.scores, slots, self._edits(slots), None)
        return self._samples(self._strategy, logits, slots)

    def _beams(self, strategy: BeamSearch, logits: Tensor, slots: Slots) -> BeamSearchStep:
        temperature: Tensor | None = None
        if strategy.temperature != 1.0:
            temperature = slots.scores.new_full((len(slots.scores),), strategy.temperature)
        if strategy.groups == 1:
            return self._step(logits, slots.scores, slots, self._edits(slots), temperature)
        # One group after the other: each sees what those before it have just chosen.
        width = strategy.beam_size // strategy.groups
        steps: list[BeamSearchStep] = []
        earlier: list[Tensor] = []
        for first in range(0, strategy.beam_size, width):
            beams = slice(first, first + width)
            chosen = torch.cat(earlier, dim=1) if earlier else None
            edits = self._edits(slots, beams, chosen, strategy.diversity_penalty)
            step = self._step(logits[:, beams], slots.scores[:, beams], slots, edits, temperature)
            steps.append(step)
            # A group that is done, or a beam that is not, chooses nothing.
            is_idle = slots.done[:, first // width, None] | (step.scores == -torch.inf)
            earlier.append(step.tokens.masked_fill(is_idle, -1))
        tokens, parents, scores, finished_scores, finished_parents, invalid = zip(
            *steps, strict=True
        )
        return BeamSearchStep(
            torch.cat(tokens, dim=1),
            torch.cat([part + i * width for i, part in enumerate(parents)], dim=1),
            torch.cat(scores, dim=1),
            torch.cat(finished_scores, dim=1),
            torch.cat([part + i * width for i, part in enumerate(finished_parents)], dim=1),
            torch.stack(invalid).any(dim=0),
        )

    def _step(
        self,
        logits: Tensor,
        scores: Tensor,
        slots: Slots,
        edits: TokenEdits | None,
        temperature: Tensor | None,
    ) -> BeamSearchStep:
        return beam_search_step(
            logits,
            scores,
            eos_token=self._eos_token,
            temperature=temperature,
            edits=edits,
            forced_tokens=_forced(slots),
            shortlist=slots.shortlist,
        )

    def _edits(
        self,
        slots: Slots,
        beams: slice = slice(None),
        chosen: Tensor | None = None,
        diversity_penalty: float = 0.0,
    ) -> TokenEdits | None:
        """What the constraints change for these beams, and what earlier groups have chosen."""
        if chosen is None and not self._looks_back and self._banned is None and self._bias is None:
            return None
        tokens = slots.tokens[:, beams]
        B = len(tokens)
        history, lengths = tokens[:, :, None], torch.zeros_like(slots.steps[:, 0])
        penalty: Tensor | None = None
        ngram: Tensor | None = None
        if self._looks_back and slots.prefixes is not None:
            history, lengths = slots.prefixes[:, beams], slots.steps[:, 0] + 1
            penalty = slots.scores.new_full((B,), self._penalty)
            ngram = torch.full_like(lengths, self._ngram)
        biases = [] if self._bias is None else [tuple(part.expand(B, -1) for part in self._bias)]
        if chosen is not None:
            penalties = slots.scores.new_full(chosen.shape, -diversity_penalty)
            biases.append((chosen, penalties))
        bias_tokens, bias_values = (
            (torch.cat(parts, dim=1) for parts in zip(*biases, strict=True))
            if biases
            else (None, None)
        )
        edits = token_edits(
            history,
            lengths,
            repetition_penalty=penalty,
            no_repeat_ngram=ngram,
            max_ngram=self._ngram,
            banned_tokens=None if self._banned is None else self._banned.expand(B, -1),
            bias_tokens=bias_tokens,
            biases=bias_values,
        )
        forced = _forced(slots)
        if forced is None:
            return edits
        # A prefix is the caller's word: nothing forbids it, or makes it dearer.
        return edits._replace(
            tokens=edits.tokens.masked_fill(edits.tokens == forced[:, None, None], -1)
        )

    def _samples(self, strategy: Sampling, logits: Tensor, slots: Slots) -> BeamSearchStep:
        values, invalid = log_probabilities(
            logits, self._edits(slots), _forced(slots), slots.shortlist
        )  # [B, K, V]
        alive = slots.scores > -torch.inf
        too_short = (slots.steps < self._min_length)[:, :, None]
        ends = torch.arange(values.size(2), device=values.device) == self._eos_token
        drawn = values.masked_fill(too_short & ends, -torch.inf)
        samples = torch.arange(values.size(1), device=values.device)
        index = (slots.numbers * strategy.num_samples + samples) * _POSITIONS + slots.steps
        assert self._seed is not None
        number = (random_words(self._seed, index) + 0.5) * 2.0**-32
        tokens = draw(drawn / strategy.temperature, number, strategy.top_k, strategy.top_p)
        scores = slots.scores + values.gather(2, tokens[:, :, None])[:, :, 0].float()
        # A row without a possible token yields one of log-probability -inf or NaN.
        scores = scores.masked_fill(~alive | scores.isnan(), -torch.inf)
        ended = tokens == self._eos_token
        parents = samples.expand_as(tokens)
        return BeamSearchStep(
            tokens,
            parents,
            scores.masked_fill(ended, -torch.inf),
            scores.masked_fill(~ended, -torch.inf),
            parents,
            (invalid & alive).any(dim=1),
        )


def _forced(slots: Slots) -> Tensor | None:
    return None if slots.forced is None else last_row(slots.forced, slots.steps)


def log_probabilities(
    logits: Tensor, edits: TokenEdits | None, forced_tokens: Tensor | None, shortlist: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All of what ``beam_search_step`` ranks, but for the running scores.

    Returns:
        ``[B, K, V]`` fp32, -inf where a token cannot follow; and ``[B, K]``, whether the logits
        held NaN or +inf.
    """
    V = logits.size(2)
    token = torch.arange(V, device=logits.device)
    wide = logits.float()
    if shortlist is not None:
        # One column more takes what is no token.
        listed = torch.zeros(len(logits), V + 1, dtype=torch.bool, device=logits.device)
        listed.scatter_(1, _columns(shortlist, V), True)
        wide = wide.masked_fill(~listed[:, None, :V], -torch.inf)
    normaliser = wide.logsumexp(dim=2, keepdim=True)
    invalid = (normaliser.isnan() | (normaliser == torch.inf))[:, :, 0]
    values = wide - normaliser
    if edits is not None:
        shape = (*logits.shape[:2], V + 1)
        columns = _columns(edits.tokens, V)
        factors = wide.new_ones(shape).scatter_(2, columns, edits.factors)[:, :, :V]
        offsets = wide.new_zeros(shape).scatter_(2, columns, edits.offsets)[:, :, :V]
        values = values * factors + offsets
    if forced_tokens is not None:
        forced = forced_tokens[:, None, None]
        values = values.masked_fill((forced >= 0) & (forced != token), -torch.inf)
    return values, invalid


def _columns(tokens: Tensor, V: int) -> Tensor:
    return torch.where((tokens >= 0) & (tokens < V), tokens, V)


def draw(
    logits: Tensor, number: Tensor, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """A token of each row by its probability, from a number that is uniform in (0, 1).

    The tokens are lined up, the likeliest first where some of them are left out and in their own
    order otherwise, and the one is taken in whose share the number falls.

    Args:
        logits: ``[..., V]``.
        number: ``[...]`` fp64.
        top_k: Tokens that are kept.
        top_p: Probability that is kept, after ``top_k``.

    Returns:
        ``[...]`` int64.
    """
    V = logits.size(-1)
    if top_k is None and top_p is None:
        shares = logits.double().softmax(dim=-1).cumsum(dim=-1)
        return _share_of(shares, number * shares[..., -1])
    count = V if top_k is None else min(top_k, V)
    total = logits.double().logsumexp(dim=-1, keepdim=True)
    if top_k is not None:
        total = logits.topk(count, dim=-1).values.double().logsumexp(dim=-1, keepdim=True)
    looked_at = count
    if top_p is not None and logits.device.type == "cpu":
        # How many tokens it takes is known only afterwards; most often few.
        looked_at = min(_FIRST_CANDIDATES, count)
    while True:
        best, order = logits.topk(looked_at, dim=-1)
        shares = (best.double() - total).exp().cumsum(dim=-1)
        wanted = 1.0 if top_p is None else top_p
        if looked_at == count or bool((shares[..., -1] >= wanted).all()):
            break
        looked_at = min(4 * looked_at, count)
    if top_p is not None:
        # The first with which that much is reached is the last that is kept.
        last = (shares < top_p).sum(dim=-1, keepdim=True).clamp(max=looked_at - 1)
        kept = shares.gather(-1, last)[..., 0]
    else:
        kept = shares[..., -1]
    return order.gather(-1, _share_of(shares, number * kept)[..., None])[..., 0]


def _share_of(shares: Tensor, number: Tensor) -> Tensor:
    """The first of ascending shares that exceeds a number: a token of probability 0 has none."""
    found = torch.searchsorted(shares, number[..., None], right=True)[..., 0]
    return found.clamp(max=shares.size(-1) - 1)
