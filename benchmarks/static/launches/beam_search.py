"""``beam_search_step``: beams, vocabularies, edits."""

from __future__ import annotations

import torch

from fused_attn.ops.beam_search import triton as backend

from . import call, empty, quick

CALLS = (
    quick("bfloat16", K=4, V=32000),
    call("float32", K=4, V=32000),
    # Rows that are not aligned.
    call("bfloat16", K=4, V=50257),
    call("bfloat16", K=64, V=32000),
    call("bfloat16", K=8, V=262144),
    call("bfloat16", K=4, V=32000, options="edited"),
    call("bfloat16", K=4, V=32000, options="everything"),
    quick("float32", K=64, V=32000, options="everything"),
)
# Dynamic shared memory of the CUDA kernels in C++, by what an instance's name begins with; of the
# most beams that they take.
_TILE = "2 * sizeof(uint64_t) * beam_search::tile_capacity(kBeamSearchCudaMaxBeams)"
CUDA_SHARED = {
    "scan_kernel<": "2 * sizeof(uint64_t) * beam_search::scan_capacity(kBeamSearchCudaMaxBeams)",
    "merge_kernel<": _TILE,
    "rank_kernel<": _TILE,
}


def launch(dtype: str, K: int, V: int, options: str = "plain") -> None:
    """A step of 16 sentences.

    Args:
        dtype: Of the logits.
        K: Beams.
        V: Tokens.
        options: ``plain`` has none, ``edited`` edits, ``everything`` all of them.
    """
    B = 16
    everything = options == "everything"
    edits = [empty(B, K, 200, kind=k) for k in (torch.int64, torch.float32, torch.float32)]
    backend.step(
        empty(B, K, V, kind=getattr(torch, dtype)),
        empty(B, K),
        2,
        empty(B) if everything else None,
        *(edits if options != "plain" else (None, None, None)),
        empty(B, kind=torch.int64) if everything else None,
        empty(B, V // 4, kind=torch.int64) if everything else None,
    )
