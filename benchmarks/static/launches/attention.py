"""``attention``: every entry of the table of launches, and products of every kind."""

from __future__ import annotations

import torch

from fused_attn.ops.attention import triton as backend
from fused_attn.ops.attention import triton_launches
from fused_attn.ops.attention.contract import AttentionInputs

from . import call, empty, quick

_SPECIALIZED = "128x128 4w 2s tma specialize"
# ``causal`` has nothing else; ``masked`` adds lengths, a mask, a bias and ALiBi; ``everything`` a
# window, a block mask, dropout, a softcap and a gradient of the lse.
_FEATURES = ("causal", "masked", "everything")
CALLS = (
    quick("bfloat16", head_size=64, features="causal"),
    quick("bfloat16", head_size=128, features="causal"),
    quick("bfloat16", head_size=128, features="everything"),
    call("bfloat16", head_size=64, features="masked"),
    call("bfloat16", head_size=64, features="everything"),
    call("bfloat16", head_size=128, features="masked"),
    *(call("bfloat16", head_size=256, features=features) for features in _FEATURES),
    *(
        call("float32", head_size=head_size, features=features)
        for head_size in (64, 128, 256)
        for features in _FEATURES
    ),
    *(
        call("float16", head_size=head_size, features=features)
        for head_size in (64, 128)
        for features in ("causal", "everything")
    ),
    # Less than their tiles.
    call("bfloat16", head_size=32, features="causal"),
    call("bfloat16", head_size=80, features="masked"),
    # Too few rows for descriptors, where the table has them.
    *(
        call("bfloat16", targets=("sm_90",), head_size=head_size, features="causal", rows=256)
        for head_size in (64, 128)
    ),
    # Warps can divide the work of a forward, though no entry of the table says so yet.
    *(
        kind(
            "bfloat16",
            targets=("sm_90",),
            head_size=head_size,
            features="causal",
            forward_launch=_SPECIALIZED,
        )
        for kind, head_size in ((call, 64), (quick, 128))
    ),
)
# Dynamic shared memory of the CUDA kernels in C++, by what an instance's name begins with.
_TILES = {
    "forward": "ForwardTiles",
    "query_gradient": "QueryGradientTiles",
    "key_gradient": "KeyGradientTiles",
}
CUDA_SHARED = {
    f"attention_{kernel}_kernel<{{T}}, {{D}}, {general}": f"{tiles}<{{D}}, {general}>::kSharedBytes"
    for kernel, tiles in _TILES.items()
    for general in ("false", "true")
} | {"attention_bias_gradient_kernel<{T}, {D}>": "BiasGradientTiles<{D}>::kSharedBytes"}


def launch(
    dtype: str,
    head_size: int,
    features: str,
    rows: int = 4096,
    forward_launch: str | None = None,
) -> None:
    """Forward and backward, 8 heads of queries on 4 of keys.

    Args:
        dtype: Of everything in floating point.
        head_size: D, and Dv.
        features: One of ``_FEATURES``.
        rows: T, and S.
        forward_launch: Run the forward alone, as this entry of the table says.
    """
    floating = getattr(torch, dtype)
    B, H, Hk, tiles = 2, 8, 4, rows // 128
    masked = features != "causal"
    everything = features == "everything"
    lengths = empty(B, kind=torch.int64) if masked else None
    lists = empty(1, 1, tiles, tiles, kind=torch.int32)
    counts = empty(1, 1, tiles, 2, kind=torch.int32)
    inputs = AttentionInputs(
        query=empty(B, H, rows, head_size, kind=floating),
        key=empty(B, Hk, rows, head_size, kind=floating),
        value=empty(B, Hk, rows, head_size, kind=floating),
        mask=empty(B, 1, rows, rows, kind=torch.bool) if masked else None,
        bias=empty(1, H, rows, rows, kind=floating) if masked else None,
        alibi_slopes=empty(H) if masked else None,
        query_lengths=lengths,
        key_lengths=lengths,
        query_offsets=None,
        key_offsets=None,
        block_mask=(
            [lists, empty(9, 128, 4, kind=torch.int32), lists, counts, lists, counts]
            if everything
            else []
        ),
        seed=empty(1, kind=torch.int64) if everything else None,
        left=500 if everything else -1,
        right=0,
        align_lower_right=everything,
        scale=0.1,
        softcap=30.0 if everything else 0.0,
        activation=0,
        dropout_p=0.1 if everything else 0.0,
        max_queries=rows,
        max_keys=rows,
    )
    if forward_launch is not None:
        chosen = triton_launches._parsed(forward_launch)
        backend.launches_for = lambda *_: (chosen,)
        try:
            backend.forward(inputs)
        finally:
            backend.launches_for = triton_launches.launches_for
        return
    output, lse = empty(B, H, rows, head_size, kind=floating), empty(B, H, rows)
    backend.forward(inputs)
    backend.backward(output, lse if everything else None, inputs, output, lse, masked)
