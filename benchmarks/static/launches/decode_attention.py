"""``decode_attention``: head sizes, and the ways in which beams keep their keys."""

from __future__ import annotations

import torch

from fused_attn.ops.decode_attention import triton as backend

from . import call, empty, quick

CALLS = (
    quick("bfloat16", form="plain", D=128),
    quick("bfloat16", form="shared", D=128),
    quick("bfloat16", form="ancestry", D=64, everything=True, group=4, T=2),
    *(call(dtype, form="plain", D=D) for dtype in ("bfloat16", "float32") for D in (64, 80, 256)),
    call("float32", form="plain", D=128),
    call("float32", form="shared", D=128),
    call("float32", form="ancestry", D=64, everything=True, group=4, T=2),
    *(
        call(dtype, **arguments)
        for dtype in ("bfloat16", "float32")
        for arguments in (
            {"form": "plain", "D": 128, "T": 4},
            {"form": "shared", "D": 64},
            {"form": "shared", "D": 256, "group": 8},
            {"form": "ancestry", "D": 64},
            {"form": "plain", "D": 64, "everything": True},
        )
    ),
)
# Dynamic shared memory of the CUDA kernels in C++, by what an instance's name begins with.
CUDA_SHARED = {"product_kernel<{T}, {D}>": "decode_attention::shared_bytes<{T}, 16, {D}>({D})"} | {
    f"fp32_kernel<{n}, {{D}}>": f"decode_attention::shared_bytes<float, {n}, {{D}}>({{D}})"
    for n in (1, 4, 8)
}


def launch(
    dtype: str, form: str, D: int, T: int = 1, group: int = 1, everything: bool = False
) -> None:
    """In splits, as on a GPU of 128 multiprocessors.

    Args:
        dtype: Of query, key and value.
        form: Each query has keys of its own (``plain``), beams share theirs (``shared``), or
            follow an ``ancestry``.
        D: Head size.
        T: Queries of a row.
        group: Heads of queries that share one of keys.
        everything: A mask, ALiBi, a window and a softcap.
    """
    kind = getattr(torch, dtype)
    B, K, Hk, S = 4, 4, 8, 4096
    R = B if form == "plain" else B * K
    C = R if form == "ancestry" else B
    key, value = (empty(C, Hk, S, D, kind=kind) for _ in range(2))
    backend.multiprocessor_count = lambda _: 128
    backend.forward(
        empty(R, Hk * group, T, D, kind=kind),
        key,
        value,
        empty(R, kind=torch.int64),
        empty(B, K, S, kind=torch.int32) if form == "ancestry" else None,
        empty(R, 1, T, S, kind=torch.bool) if everything else None,
        empty(Hk * group) if everything else None,
        form != "shared",
        100 if everything else -1,
        0.1,
        20.0 if everything else 0.0,
    )
