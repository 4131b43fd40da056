"""Schema and fake of ``beam_search_step``, shared by the fused backends. It has no gradient."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "beam_search_step(Tensor logits, Tensor scores, int eos_token, Tensor? temperature, "
    "Tensor? edit_tokens, Tensor? edit_factors, Tensor? edit_offsets, Tensor? forced_tokens, "
    "Tensor? shortlist, str backend) -> (Tensor tokens, Tensor parents, Tensor next_scores, "
    "Tensor finished_scores, Tensor finished_parents, Tensor invalid)"
)

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _step(
    logits: Tensor,
    scores: Tensor,
    eos_token: int,
    temperature: Tensor | None,
    edit_tokens: Tensor | None,
    edit_factors: Tensor | None,
    edit_offsets: Tensor | None,
    forced_tokens: Tensor | None,
    shortlist: Tensor | None,
    backend: str,
) -> Results:
    module = importlib.import_module(f"{__package__}.{backend}")
    return module.step(
        logits,
        scores,
        eos_token,
        temperature,
        edit_tokens,
        edit_factors,
        edit_offsets,
        forced_tokens,
        shortlist,
    )


_LIBRARY.impl("beam_search_step", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::beam_search_step", lib=_LIBRARY)
def _step_fake(
    logits: Tensor,
    scores: Tensor,
    eos_token: int,
    temperature: Tensor | None,
    edit_tokens: Tensor | None,
    edit_factors: Tensor | None,
    edit_offsets: Tensor | None,
    forced_tokens: Tensor | None,
    shortlist: Tensor | None,
    backend: str,
) -> Results:
    shape = logits.shape[:2]
    return (
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape),
        scores.new_empty(shape),
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape[:1], dtype=torch.bool),
    )


def beam_search_step_fused(
    logits: Tensor,
    scores: Tensor,
    eos_token: int,
    *,
    temperature: Tensor | None,
    edit_tokens: Tensor | None,
    edit_factors: Tensor | None,
    edit_offsets: Tensor | None,
    forced_tokens: Tensor | None,
    shortlist: Tensor | None,
    backend: str,
) -> Results:
    """Tokens, parents, scores, finished scores and parents, and invalid, by a fused backend."""
    # Detached, since autograd would warn of an operator without a gradient.
    return torch.ops.fused_attn.beam_search_step(
        logits.detach(),
        scores.detach(),
        eos_token,
        *(
            None if tensor is None else tensor.detach()
            for tensor in (
                temperature,
                edit_tokens,
                edit_factors,
                edit_offsets,
                forced_tokens,
                shortlist,
            )
        ),
        backend,
    )
