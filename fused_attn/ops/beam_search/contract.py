"""Schema and fake of ``beam_search_step``, shared by the fused backends. It has no gradient."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "beam_search_step(Tensor logits, Tensor scores, int eos_token, str backend) "
    "-> (Tensor tokens, Tensor parents, Tensor next_scores, Tensor finished_scores, "
    "Tensor finished_parents)"
)


def _step(
    logits: Tensor, scores: Tensor, eos_token: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = importlib.import_module(f"{__package__}.{backend}")
    return module.step(logits, scores, eos_token)


_LIBRARY.impl("beam_search_step", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::beam_search_step", lib=_LIBRARY)
def _step_fake(
    logits: Tensor, scores: Tensor, eos_token: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = logits.shape[:2]
    return (
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape),
        scores.new_empty(shape),
        scores.new_empty(shape, dtype=torch.int64),
    )


def beam_search_step_fused(
    logits: Tensor, scores: Tensor, eos_token: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores, finished scores and finished parents by a fused backend."""
    # Detached, since autograd would warn of an operator without a gradient.
    return torch.ops.fused_attn.beam_search_step(
        logits.detach(), scores.detach(), eos_token, backend
    )
