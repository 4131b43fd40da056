"""The ``triton`` backend: launchers. The kernels are in ``triton_kernels.py``, loaded on use."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import head_reasons
from .._triton import ceil_div, device_guard, multiprocessor_count, next_power_of_2, target

# Queries of a tile at most.
_MAX_BLOCK = 32
# Elements of a tile of keys at most, in registers.
_TILE_ELEMENTS = 4096
# The fewest keys that make a split worth its launch and its merge.
_MIN_SPLIT = 256
_MAX_SPLITS = 32
# Programs that a multiprocessor should have to hide the time that memory takes.
_PROGRAMS_PER_MULTIPROCESSOR = 4


def unsupported_reasons(query: Tensor, value: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    return head_reasons(query, value)


def forward(
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
) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    from .triton_kernels import decode_attention_kernel, decode_attention_merge_kernel

    R, H, T, D = query.shape
    C, Hk, S, Dv = value.shape
    output = query.new_empty((R, H, T, Dv))
    lse = query.new_empty((R, H, T), dtype=torch.float32)
    if lse.numel() == 0:
        return output, lse
    query, key, value = (_contiguous_columns(t) for t in (query, key, value))
    beams = R // C if ancestry is None else ancestry.size(1)
    num_queries = (beams if ancestry is None else 1) * (H // Hk) * T
    # Matrix products take at least 16 rows.
    block_m = 1 if num_queries == 1 else min(max(16, next_power_of_2(num_queries)), _MAX_BLOCK)
    block_d, block_dv = max(16, next_power_of_2(D)), max(16, next_power_of_2(Dv))
    # Products of fp32 run on the plain units, whose operands take registers.
    is_wide_product = block_m > 1 and query.dtype == torch.float32
    if is_wide_product:
        block_m = 16
    elements = _TILE_ELEMENTS // 2 if is_wide_product else _TILE_ELEMENTS
    block_n = min(max(elements // max(block_d, block_dv), 16), 64)
    blocks = ceil_div(num_queries, block_m)
    splits, keys_per_split = _split(S, C * Hk * blocks, block_n, multiprocessor_count(query))
    if splits > 1:
        partial = query.new_empty((splits, R, H, T, Dv), dtype=torch.float32)
        partial_lse = query.new_empty((splits, R, H, T), dtype=torch.float32)
    else:
        partial, partial_lse = output, lse
    with device_guard(query):
        decode_attention_kernel[(C * Hk, blocks, splits)](
            query,
            key,
            value,
            None if key_lengths is None else key_lengths.contiguous(),
            ancestry,
            # A bool is a byte, which loads without a conversion in every version.
            None if mask is None else mask.view(torch.uint8),
            None if alibi_slopes is None else alibi_slopes.contiguous(),
            partial,
            partial_lse,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *((0, 0, 0) if ancestry is None else ancestry.stride()),
            *_broadcast_strides(mask),
            num_queries,
            Hk,
            H // Hk,
            beams,
            1 if key_lengths is None else R // key_lengths.size(0),
            T,
            S,
            keys_per_split,
            R,
            window,
            scale,
            softcap,
            HAS_LENGTHS=key_lengths is not None,
            HAS_ANCESTRY=ancestry is not None,
            HAS_MASK=mask is not None,
            HAS_ALIBI=alibi_slopes is not None,
            HAS_WINDOW=window >= 0,
            HAS_SOFTCAP=softcap > 0.0,
            IS_CAUSAL=is_causal,
            HEAD_DIM=D,
            VALUE_DIM=Dv,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            num_warps=8 if is_wide_product else 4,
            num_stages=2,
            **target().register_options(255),
        )
        if splits > 1:
            decode_attention_merge_kernel[(R * H * T,)](
                partial,
                partial_lse,
                output,
                lse,
                R * H * T,
                splits,
                VALUE_DIM=Dv,
                BLOCK_S=next_power_of_2(splits),
                BLOCK_DV=block_dv,
                num_warps=4,
            )
    return output, lse


def _split(keys: int, programs: int, block_n: int, multiprocessors: int) -> tuple[int, int]:
    """How many splits fill the GPU, and the keys of each: whole tiles, and no split without any."""
    wanted = ceil_div(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs)
    splits = max(1, min(wanted, keys // _MIN_SPLIT, _MAX_SPLITS))
    keys_per_split = ceil_div(ceil_div(max(keys, 1), splits), block_n) * block_n
    return ceil_div(max(keys, 1), keys_per_split), keys_per_split


def _contiguous_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.size(3) <= 1 or tensor.stride(3) == 1 else tensor.contiguous()


def _broadcast_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Strides over ``[R, H, T, S]``: 0 where the mask is broadcast."""
    if mask is None:
        return (0, 0, 0, 0)
    own = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    return (0,) * (4 - len(own)) + tuple(own)
