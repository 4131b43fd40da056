"""Schema and fake of ``decode_attention``, shared by the fused backends. It has no gradient.

``window`` is -1 where there is no bound, ``softcap`` 0 where there is none. A query with nothing to
attend to has output 0 and lse -inf.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
_LIBRARY.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, "
    "Tensor? ancestry, Tensor? mask, Tensor? alibi_slopes, bool is_causal, int window, "
    "float scale, float softcap, str backend) -> (Tensor output, Tensor lse)"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    return importlib.import_module(f"{__package__}.{backend}").forward(*inputs)


_LIBRARY.impl("decode_attention", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_attn::decode_attention", lib=_LIBRARY)
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty((*query.shape[:-1], value.shape[-1])),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    )


def decode_attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    ancestry: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and lse by a fused backend."""
    # Detached, since autograd would warn of an operator without a gradient.
    return torch.ops.fused_attn.decode_attention(
        query.detach(),
        key.detach(),
        value.detach(),
        key_lengths,
        ancestry,
        mask,
        alibi_slopes,
        is_causal,
        window,
        scale,
        softcap,
        backend,
    )
