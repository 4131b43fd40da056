"""A step of beam search beside ``log_softmax``, a sum and ``topk`` over K·V candidates.

``sum`` reads the logits once and does next to nothing with them: what a perfect kernel could at
best take on the same threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn.ops._cases import Case

from .peers import Inputs, Peer, Run, bound, compiled
from .suite import parametrize

OP = "beam_search"


def peer(case: Case) -> Run:
    """The candidates in plain PyTorch; what becomes of those that end is left out."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        logits, scores = inputs["logits"], inputs["scores"]
        _, K, V = logits.shape
        if "temperature" in inputs:
            logits = logits / inputs["temperature"][:, None, None]
        if "shortlist" in inputs:
            tokens = inputs["shortlist"]
            listed = torch.zeros(len(logits), V + 1, dtype=torch.bool, device=logits.device)
            listed.scatter_(1, tokens.masked_fill(tokens < 0, V), True)
            logits = logits.masked_fill(~listed[:, None, :V], -torch.inf)
        total = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        if "edit_tokens" in inputs:
            edits = inputs["edit_tokens"] >= 0
            rows, beams, places = edits.nonzero(as_tuple=True)
            at = rows, beams, inputs["edit_tokens"][rows, beams, places]
            total[at] = total[at] * inputs["edit_factors"][edits] + inputs["edit_offsets"][edits]
        best, place = (scores[:, :, None] + total).flatten(1).topk(2 * K)
        return best, place % V, place // V

    return run


def candidates(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The K best that go on, of a peer's 2K: at most one of each beam ends."""
    best, tokens, parents = outputs
    B, K = inputs["scores"].shape
    goes_on = tokens != inputs["eos_token"]
    first = goes_on.byte().argsort(dim=1, descending=True, stable=True)[:, :K]
    tokens, parents, scores = (t.gather(1, first) for t in (tokens, parents, best))
    # What has ended is not computed.
    none = torch.full_like(scores, -torch.inf)
    invalid = torch.zeros(B, dtype=torch.bool, device=scores.device)
    found = case.comparable(inputs, (tokens, parents, scores, none, parents, invalid))
    return {name: found[name] for name in ("scores", "chosen", "distinct")}


def read_once(case: Case) -> Run:
    """One pass over the logits."""
    return lambda inputs: (inputs["logits"].sum(),)


EAGER = Peer(peer, "plain PyTorch", differentiable=False, comparable=candidates)
PEERS = {
    "eager": EAGER,
    "compile": compiled(EAGER),
    "sum": bound(read_once, "one pass over the logits: less than any kernel could do"),
}


@parametrize(OP)
def test_beam_search(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
