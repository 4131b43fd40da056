"""A distribution over words generated and copied, beside eager PyTorch.

The peer is what models in plain PyTorch have: probabilities, scattered into the extended
vocabulary, and their logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case
from fused_attn.ops.copy_distribution.cases import IGNORED

from .peers import Peer, Run, compiled
from .suite import parametrize

OP = "copy_distribution"


def peer(case: Case) -> Run:
    """Softmax, scale, pad, ``scatter_add``, and ``gather`` where there are targets."""

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        logits, copy = inputs["logits"], inputs["copy"]
        extra = getattr(case, "extra", 0)
        if "gate" in inputs:
            generate = torch.sigmoid(inputs["gate"])[..., None]
            generated = generate * logits.softmax(dim=-1)
            copied = (1.0 - generate) * copy
        else:
            generated, copied = (
                torch.cat([logits, copy], dim=-1)
                .softmax(dim=-1)
                .split([logits.size(-1), copy.size(-1)], dim=-1)
            )
        tokens = inputs["source_tokens"].expand_as(copy)
        p = F.pad(generated, (0, extra)).scatter_add(-1, tokens, copied)
        if "targets" not in inputs:
            return (p.log(),)
        # A target that is neither has p = 0 and would make every gradient NaN.
        targets = inputs["targets"]
        has_loss = (targets != IGNORED) & (targets < p.size(-1))
        chosen = p.gather(-1, targets.where(has_loss, 0)[..., None]).squeeze(-1)
        return (-(chosen.where(has_loss, 1.0).log()),)

    return run


PEERS = {
    "eager": Peer(peer, "plain PyTorch"),
    "compile": compiled(peer),
}


@parametrize(OP)
def test_copy_distribution(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
