"""Named cases of ``beam_search_step``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._cases import Case
from .api import beam_search_step


@dataclass(frozen=True, kw_only=True)
class BeamSearchCase(Case):
    """Random logits and running scores, and what ``arrange`` makes of them."""

    op: ClassVar[str] = "beam_search"

    B: int
    K: int
    V: int
    eos_token: int = 0
    spread: float = 3.0
    """Standard deviation of the logits."""
    arrange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """From logits and scores to those of the case: ties, masks, strides."""
    exact: bool = False
    """No two candidates differ by rounding alone, so tokens and parents are compared as well."""

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Normal logits, running scores between -5 and 0, then ``arrange``."""
        logits = torch.randn(self.B, self.K, self.V, generator=generator) * self.spread
        scores = -5.0 * torch.rand(self.B, self.K, generator=generator)
        logits, scores = logits.to(device, dtype), scores.to(device)
        if self.arrange is not None:
            logits, scores = self.arrange(logits, scores)
        return {"logits": logits, "scores": scores, "eos_token": self.eos_token}

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Call ``beam_search_step``."""
        return tuple(beam_search_step(**inputs, backend=backend))

    def comparable(
        self, inputs: Mapping[str, Any], outputs: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """The scores, and the choices by their worth.

        Where candidates differ by less than the rounding of their scores a backend may choose
        either. So the chosen pairs of parent and token are scored again in fp64, to be compared
        rank by rank, and must be distinct.
        """
        tokens, parents, scores, finished_scores, finished_parents = outputs
        total = inputs["scores"].double()[:, :, None] + inputs["logits"].double().log_softmax(-1)
        total = total.masked_fill(total.isnan(), -math.inf).flatten(1)
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
        }
        if self.exact:
            result["tokens"] = tokens.double()
            result["parents"] = parents.double()
            result["finished_parents"] = finished_parents.double()
        return result

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """One read of the logits; everything else is K numbers a sentence."""
        return self.B * self.K * self.V * itemsize


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
    BeamSearchCase(name="B16_K4_V32000", kind="benchmark", B=16, K=4, V=32000, eos_token=2),
    BeamSearchCase(name="B32_K1_V32000", kind="benchmark", B=32, K=1, V=32000, eos_token=2),
    BeamSearchCase(name="B1_K4_V50257", kind="benchmark", B=1, K=4, V=50257, eos_token=50256),
    BeamSearchCase(name="B4_K16_V32000", kind="benchmark", B=4, K=16, V=32000, eos_token=2),
    BeamSearchCase(name="B1_K64_V32000", kind="benchmark", B=1, K=64, V=32000, eos_token=2),
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
