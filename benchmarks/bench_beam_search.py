"""A step of beam search beside ``log_softmax``, a sum and ``topk`` over K·V candidates.

``sum`` reads the logits once and does next to nothing with them: what a perfect kernel could at
best take on the same threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops._cases import Case

from .peers import Peer, Run, compiled
from .suite import parametrize

OP = "beam_search"


def peer(case: Case) -> Run:
    """The candidates in plain PyTorch; what becomes of those that end is left out."""

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        logits, scores = inputs["logits"], inputs["scores"]
        _, K, V = logits.shape
        if "temperature" in inputs:
            logits = logits / inputs["temperature"][:, None, None]
        if "shortlist" in inputs:
            tokens = inputs["shortlist"]
            listed = torch.zeros(len(logits), V + 1, dtype=torch.bool)
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


def read_once(case: Case) -> Run:
    """One pass over the logits."""
    return lambda inputs: (inputs["logits"].sum(),)


PEERS = {
    "eager": Peer(peer, "plain PyTorch"),
    "compile": compiled(peer),
    "sum": Peer(read_once, "one pass over the logits: less than any kernel could do"),
}


@parametrize(OP)
def test_beam_search(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
