"""Named cases of ``attention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._cases import Case
from .api import attention

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Normal queries, keys and values, and what ``arrange`` makes of the call."""

    op: ClassVar[str] = "attention"
    differentiable: ClassVar[tuple[str, ...]] = ("query", "key", "value", "bias")

    B: int
    H: int
    T: int
    S: int
    D: int
    Dv: int | None = None
    """Default: D."""
    is_causal: bool = False
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    mask_shape: tuple[int, ...] | None = None
    """The mask shows about two thirds of what it has a say in."""
    bias_shape: tuple[int, ...] | None = None
    bias_fp32: bool = False
    """The bias is fp32 whatever the other tensors are."""
    scale: float | None = None
    arrange: Callable[[Inputs], None] | None = None
    """Changes the inputs: strides, NaN out of sight, masks of a form."""

    @property
    def value_size(self) -> int:
        """Dv."""
        return self.D if self.Dv is None else self.Dv

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Inputs:
        """Normal tensors, uniform masks, then ``arrange``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        B, H, T, S = self.B, self.H, self.T, self.S
        inputs: Inputs = {
            "query": normal(B, H, T, self.D).to(device, dtype),
            "key": normal(B, H, S, self.D).to(device, dtype),
            "value": normal(B, H, S, self.value_size).to(device, dtype),
            "is_causal": self.is_causal,
            "scale": self.scale,
        }
        if self.mask_shape is not None:
            shown = torch.rand(self.mask_shape, generator=generator) < 0.66
            inputs["mask"] = shown.to(device)
        if self.bias_shape is not None:
            wide = self.bias_fp32 and dtype != torch.float64
            bias = normal(*self.bias_shape).bfloat16()  # the same numbers in every dtype
            inputs["bias"] = bias.to(device, torch.float32 if wide else dtype)
        for name in ("query_lengths", "key_lengths"):
            lengths = getattr(self, name)
            if lengths is not None:
                inputs[name] = torch.tensor(lengths, device=device)
        if self.arrange is not None:
            self.arrange(inputs)
        return inputs

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Call ``attention``, with the lse."""
        output, lse = attention(**inputs, return_lse=True, backend=backend)
        return output, lse

    def pairs(self) -> int:
        """Pairs of a query and a key that lengths and causality let take part."""
        total = 0
        for b in range(self.B):
            rows = self.T if self.query_lengths is None else self.query_lengths[b]
            keys = self.S if self.key_lengths is None else self.key_lengths[b]
            if self.is_causal:
                triangle = min(rows, keys)
                total += triangle * (triangle + 1) // 2 + (rows - triangle) * keys
            else:
                total += rows * keys
        return total * self.H

    def flops(self, backward: bool = False) -> int:
        """Two products forward, five backward, of 2 operations a pair and column."""
        D, Dv = self.D, self.value_size
        return 2 * self.pairs() * (3 * D + 2 * Dv if backward else D + Dv)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Inputs and outputs once; backward also the output, the lse and four gradients."""
        queries, keys = self.B * self.H * self.T, self.B * self.H * self.S
        mask = math.prod(self.mask_shape or (0,))
        bias = math.prod(self.bias_shape or (0,)) * (4 if self.bias_fp32 else itemsize)
        rows = queries * (self.D + self.value_size) + keys * (self.D + self.value_size)
        if backward:
            rows = 2 * rows + queries * self.value_size
            bias *= 2
        return rows * itemsize + queries * 4 + mask + bias


# --- arrangements -------------------------------------------------------------------------------


def _heads_last(inputs: Inputs) -> None:
    # As a projection to [B, T, H * D] gives them.
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)


def _columns_first(inputs: Inputs) -> None:
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].transpose(2, 3).contiguous().transpose(2, 3)


def _shared_keys(inputs: Inputs) -> None:
    # One head of keys and values for all, as in multi-query attention, without copies.
    for name in ("key", "value"):
        inputs[name] = inputs[name][:, :1].expand_as(inputs[name])


def _expanded_pairs(inputs: Inputs) -> None:
    shape = (*inputs["query"].shape[:3], inputs["key"].size(2))
    for name in ("mask", "bias"):
        inputs[name] = inputs[name].expand(shape)


def _transposed_pairs(inputs: Inputs) -> None:
    for name in ("mask", "bias"):
        inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)


def _large_logits(inputs: Inputs) -> None:
    inputs["query"] = inputs["query"] * 64.0


def _nan_behind_lengths(inputs: Inputs) -> None:
    for b, length in enumerate(inputs["query_lengths"].tolist()):
        inputs["query"][b, :, length:] = math.nan
    for b, length in enumerate(inputs["key_lengths"].tolist()):
        inputs["key"][b, :, length:] = math.nan
        inputs["value"][b, :, length:] = math.inf


def _nan_behind_key_mask(inputs: Inputs) -> None:
    hidden = ~inputs["mask"].expand(*inputs["key"].shape[:2], 1, -1)[:, :, 0]  # [B, H, S]
    inputs["key"][hidden] = math.nan
    inputs["value"][hidden] = -math.inf


def _last_query_sees_nothing(inputs: Inputs) -> None:
    inputs["mask"][..., -1, :] = False
    inputs["mask"][..., 0, :] = False


def _nothing_visible(inputs: Inputs) -> None:
    inputs["mask"][:] = False


def _bias_hides(inputs: Inputs) -> None:
    bias = inputs["bias"]
    bias[..., ::3] = -math.inf
    bias[..., 2, :] = -math.inf


def _falling_bias(inputs: Inputs) -> None:
    # Logits rise from tile to tile, so that every tile rescales what was summed before it.
    S = inputs["bias"].size(-1)
    inputs["bias"] = inputs["bias"] + torch.arange(S).to(inputs["bias"]) * (48.0 / S)


_FP32 = (torch.float32,)

CASES: tuple[AttentionCase, ...] = (
    # --- edge -----------------------------------------------------------------------------------
    AttentionCase(name="one_pair", kind="edge", B=1, H=1, T=1, S=1, D=1),
    AttentionCase(
        name="gradcheck",
        kind="edge",
        B=2,
        H=2,
        T=3,
        S=4,
        D=3,
        Dv=2,
        gradcheck=True,
        bias_shape=(1, 2, 3, 4),
        is_causal=True,
        key_lengths=(4, 3),
    ),
    AttentionCase(
        name="gradcheck_empty_row",
        kind="edge",
        B=1,
        H=2,
        T=5,
        S=6,
        D=4,
        gradcheck=True,
        mask_shape=(1, 1, 5, 6),
        bias_shape=(2, 1, 6),
        arrange=_last_query_sees_nothing,
    ),
    AttentionCase(name="empty_batch", kind="edge", B=0, H=2, T=3, S=4, D=8),
    AttentionCase(name="no_queries", kind="edge", B=2, H=2, T=0, S=4, D=8),
    AttentionCase(name="no_keys", kind="edge", B=2, H=2, T=3, S=0, D=8),
    AttentionCase(
        name="no_keys_with_bias", kind="edge", B=2, H=2, T=3, S=0, D=8, bias_shape=(2, 1, 3, 1)
    ),
    AttentionCase(name="primes", kind="edge", B=2, H=3, T=37, S=53, D=13, Dv=29),
    AttentionCase(name="primes_causal", kind="edge", B=1, H=3, T=59, S=43, D=17, is_causal=True),
    AttentionCase(
        name="causal_longer_keys", kind="edge", B=1, H=2, T=19, S=71, D=16, is_causal=True
    ),
    AttentionCase(name="head_256", kind="edge", B=1, H=1, T=33, S=47, D=256, Dv=251),
    AttentionCase(name="narrow_values", kind="edge", B=1, H=2, T=30, S=40, D=64, Dv=1),
    AttentionCase(
        name="several_tiles",
        kind="edge",
        B=1,
        H=1,
        T=131,
        S=587,
        D=24,
        dtypes=_FP32,
        is_causal=False,
    ),
    AttentionCase(
        name="several_tiles_causal",
        kind="edge",
        B=1,
        H=1,
        T=401,
        S=401,
        D=16,
        is_causal=True,
    ),
    AttentionCase(
        name="rescaled_tiles",
        kind="edge",
        B=1,
        H=1,
        T=20,
        S=600,
        D=16,
        bias_shape=(600,),
        bias_fp32=True,
        arrange=_falling_bias,
    ),
    AttentionCase(
        name="large_logits", kind="edge", B=1, H=2, T=40, S=300, D=32, arrange=_large_logits
    ),
    AttentionCase(name="negative_scale", kind="edge", B=1, H=2, T=9, S=21, D=8, scale=-0.7),
    AttentionCase(name="zero_scale", kind="edge", B=1, H=2, T=9, S=21, D=8, scale=0.0),
    AttentionCase(
        name="nan_behind_lengths",
        kind="edge",
        B=3,
        H=2,
        T=21,
        S=35,
        D=16,
        query_lengths=(21, 13, 0),
        key_lengths=(18, 35, 7),
        arrange=_nan_behind_lengths,
    ),
    AttentionCase(
        name="nan_behind_causal_lengths",
        kind="edge",
        B=3,
        H=2,
        T=50,
        S=40,
        D=16,
        is_causal=True,
        query_lengths=(50, 13, 1),
        key_lengths=(18, 40, 0),
        arrange=_nan_behind_lengths,
    ),
    AttentionCase(
        name="nan_behind_key_mask",
        kind="edge",
        B=3,
        H=2,
        T=21,
        S=35,
        D=16,
        mask_shape=(3, 1, 1, 35),
        arrange=_nan_behind_key_mask,
    ),
    AttentionCase(
        name="nan_behind_key_mask_by_head",
        kind="edge",
        B=2,
        H=3,
        T=1,
        S=35,
        D=16,
        mask_shape=(3, 1, 35),
        arrange=_nan_behind_key_mask,
    ),
    AttentionCase(
        name="rows_that_see_nothing",
        kind="edge",
        B=2,
        H=2,
        T=14,
        S=26,
        D=16,
        mask_shape=(2, 1, 14, 26),
        arrange=_last_query_sees_nothing,
    ),
    AttentionCase(
        name="nothing_visible",
        kind="edge",
        B=2,
        H=2,
        T=5,
        S=6,
        D=16,
        mask_shape=(1,),
        arrange=_nothing_visible,
    ),
    AttentionCase(name="mask_of_queries", kind="edge", B=2, H=2, T=9, S=6, D=8, mask_shape=(9, 1)),
    AttentionCase(
        name="bias_that_hides",
        kind="edge",
        B=2,
        H=2,
        T=9,
        S=17,
        D=8,
        bias_shape=(1, 2, 9, 17),
        arrange=_bias_hides,
    ),
    AttentionCase(
        name="expanded_mask_and_bias",
        kind="edge",
        B=2,
        H=2,
        T=18,
        S=35,
        D=16,
        mask_shape=(2, 1, 1, 35),
        bias_shape=(2, 18, 1),
        arrange=_expanded_pairs,
    ),
    AttentionCase(
        name="transposed_mask_and_bias",
        kind="edge",
        B=2,
        H=2,
        T=18,
        S=35,
        D=16,
        mask_shape=(2, 1, 18, 35),
        bias_shape=(18, 35),
        arrange=_transposed_pairs,
    ),
    AttentionCase(
        name="columns_first", kind="edge", B=2, H=2, T=18, S=35, D=16, arrange=_columns_first
    ),
    AttentionCase(
        name="shared_keys", kind="edge", B=2, H=4, T=18, S=35, D=16, arrange=_shared_keys
    ),
    AttentionCase(
        name="everything",
        kind="edge",
        B=2,
        H=2,
        T=45,
        S=61,
        D=24,
        Dv=40,
        is_causal=True,
        query_lengths=(45, 20),
        key_lengths=(33, 61),
        mask_shape=(2, 1, 45, 61),
        bias_shape=(2, 45, 61),
        scale=0.3,
        arrange=_heads_last,
    ),
    AttentionCase(
        name="fp32_bias",
        kind="edge",
        B=2,
        H=2,
        T=12,
        S=20,
        D=16,
        bias_shape=(2, 12, 20),
        bias_fp32=True,
    ),
    # --- typical --------------------------------------------------------------------------------
    AttentionCase(name="encoder", kind="typical", B=2, H=4, T=32, S=32, D=32),
    AttentionCase(
        name="encoder_padded",
        kind="typical",
        B=2,
        H=4,
        T=32,
        S=32,
        D=32,
        query_lengths=(32, 11),
        key_lengths=(32, 11),
        arrange=_heads_last,
    ),
    AttentionCase(name="decoder", kind="typical", B=2, H=4, T=32, S=32, D=32, is_causal=True),
    AttentionCase(
        name="cross_attention",
        kind="typical",
        B=2,
        H=4,
        T=16,
        S=48,
        D=32,
        mask_shape=(2, 1, 1, 48),
        arrange=_heads_last,
    ),
    AttentionCase(
        name="relative_positions",
        kind="typical",
        B=2,
        H=4,
        T=32,
        S=32,
        D=32,
        bias_shape=(4, 32, 32),
    ),
    AttentionCase(
        name="decoding_step",
        kind="typical",
        B=4,
        H=4,
        T=1,
        S=40,
        D=32,
        key_lengths=(40, 7, 23, 1),
    ),
    # --- benchmark ------------------------------------------------------------------------------
    *(
        AttentionCase(
            name=f"{form}_{length}",
            kind="benchmark",
            dtypes=_FP32,
            B=8,
            H=8,
            T=length,
            S=length,
            D=64,
            is_causal=form == "causal",
            query_lengths=(length // 2,) * 8 if form == "padded" else None,
            key_lengths=(length // 2,) * 8 if form == "padded" else None,
        )
        for form in ("full", "causal", "padded")
        for length in (256, 512, 1024)
    ),
    AttentionCase(
        name="bias_512",
        kind="benchmark",
        dtypes=_FP32,
        B=8,
        H=8,
        T=512,
        S=512,
        D=64,
        bias_shape=(8, 512, 512),
    ),
    AttentionCase(name="decoding_512", kind="benchmark", dtypes=_FP32, B=16, H=8, T=1, S=512, D=64),
)
