"""A distribution over words generated and copied, beside eager PyTorch.

The peer is what models in plain PyTorch have: probabilities, scattered into the extended
vocabulary, and their logarithm. ``cross_entropy`` is the loss of the same logits without copying: a
part of the work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case
from fused_attn.ops.copy_distribution.cases import IGNORED

from .peers import Inputs, Peer, Run, bound, compiled
from .suite import parametrize

OP = "copy_distribution"


def peer(case: Case) -> Run:
    """Softmax, scale, pad, ``scatter_add``, and ``gather`` where there are targets."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
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


def cross_entropy(case: Case) -> Run:
    """PyTorch's loss, or log_softmax where all words are asked for, of the logits alone."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        logits = inputs["logits"].flatten(0, -2)
        if "targets" not in inputs:
            return (logits.log_softmax(-1),)
        targets = inputs["targets"].flatten()
        # Words that only sources have are none of its own.
        targets = targets.masked_fill(targets >= logits.size(-1), IGNORED)
        return (F.cross_entropy(logits, targets, reduction="none"),)

    return run


EAGER = Peer(peer, "plain PyTorch")
PEERS = {
    "eager": EAGER,
    "compile": compiled(EAGER),
    "cross_entropy": bound(cross_entropy, "the loss of the logits without copying"),
}


@parametrize(OP)
def test_copy_distribution(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
