"""Named cases of ``beam_search_step``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._cases import ELEMENTARY, Case
from .api import beam_search_step
from .edits import TokenEdits

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BeamSearchCase(Case):
    """Random logits and running scores, and what ``arrange`` and ``process`` make of them."""

    op: ClassVar[str] = "beam_search"

    B: int
    K: int
    V: int
    eos_token: int = 0
    spread: float = 3.0
    """Standard deviation of the logits."""
    arrange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """From logits and scores to those of the case: ties, masks, strides."""
    process: Callable[[Inputs, torch.Generator], None] | None = None
    """Adds temperature, edits, forced tokens, a shortlist to the inputs. Edits are in there as
    ``edit_tokens``, ``edit_factors`` and ``edit_offsets``."""
    listed_share: float = 1.0
    """Of the vocabulary, what a shortlist that ``process`` adds has of it."""
    exact: bool = False
    """No two candidates differ by rounding alone, so tokens and parents are compared as well."""

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Normal logits, running scores between -5 and 0, then ``arrange`` and ``process``."""
        logits = torch.randn(self.B, self.K, self.V, generator=generator) * self.spread
        scores = -5.0 * torch.rand(self.B, self.K, generator=generator)
        logits, scores = logits.to(device, dtype), scores.to(device)
        if self.arrange is not None:
            logits, scores = self.arrange(logits, scores)
        inputs = {"logits": logits, "scores": scores, "eos_token": self.eos_token}
        if self.process is not None:
            self.process(inputs, generator)
        return {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Call ``beam_search_step``."""
        arguments = dict(inputs)
        if "edit_tokens" in arguments:
            names = ("edit_tokens", "edit_factors", "edit_offsets")
            arguments["edits"] = TokenEdits(*(arguments.pop(name) for name in names))
        return tuple(beam_search_step(**arguments, backend=backend))

    def comparable(
        self, inputs: Mapping[str, Any], outputs: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """The scores, and the choices by their worth.

        Where candidates differ by less than the rounding of their scores a backend may choose
        either. So the chosen pairs of parent and token are scored again in fp64, to be compared
        rank by rank, and must be distinct.
        """
        tokens, parents, scores, finished_scores, finished_parents, invalid = outputs
        total = _totals(inputs).flatten(1)
        pairs = parents * self.V + tokens
        chosen = total.gather(1, pairs).masked_fill(tokens == self.eos_token, -math.inf)
        ended = total.gather(1, finished_parents * self.V + self.eos_token)
        distinct = 1 + (pairs.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1)
        result = {
            "scores": scores,
            "finished_scores": finished_scores,
            "chosen": chosen,
            "ended": ended.masked_fill(finished_scores == -math.inf, -math.inf),
            "distinct": distinct.double(),
            "invalid": invalid.double(),
        }
        if self.exact:
            result["tokens"] = tokens.double()
            result["parents"] = parents.double()
            result["finished_parents"] = finished_parents.double()
        return result

    def flops(self, backward: bool = False) -> int:
        """An exponential and an addition a logit; comparisons are none."""
        return self._listed * (ELEMENTARY + 1)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """One read of the logits that are listed; everything else is K numbers a sentence."""
        return self._listed * itemsize

    @property
    def _listed(self) -> int:
        return round(self.B * self.K * self.V * self.listed_share)


def _totals(inputs: Mapping[str, Any]) -> Tensor:
    """``[B, K, V]`` fp64, -inf where a candidate is impossible: sentence by sentence."""
    logits = inputs["logits"].double()
    V = logits.size(2)
    totals = torch.full_like(logits, -math.inf)
    for b, rows in enumerate(logits):
        vocabulary = torch.arange(V, device=logits.device)
        if "shortlist" in inputs:
            vocabulary = vocabulary[torch.isin(vocabulary, inputs["shortlist"][b])]
        rows = rows[:, vocabulary]
        if "temperature" in inputs:
            rows = rows / inputs["temperature"][b].double()
        log_probabilities = torch.full_like(totals[b], -math.inf)
        if len(vocabulary) > 0:
            log_probabilities[:, vocabulary] = rows.log_softmax(-1)
        for k in range(len(log_probabilities) if "edit_tokens" in inputs else 0):
            token = inputs["edit_tokens"][b, k]
            known = (token >= 0) & (token < V)
            factor, offset = (inputs[f"edit_{n}"][b, k, known] for n in ("factors", "offsets"))
            edited = log_probabilities[k, token[known]] * factor.double() + offset.double()
            log_probabilities[k, token[known]] = edited
        totals[b] = inputs["scores"][b].double()[:, None] + log_probabilities
        if "forced_tokens" in inputs and (forced := int(inputs["forced_tokens"][b])) >= 0:
            totals[b, :, torch.arange(V, device=logits.device) != forced] = -math.inf
    return totals.masked_fill(totals.isnan(), -math.inf)


# --- arrangements of the logits -------------------------------------------------------------


def _first_step(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.full_like(scores, -math.inf)
    scores[:, 0] = 0.0
    return logits, scores


def _ties(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    # All beams alike and all numbers integers: many candidates tie, also between beams.
    return logits[:, :1].round().expand_as(logits), scores.round()


def _all_equal(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(logits), torch.zeros_like(scores)


def _masked(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    # Two tokens of each beam are possible: fewer than K candidates go on.
    V = logits.size(2)
    masked = torch.full_like(logits, -math.inf)
    masked[:, :, [V // 3, V - 1]] = logits[:, :, [V // 3, V - 1]]
    return masked, scores


def _masked_prefix(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    logits[:, :, : logits.size(2) - 5] = -math.inf
    return logits, scores


def _impossible(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    logits[0, 0, 3] = math.nan
    logits[0, 1, :] = -math.inf
    logits[0, 2, -1] = math.inf
    scores[0, 3] = -math.inf
    scores[1, :] = math.nan
    logits[2, :, :] = math.nan
    return logits, scores


def _favour_end(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    logits[:, :, 0] = 20.0
    return logits, scores


def _rising(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    # Every token is better than the one before, by enough in all for an overflow of e^x.
    V = logits.size(2)
    return torch.linspace(-200.0, 200.0, V).to(logits).expand_as(logits), scores


def _falling(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return _rising(logits, scores)[0].flip(-1), scores


def _offset(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return (logits.float() + 30000.0).to(logits), scores - 1000.0


def _last_position(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    # As a decoder that returns [B, K, T, V] gives them, with scores of another stride too.
    wide = torch.full((*logits.shape[:2], 3, logits.size(2)), math.nan).to(logits)
    wide[:, :, -1] = logits
    return wide[:, :, -1], scores[:, :, None].expand(-1, -1, 2)[:, :, 0]


def _vocabulary_first(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return logits.permute(2, 1, 0).contiguous().permute(2, 1, 0), scores.T.contiguous().T


def _expanded(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :1].expand_as(logits), scores


def _far_apart(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    # The log-sum-exp is exactly 0 and all else a whole number: totals tie to the last bit.
    V = logits.size(2)
    far = -100.0 - torch.arange(V).remainder(9)
    far[V // 2] = 0.0
    return far.to(logits).expand_as(logits), scores.round()


# --- temperature, edits, forced tokens, shortlists ---------------------------------------------


def _draw(inputs: Inputs, N: int, generator: torch.Generator) -> Tensor:
    """``[B, K, N]``: N tokens of each beam, none of them twice."""
    return torch.rand(inputs["logits"].shape, generator=generator).argsort(dim=-1)[:, :, :N]


def _edit(inputs: Inputs, tokens: Tensor, factors: float | Tensor, offsets: float | Tensor) -> None:
    ones = torch.ones(tokens.shape)
    inputs["edit_tokens"] = tokens
    inputs["edit_factors"] = ones * factors
    inputs["edit_offsets"] = ones.log() + offsets


def _best(inputs: Inputs, N: int) -> Tensor:
    """``[B, K, N]``: the N best tokens of each beam."""
    return inputs["logits"].cpu().argsort(dim=-1, descending=True, stable=True)[:, :, :N]


def _repetition(inputs: Inputs, generator: torch.Generator) -> None:
    # The best tokens were used before, but for some; there entries are none.
    tokens = _best(inputs, 12)
    tokens[:, :, ::3] = -1
    _edit(inputs, tokens, 1.3, 0.0)


def _encouraged(inputs: Inputs, generator: torch.Generator) -> None:
    # Log-probabilities come closer to 0: tokens from far behind become the best.
    tokens = _draw(inputs, 20, generator)
    _edit(inputs, tokens, torch.rand(tokens.shape, generator=generator) * 0.9 + 0.05, 0.0)


def _banned(inputs: Inputs, generator: torch.Generator) -> None:
    _edit(inputs, _best(inputs, 9), 1.0, -math.inf)


def _few_left(inputs: Inputs, generator: torch.Generator) -> None:
    # Two tokens of each beam, one of which may end: fewer than K candidates go on.
    V = inputs["logits"].size(2)
    _edit(inputs, _draw(inputs, V - 2, generator), 1.0, -math.inf)


def _most(inputs: Inputs, generator: torch.Generator) -> None:
    V = inputs["logits"].size(2)
    tokens = _draw(inputs, 2 * V // 3, generator)
    factors = torch.rand(tokens.shape, generator=generator) + 0.5
    _edit(inputs, tokens, factors, 4.0 * torch.randn(tokens.shape, generator=generator))


def _all(inputs: Inputs, generator: torch.Generator) -> None:
    tokens = _draw(inputs, inputs["logits"].size(2), generator)
    _edit(inputs, tokens, torch.rand(tokens.shape, generator=generator) + 0.5, -1.0)


def _edited_end(inputs: Inputs, generator: torch.Generator) -> None:
    # In sentence 0 it becomes the best by an offset, in 1 by a factor; in 2 it is forbidden.
    B, K, _ = inputs["logits"].shape
    tokens = torch.full((B, K, 3), -1)
    tokens[:, :, 1] = inputs["eos_token"]
    offsets = torch.tensor([15.0, 0.0, -math.inf])[:B, None, None]
    _edit(inputs, tokens, torch.tensor([1.0, 0.05, 1.0])[:B, None, None], offsets)


def _ties_of_edits(inputs: Inputs, generator: torch.Generator) -> None:
    # Ties between edited and unedited tokens, among edited ones of different logits, and between
    # beams; and edits that change nothing, of tokens that would else rank behind their equals.
    B, K, _ = inputs["logits"].shape
    tokens = torch.tensor([9, 3, 14, 1, 12, 5, 18, 0, 27, 4]).expand(B, K, 10)
    values = inputs["logits"].cpu().float().gather(2, tokens)
    offsets = -100.0 - values  # all of them become as good as the best but one
    offsets[:, :, 6:] = 0.0
    _edit(inputs, tokens, 1.0, offsets)


def _no_edits(inputs: Inputs, generator: torch.Generator) -> None:
    B, K, _ = inputs["logits"].shape
    _edit(inputs, torch.empty(B, K, 0, dtype=torch.int64), 1.0, 0.0)


def _no_tokens(inputs: Inputs, generator: torch.Generator) -> None:
    # Numbers that are no tokens, everywhere.
    B, K, V = inputs["logits"].shape
    wrong = torch.tensor([-1, V, -(2**62), 2**62, 3, 2**32, V + 5])
    factors = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.5, 9.0, 9.0])
    _edit(inputs, wrong.expand(B, K, 7), factors, 5.0)
    inputs["forced_tokens"] = torch.tensor([-(2**40), -1, V])[:B]
    inputs["shortlist"] = torch.tensor([[-5, 0, 3, 5, 8, V, 2**32 + 2, -1]]).expand(B, 8)


def _temperature(inputs: Inputs, generator: torch.Generator) -> None:
    inputs["temperature"] = torch.tensor([0.3, 1.0, 2.5])[: len(inputs["logits"])]


def _cold(inputs: Inputs, generator: torch.Generator) -> None:
    inputs["temperature"] = torch.tensor([1e-3, 1e-6])[: len(inputs["logits"])]


def _forced(inputs: Inputs, generator: torch.Generator) -> None:
    inputs["forced_tokens"] = torch.tensor([5, -1, 0])[: len(inputs["logits"])]


def _forced_end(inputs: Inputs, generator: torch.Generator) -> None:
    B = len(inputs["logits"])
    inputs["forced_tokens"] = torch.where(torch.arange(B) % 2 == 0, inputs["eos_token"], -1)


def _forced_outside(inputs: Inputs, generator: torch.Generator) -> None:
    # Outside of the vocabulary, of the shortlist, and forbidden.
    B, K, V = inputs["logits"].shape
    inputs["forced_tokens"] = torch.tensor([V, 2**40, 6, 4])[:B]
    inputs["shortlist"] = torch.tensor([[1, 2, 4, 9, 30, -1]]).expand(B, 6)
    _edit(inputs, torch.tensor([4, 9]).expand(B, K, 2), 1.0, -math.inf)


def _list(inputs: Inputs, lengths: list[int], generator: torch.Generator) -> Tensor:
    """``[B, N]``: as many tokens as ``lengths`` says for each sentence, ascending, then -1."""
    V = inputs["logits"].size(2)
    shortlist = torch.full((len(inputs["logits"]), max(lengths) + 1), -1)
    for row, length in zip(shortlist, lengths, strict=True):
        row[:length] = torch.randperm(V, generator=generator)[:length].sort().values
    return shortlist


def _shortlist(inputs: Inputs, generator: torch.Generator) -> None:
    # Where the end of sequence is token 0 or V - 1, beside the others; the last has it not.
    V, eos = inputs["logits"].size(2), inputs["eos_token"]
    shortlist = _list(inputs, [V // 3, V - 1, V // 8], generator)
    shortlist[:2, 0 if eos == 0 else -2] = eos
    shortlist[2].masked_fill_(shortlist[2] == eos, -1)
    inputs["shortlist"] = _padding_last(shortlist)


def _padding_last(shortlist: Tensor) -> Tensor:
    top = torch.iinfo(torch.int64).max
    ascending = shortlist.masked_fill(shortlist < 0, top).sort(dim=1).values
    return ascending.masked_fill(ascending == top, -1)


def _short_shortlist(inputs: Inputs, generator: torch.Generator) -> None:
    # Fewer tokens than beams, one token, none.
    inputs["shortlist"] = _list(inputs, [3, 1, 0], generator)


def _no_shortlist(inputs: Inputs, generator: torch.Generator) -> None:
    inputs["shortlist"] = torch.empty(len(inputs["logits"]), 0, dtype=torch.int64)


def _unlisted_are_odd(inputs: Inputs, generator: torch.Generator) -> None:
    # NaN and +inf outside of the vocabulary are not there; inside they are.
    logits = inputs["logits"]
    logits[:, :, 2], logits[:, :, 11] = math.nan, math.inf
    inputs["shortlist"] = torch.tensor([[0, 1, 3, 7, 20, -1], [0, 1, 3, 7, 11, 20]])


def _together(inputs: Inputs, generator: torch.Generator) -> None:
    """Everything at once, and of each something else in each sentence."""
    B, _, V = inputs["logits"].shape
    rows = torch.arange(B)
    inputs["temperature"] = 0.5 + rows / 2.0
    tokens = _best(inputs, 40)
    tokens[::2, :, ::3] = -1
    factors = torch.rand(tokens.shape, generator=generator) + 0.5
    offsets = torch.randn(tokens.shape, generator=generator)
    offsets[:, :, 5] = -math.inf
    _edit(inputs, tokens, factors, offsets)
    inputs["shortlist"] = _list(inputs, [V // 2 + int(row) for row in rows], generator)
    inputs["forced_tokens"] = torch.where(rows == 1, inputs["shortlist"][:, 3], -1)


def _history(inputs: Inputs, generator: torch.Generator) -> None:
    """As in generation: 48 tokens that were used are less likely, 16 forbidden, another heat."""
    tokens = _draw(inputs, 64, generator)
    tokens[:, :, :4] = _best(inputs, 4)
    tokens[:, :, 4:].masked_fill_(
        (tokens[:, :, 4:, None] == tokens[:, :, None, :4]).any(dim=-1), -1
    )
    offsets = torch.zeros(64)
    offsets[2::4] = -math.inf
    _edit(inputs, tokens, 1.2, offsets)
    inputs["temperature"] = torch.full((len(tokens),), 0.8)


def _listed_tenth(inputs: Inputs, generator: torch.Generator) -> None:
    B, _, V = inputs["logits"].shape
    inputs["shortlist"] = _list(inputs, [V // 10] * B, generator)


CASES: tuple[Case, ...] = (
    BeamSearchCase(name="empty_batch", kind="edge", B=0, K=3, V=7),
    BeamSearchCase(name="vocabulary_of_one", kind="edge", B=2, K=3, V=1, exact=True),
    BeamSearchCase(name="vocabulary_of_two", kind="edge", B=2, K=3, V=2, eos_token=1),
    BeamSearchCase(name="one_of_everything", kind="edge", B=1, K=1, V=2),
    BeamSearchCase(name="more_beams_than_tokens", kind="edge", B=2, K=9, V=5, eos_token=4),
    BeamSearchCase(name="first_step", kind="edge", B=2, K=4, V=301, arrange=_first_step),
    BeamSearchCase(
        name="ties", kind="edge", B=3, K=5, V=1031, eos_token=7, arrange=_ties, exact=True
    ),
    BeamSearchCase(
        name="all_equal", kind="edge", B=2, K=6, V=9001, eos_token=1, arrange=_all_equal, exact=True
    ),
    BeamSearchCase(name="masked", kind="edge", B=2, K=5, V=2100, arrange=_masked, exact=True),
    BeamSearchCase(name="masked_prefix", kind="edge", B=2, K=3, V=8197, arrange=_masked_prefix),
    BeamSearchCase(name="impossible", kind="edge", B=4, K=4, V=67, arrange=_impossible, exact=True),
    BeamSearchCase(name="all_end", kind="edge", B=2, K=4, V=131, arrange=_favour_end),
    BeamSearchCase(name="rising", kind="edge", B=1, K=3, V=20011, arrange=_rising),
    BeamSearchCase(name="falling", kind="edge", B=1, K=3, V=20011, arrange=_falling),
    BeamSearchCase(name="large_offset", kind="edge", B=2, K=4, V=999, arrange=_offset),
    BeamSearchCase(name="large_spread", kind="edge", B=2, K=4, V=2500, spread=1000.0),
    BeamSearchCase(
        name="last_position", kind="edge", B=2, K=3, V=777, eos_token=776, arrange=_last_position
    ),
    BeamSearchCase(
        name="vocabulary_first", kind="edge", B=2, K=3, V=777, arrange=_vocabulary_first
    ),
    BeamSearchCase(name="expanded", kind="edge", B=2, K=3, V=777, arrange=_expanded),
    BeamSearchCase(name="chunk_and_one", kind="edge", B=1, K=2, V=8193),
    BeamSearchCase(name="many_beams", kind="edge", B=1, K=64, V=17011, eos_token=2),
    BeamSearchCase(name="translation", kind="typical", B=3, K=4, V=1009, eos_token=2),
    BeamSearchCase(name="greedy", kind="typical", B=5, K=1, V=512, eos_token=3),
    BeamSearchCase(name="repetition", kind="edge", B=2, K=4, V=301, process=_repetition),
    BeamSearchCase(name="factors_below_one", kind="edge", B=2, K=4, V=2301, process=_encouraged),
    BeamSearchCase(name="banned", kind="edge", B=2, K=4, V=301, process=_banned),
    BeamSearchCase(name="few_left", kind="edge", B=2, K=5, V=307, process=_few_left),
    BeamSearchCase(name="edits_of_most_tokens", kind="edge", B=2, K=3, V=1031, process=_most),
    BeamSearchCase(name="edits_of_all_tokens", kind="edge", B=2, K=3, V=97, process=_all),
    BeamSearchCase(
        name="edited_end", kind="edge", B=3, K=4, V=301, eos_token=7, process=_edited_end
    ),
    BeamSearchCase(
        name="ties_of_edits",
        kind="edge",
        B=2,
        K=5,
        V=60,
        eos_token=3,
        arrange=_far_apart,
        process=_ties_of_edits,
        exact=True,
    ),
    BeamSearchCase(name="no_edits", kind="edge", B=2, K=3, V=41, process=_no_edits),
    BeamSearchCase(
        name="numbers_that_are_no_tokens", kind="edge", B=3, K=3, V=41, process=_no_tokens
    ),
    BeamSearchCase(name="temperature", kind="edge", B=3, K=4, V=1031, process=_temperature),
    BeamSearchCase(name="cold", kind="edge", B=2, K=4, V=3031, arrange=_favour_end, process=_cold),
    BeamSearchCase(
        name="rising_temperature",
        kind="edge",
        B=3,
        K=2,
        V=9011,
        arrange=_rising,
        process=_temperature,
    ),
    BeamSearchCase(name="forced", kind="edge", B=3, K=4, V=301, eos_token=7, process=_forced),
    BeamSearchCase(
        name="forced_end", kind="edge", B=3, K=4, V=301, eos_token=7, process=_forced_end
    ),
    BeamSearchCase(
        name="forced_outside", kind="edge", B=4, K=3, V=41, process=_forced_outside, exact=True
    ),
    BeamSearchCase(name="shortlist", kind="edge", B=3, K=4, V=1031, process=_shortlist),
    BeamSearchCase(
        name="shortlist_last_position",
        kind="edge",
        B=3,
        K=4,
        V=1031,
        eos_token=1030,
        arrange=_last_position,
        process=_shortlist,
    ),
    BeamSearchCase(name="short_shortlist", kind="edge", B=3, K=5, V=41, process=_short_shortlist),
    BeamSearchCase(
        name="no_shortlist", kind="edge", B=2, K=3, V=41, process=_no_shortlist, exact=True
    ),
    BeamSearchCase(name="unlisted_are_odd", kind="edge", B=2, K=3, V=41, process=_unlisted_are_odd),
    BeamSearchCase(
        name="impossible_processed",
        kind="edge",
        B=4,
        K=4,
        V=67,
        arrange=_impossible,
        process=_together,
    ),
    BeamSearchCase(
        name="all_together", kind="typical", B=3, K=4, V=1009, eos_token=2, process=_together
    ),
    BeamSearchCase(
        name="many_beams_together", kind="edge", B=1, K=64, V=9001, eos_token=2, process=_together
    ),
    BeamSearchCase(name="B16_K4_V32000", kind="benchmark", B=16, K=4, V=32000, eos_token=2),
    BeamSearchCase(name="B32_K1_V32000", kind="benchmark", B=32, K=1, V=32000, eos_token=2),
    BeamSearchCase(name="B1_K4_V50257", kind="benchmark", B=1, K=4, V=50257, eos_token=50256),
    BeamSearchCase(name="B4_K16_V32000", kind="benchmark", B=4, K=16, V=32000, eos_token=2),
    BeamSearchCase(name="B1_K64_V32000", kind="benchmark", B=1, K=64, V=32000, eos_token=2),
    BeamSearchCase(
        name="B16_K4_V32000_edits",
        kind="benchmark",
        B=16,
        K=4,
        V=32000,
        eos_token=2,
        process=_history,
    ),
    BeamSearchCase(
        name="B16_K4_V32000_shortlist",
        kind="benchmark",
        B=16,
        K=4,
        V=32000,
        eos_token=2,
        process=_listed_tenth,
        listed_share=0.1,
    ),
    BeamSearchCase(name="B2_K4_V262144", kind="benchmark", B=2, K=4, V=262144, eos_token=1),
    *(
        BeamSearchCase(
            name=f"B{B}_K{K}_V{V}_gpu", kind="benchmark", B=B, K=K, V=V, eos_token=2, gpu_only=True
        )
        for B, K, V in ((16, 4, 32000), (64, 8, 32000), (128, 4, 50257), (16, 64, 32000))
    ),
    BeamSearchCase(
        name="B16_K8_V262144_gpu",
        kind="benchmark",
        B=16,
        K=8,
        V=262144,
        eos_token=2,
        gpu_only=True,
    ),
)
