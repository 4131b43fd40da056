"""Named cases of ``attention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .._cases import Case, Inputs, Part, columns_first, heads_last, large_logits, shared_keys
from .api import attention
from .arguments import window_bounds
from .block_mask import BLOCK, BlockMask

# Pairs of all heads: the reference in fp64, with its gradient, holds several numbers a pair.
_LARGEST_REFERENCE = 1 << 30


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
    key_heads: int | None = None
    """Hk. Default: H."""
    window: tuple[int | None, int | None] | None = None
    align: str = "upper_left"
    softcap: float | None = None
    alibi: bool = False
    activation: str = "softmax"
    dropout_p: float = 0.0
    packed: bool = False
    """The sequences, as long as the lengths say, lie one after the other."""
    sparse_tiles: tuple[int, ...] | None = None
    """Leading sizes of a block mask half of whose tiles are empty and some are full."""
    visible_share: float = 1.0
    """Of the pairs that lengths, causality and window leave, the share that a mask shows."""
    arrange: Callable[[Inputs], None] | None = None
    """Changes the inputs: strides, NaN out of sight, masks of a form."""

    @property
    def value_size(self) -> int:
        """Dv."""
        return self.D if self.Dv is None else self.Dv

    @property
    def grouped_heads(self) -> int:
        """Hk."""
        return self.H if self.key_heads is None else self.key_heads

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Inputs:
        """Normal tensors, uniform masks, then ``arrange``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        B, H, T, S = self.B, self.H, self.T, self.S
        Hk = self.grouped_heads
        inputs: Inputs = {
            "query": normal(B, H, T, self.D).to(device, dtype),
            "key": normal(B, Hk, S, self.D).to(device, dtype),
            "value": normal(B, Hk, S, self.value_size).to(device, dtype),
            "is_causal": self.is_causal,
            "scale": self.scale,
        }
        for name, default in (
            ("window", None),
            ("align", "upper_left"),
            ("softcap", None),
            ("activation", "softmax"),
            ("dropout_p", 0.0),
        ):
            if getattr(self, name) != default:
                inputs[name] = getattr(self, name)
        if self.dropout_p > 0.0:
            inputs["seed"] = torch.tensor([2**40 + 17], device=device)
        if self.alibi:
            # Geometric, as in the paper.
            powers = torch.arange(1, H + 1, dtype=torch.float32) * (-8.0 / H)
            inputs["alibi_slopes"] = torch.exp2(powers).to(device)
        if self.sparse_tiles is not None:
            inputs["block_mask"] = BlockMask.from_mask(self._tiled_mask(generator)).to(device)
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
        if self.packed:
            _pack(inputs)
        return inputs

    def _tiled_mask(self, generator: torch.Generator) -> Tensor:
        """Bool ``[*sparse_tiles, T, S]``: tiles of 64 x 64 are empty, full or random."""
        assert self.sparse_tiles is not None
        rows, columns = -(-self.T // 64), -(-self.S // 64)
        draw = torch.rand((*self.sparse_tiles, rows, columns), generator=generator)
        draw = draw.repeat_interleave(64, dim=-2).repeat_interleave(64, dim=-1)
        draw = draw[..., : self.T, : self.S]
        return (draw > 0.6) | ((draw > 0.5) & (torch.rand(draw.shape, generator=generator) < 0.5))

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Call ``attention``, with the lse where there is one."""
        if self.activation != "softmax":
            output = attention(**inputs, backend=backend)
            assert isinstance(output, Tensor)
            return (output,)
        output, lse = attention(**inputs, return_lse=True, backend=backend)
        return output, lse

    def part(self, inputs: Mapping[str, Any]) -> Part | None:
        """The last head of the last sentence, where the reference would need too much memory.

        It is where addresses are largest.
        """
        if self.B * self.H * self.T * self.S <= _LARGEST_REFERENCE:
            return None
        by_head = (self.bias_shape, self.sparse_tiles, self.grouped_heads != self.H, self.alibi)
        mask = inputs.get("mask")
        if (
            any(by_head)
            or self.packed
            or self.dropout_p > 0.0
            or (mask is not None and mask.dim() > 2)
        ):
            raise NotImplementedError(f"{self.name}: too large for the reference")

        def select(tensor: Tensor) -> Tensor:
            return tensor[-1:, -1:]

        chosen = dict(inputs)
        for name in ("query", "key", "value"):
            chosen[name] = select(inputs[name])
        for name in ("query_lengths", "key_lengths"):
            if name in inputs:
                chosen[name] = inputs[name][-1:]
        rows = (self.B, self.H, self.T)
        return Part(chosen, ((*rows, self.value_size), rows), select)

    def pairs(self) -> int:
        """Pairs of a query and a key that take part."""
        left, right = window_bounds(self.is_causal, self.window)
        total = 0
        for b in range(self.B):
            rows = self.T if self.query_lengths is None else self.query_lengths[b]
            keys = self.S if self.key_lengths is None else self.key_lengths[b]
            diagonal = torch.arange(rows) + (keys - rows if self.align == "lower_right" else 0)
            first = diagonal - left if left >= 0 else torch.zeros_like(diagonal)
            last = diagonal + right if right >= 0 else torch.full_like(diagonal, keys - 1)
            total += int((last.clamp(max=keys - 1) - first.clamp(min=0) + 1).clamp(min=0).sum())
        return round(total * self.H * self.visible_share)

    def flops(self, backward: bool = False) -> int:
        """Two products forward, five backward, of 2 operations a pair and column."""
        D, Dv = self.D, self.value_size
        return 2 * self.pairs() * (3 * D + 2 * Dv if backward else D + Dv)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Inputs and outputs once; backward also the output, the lse and four gradients."""
        queries, keys = self.B * self.H * self.T, self.B * self.H * self.S
        if self.packed:
            queries = self.H * sum(self.query_lengths or ())
            keys = self.H * sum(self.key_lengths or ())
        mask = math.prod(self.mask_shape or (0,))
        bias = math.prod(self.bias_shape or (0,)) * (4 if self.bias_fp32 else itemsize)
        keys = keys // self.H * self.grouped_heads if self.H > 0 else 0
        rows = queries * (self.D + self.value_size) + keys * (self.D + self.value_size)
        if backward:
            rows = 2 * rows + queries * self.value_size
            bias *= 2
        return rows * itemsize + queries * 4 + mask + bias


# --- arrangements -------------------------------------------------------------------------------


def _expanded_pairs(inputs: Inputs) -> None:
    shape = (*inputs["query"].shape[:3], inputs["key"].size(2))
    for name in ("mask", "bias"):
        inputs[name] = inputs[name].expand(shape)


def _transposed_pairs(inputs: Inputs) -> None:
    for name in ("mask", "bias"):
        inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)


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


def _slopes_of_sentences(inputs: Inputs) -> None:
    slopes = inputs["alibi_slopes"]
    factors = torch.arange(1, inputs["query"].size(0) + 1).to(slopes)
    inputs["alibi_slopes"] = slopes * factors[:, None]


def _nan_behind_grouped_mask(inputs: Inputs) -> None:
    # A key is out of sight if no head of its group looks at it.
    inputs["mask"][..., ::3] = False
    heads = inputs["key"].size(1)
    seen = inputs["mask"].unflatten(1, (heads, -1)).any(dim=2)[:, :, 0]  # [B, Hk, S]
    inputs["key"][~seen] = math.nan
    inputs["value"][~seen] = -math.inf


def _mask_in_blocks(inputs: Inputs) -> None:
    # Empty, full and mixed blocks, and whole rows and columns of empty ones.
    mask = inputs["mask"]
    mask[:64, 128:] = False
    mask[128:192, :256] = True
    mask[192:256] = False
    mask[:, 320:384] = False


def _half_of_the_blocks(inputs: Inputs) -> None:
    # A chessboard of 64 x 64 as a boolean mask.
    T, S = inputs["mask"].shape
    t, s = torch.arange(T)[:, None] // 64, torch.arange(S) // 64
    inputs["mask"] = ((t + s) % 2 == 0).to(inputs["mask"].device)


def _half_of_the_tiles(inputs: Inputs) -> None:
    # A chessboard of 128 x 128 as a block mask.
    T, S = inputs.pop("mask").shape
    device = inputs["query"].device
    inputs["block_mask"] = BlockMask.from_predicate(
        lambda b, h, t, s: (t // BLOCK + s // BLOCK) % 2 == 0, (1, 1, T, S), device
    )


def _bias_hides(inputs: Inputs) -> None:
    bias = inputs["bias"]
    bias[..., ::3] = -math.inf
    bias[..., 2, :] = -math.inf


def _falling_bias(inputs: Inputs) -> None:
    # Logits rise from tile to tile, so that every tile rescales what was summed before it.
    S = inputs["bias"].size(-1)
    inputs["bias"] = inputs["bias"] + torch.arange(S).to(inputs["bias"]) * (48.0 / S)


def _pack(inputs: Inputs) -> None:
    # [B, H, T, D] to [N, H, D], without what lies behind the lengths.
    for side, names in (("query", ("query",)), ("key", ("key", "value"))):
        lengths = inputs.pop(f"{side}_lengths")
        inputs[f"{side}_offsets"] = F.pad(lengths.cumsum(0), (1, 0))
        inputs["max_queries" if side == "query" else "max_keys"] = inputs[side].size(2)
        for name in names:
            inputs[name] = torch.cat(
                [rows[:, :n].transpose(0, 1) for rows, n in zip(inputs[name], lengths, strict=True)]
            )


_FP32 = (torch.float32,)
_TWO = (torch.float32, torch.bfloat16)

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
        name="large_logits", kind="edge", B=1, H=2, T=40, S=300, D=32, arrange=large_logits
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
        name="columns_first", kind="edge", B=2, H=2, T=18, S=35, D=16, arrange=columns_first
    ),
    AttentionCase(name="shared_keys", kind="edge", B=2, H=4, T=18, S=35, D=16, arrange=shared_keys),
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
        arrange=heads_last,
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
    AttentionCase(
        name="gradcheck_logits",
        kind="edge",
        B=2,
        H=2,
        T=4,
        S=5,
        D=3,
        Dv=2,
        key_heads=1,
        gradcheck=True,
        window=(2, 1),
        align="lower_right",
        query_lengths=(4, 3),
        key_lengths=(5, 4),
        softcap=1.5,
        alibi=True,
        dropout_p=0.3,
    ),
    AttentionCase(
        name="gradcheck_sigmoid",
        kind="edge",
        B=1,
        H=2,
        T=3,
        S=4,
        D=3,
        gradcheck=True,
        activation="sigmoid",
        bias_shape=(2, 1, 4),
        is_causal=True,
    ),
    AttentionCase(
        name="lower_right",
        kind="edge",
        B=3,
        H=2,
        T=20,
        S=75,
        D=16,
        is_causal=True,
        align="lower_right",
        key_lengths=(75, 11, 40),
    ),
    AttentionCase(
        name="lower_right_longer_queries",
        kind="edge",
        B=2,
        H=1,
        T=140,
        S=40,
        D=16,
        is_causal=True,
        align="lower_right",
        query_lengths=(140, 33),
        key_lengths=(40, 39),
        dtypes=_TWO,
    ),
    AttentionCase(
        name="window", kind="edge", B=1, H=2, T=90, S=110, D=16, window=(7, 12), dtypes=_TWO
    ),
    AttentionCase(
        name="window_of_one",
        kind="edge",
        B=1,
        H=1,
        T=300,
        S=300,
        D=8,
        window=(0, 0),
        dtypes=_FP32,
    ),
    AttentionCase(
        name="window_several_tiles",
        kind="edge",
        B=1,
        H=1,
        T=520,
        S=600,
        D=16,
        window=(100, None),
        is_causal=True,
        align="lower_right",
        dtypes=_TWO,
    ),
    AttentionCase(
        name="window_lengths",
        kind="edge",
        B=3,
        H=2,
        T=50,
        S=60,
        D=16,
        window=(None, 3),
        align="lower_right",
        query_lengths=(50, 0, 13),
        key_lengths=(21, 60, 0),
        arrange=_nan_behind_lengths,
    ),
    AttentionCase(name="softcap", kind="edge", B=1, H=2, T=20, S=40, D=16, softcap=2.0),
    AttentionCase(
        name="softcap_large_logits",
        kind="edge",
        B=1,
        H=2,
        T=20,
        S=40,
        D=16,
        softcap=30.0,
        arrange=large_logits,
    ),
    # Logits near 0 and few of them: the lse has the error of a tanh, times the softcap. Most of the
    # gradients are 0, with a rounding of the difference that is: in fp32 more than a budget of the
    # others' size.
    AttentionCase(
        name="softcap_few_keys",
        kind="edge",
        dtypes=(torch.float16, torch.bfloat16),
        B=3,
        H=2,
        T=4,
        S=8,
        D=1,
        Dv=40,
        key_heads=1,
        query_lengths=(0, 0, 4),
        key_lengths=(0, 0, 2),
        packed=True,
        mask_shape=(3, 1, 4, 8),
        is_causal=True,
        window=(None, 108),
        softcap=20.0,
        alibi=True,
        scale=-0.1,
    ),
    AttentionCase(
        name="alibi",
        kind="edge",
        B=2,
        H=3,
        T=50,
        S=70,
        D=16,
        alibi=True,
        is_causal=True,
        align="lower_right",
        key_lengths=(70, 33),
    ),
    AttentionCase(
        name="alibi_both_sides",
        kind="edge",
        B=2,
        H=2,
        T=40,
        S=30,
        D=8,
        alibi=True,
        arrange=_slopes_of_sentences,
        dtypes=_TWO,
    ),
    AttentionCase(
        name="grouped_heads",
        kind="edge",
        B=2,
        H=6,
        T=18,
        S=35,
        D=16,
        key_heads=2,
        is_causal=True,
        key_lengths=(35, 9),
        bias_shape=(6, 18, 35),
    ),
    AttentionCase(
        name="grouped_to_one",
        kind="edge",
        B=2,
        H=4,
        T=9,
        S=150,
        D=24,
        Dv=8,
        key_heads=1,
        mask_shape=(2, 4, 1, 150),
        arrange=_nan_behind_grouped_mask,
        dtypes=_TWO,
    ),
    AttentionCase(
        name="sigmoid",
        kind="edge",
        B=2,
        H=2,
        T=20,
        S=40,
        D=16,
        activation="sigmoid",
        mask_shape=(2, 1, 20, 40),
        bias_shape=(1,),
    ),
    AttentionCase(
        name="sigmoid_nan_behind_lengths",
        kind="edge",
        B=3,
        H=2,
        T=21,
        S=35,
        D=16,
        activation="sigmoid",
        query_lengths=(21, 13, 0),
        key_lengths=(18, 35, 7),
        arrange=_nan_behind_lengths,
        dtypes=_TWO,
    ),
    AttentionCase(
        name="relu",
        kind="edge",
        B=2,
        H=2,
        T=20,
        S=40,
        D=16,
        activation="relu",
        is_causal=True,
        bias_shape=(2, 20, 40),
    ),
    AttentionCase(
        name="relu_that_hides",
        kind="edge",
        B=2,
        H=2,
        T=9,
        S=17,
        D=8,
        activation="relu",
        bias_shape=(1, 2, 9, 17),
        arrange=_bias_hides,
        dtypes=_FP32,
    ),
    AttentionCase(name="dropout", kind="edge", B=2, H=2, T=20, S=37, D=16, dropout_p=0.3),
    AttentionCase(
        name="dropout_sigmoid",
        kind="edge",
        B=1,
        H=2,
        T=20,
        S=37,
        D=16,
        dropout_p=0.5,
        activation="sigmoid",
        bias_shape=(20, 37),
        dtypes=_TWO,
    ),
    AttentionCase(
        name="dropout_several_tiles",
        kind="edge",
        B=1,
        H=2,
        T=150,
        S=301,
        D=8,
        dropout_p=0.1,
        is_causal=True,
        key_heads=1,
        dtypes=_TWO,
    ),
    AttentionCase(
        name="sparse_tiles",
        kind="edge",
        B=2,
        H=2,
        T=200,
        S=300,
        D=16,
        sparse_tiles=(2, 1),
    ),
    AttentionCase(
        name="sparse_tiles_by_head",
        kind="edge",
        B=1,
        H=2,
        T=400,
        S=270,
        D=8,
        sparse_tiles=(1, 2),
        is_causal=True,
        bias_shape=(400, 1),
        dtypes=_TWO,
    ),
    AttentionCase(
        name="mask_in_blocks",
        kind="edge",
        B=1,
        H=2,
        T=300,
        S=400,
        D=8,
        mask_shape=(300, 400),
        arrange=_mask_in_blocks,
        dtypes=_TWO,
    ),
    AttentionCase(
        name="packed",
        kind="edge",
        B=4,
        H=2,
        T=40,
        S=50,
        D=16,
        Dv=24,
        packed=True,
        query_lengths=(13, 0, 40, 1),
        key_lengths=(50, 9, 0, 33),
    ),
    AttentionCase(
        name="packed_everything",
        kind="edge",
        B=3,
        H=4,
        T=40,
        S=50,
        D=16,
        packed=True,
        key_heads=2,
        is_causal=True,
        window=(30, None),
        align="lower_right",
        query_lengths=(33, 40, 5),
        key_lengths=(50, 41, 23),
        bias_shape=(4, 40, 50),
        mask_shape=(3, 1, 1, 50),
        dropout_p=0.2,
        alibi=True,
        softcap=5.0,
        dtypes=_TWO,
    ),
    AttentionCase(
        name="everything_at_once",
        kind="edge",
        B=2,
        H=4,
        T=145,
        S=161,
        D=24,
        Dv=40,
        key_heads=2,
        is_causal=True,
        window=(120, 4),
        align="lower_right",
        query_lengths=(145, 120),
        key_lengths=(133, 161),
        mask_shape=(2, 1, 145, 161),
        bias_shape=(2, 1, 145, 161),
        sparse_tiles=(1, 4),
        softcap=4.0,
        alibi=True,
        dropout_p=0.25,
        scale=0.3,
        arrange=heads_last,
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
        arrange=heads_last,
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
        arrange=heads_last,
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
        name="training_decoder",
        kind="typical",
        B=2,
        H=4,
        T=32,
        S=32,
        D=32,
        is_causal=True,
        key_lengths=(32, 19),
        dropout_p=0.1,
        arrange=heads_last,
    ),
    AttentionCase(
        name="speech_encoder",
        kind="typical",
        B=2,
        H=4,
        T=64,
        S=64,
        D=32,
        window=(16, 4),
        query_lengths=(64, 40),
        key_lengths=(64, 40),
    ),
    AttentionCase(
        name="grouped_decoder",
        kind="typical",
        B=2,
        H=4,
        T=24,
        S=24,
        D=32,
        key_heads=2,
        is_causal=True,
        alibi=True,
        softcap=20.0,
        activation="softmax",
    ),
    AttentionCase(
        name="graph",
        kind="typical",
        B=2,
        H=2,
        T=150,
        S=150,
        D=16,
        sparse_tiles=(),
        dtypes=_TWO,
    ),
    AttentionCase(
        name="packed_encoder",
        kind="typical",
        B=3,
        H=4,
        T=32,
        S=32,
        D=32,
        packed=True,
        query_lengths=(32, 11, 20),
        key_lengths=(32, 11, 20),
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
    AttentionCase(
        name="blocks_1024",
        kind="benchmark",
        dtypes=_FP32,
        B=8,
        H=8,
        T=1024,
        S=1024,
        D=64,
        mask_shape=(1024, 1024),
        visible_share=0.5,
        arrange=_half_of_the_blocks,
    ),
    AttentionCase(
        name="block_mask_1024",
        kind="benchmark",
        dtypes=_FP32,
        B=8,
        H=8,
        T=1024,
        S=1024,
        D=64,
        mask_shape=(1024, 1024),
        visible_share=0.5,
        arrange=_half_of_the_tiles,
    ),
    AttentionCase(
        name="window_2048",
        kind="benchmark",
        dtypes=_FP32,
        B=2,
        H=8,
        T=2048,
        S=2048,
        D=64,
        window=(64, 63),
    ),
    AttentionCase(
        name="alibi_512",
        kind="benchmark",
        dtypes=_FP32,
        B=8,
        H=8,
        T=512,
        S=512,
        D=64,
        is_causal=True,
        alibi=True,
    ),
    AttentionCase(
        name="dropout_512",
        kind="benchmark",
        dtypes=_FP32,
        B=8,
        H=8,
        T=512,
        S=512,
        D=64,
        dropout_p=0.1,
    ),
    AttentionCase(
        name="grouped_512",
        kind="benchmark",
        dtypes=_FP32,
        B=8,
        H=8,
        T=512,
        S=512,
        D=64,
        key_heads=2,
    ),
    AttentionCase(
        name="packed_512",
        kind="benchmark",
        dtypes=_FP32,
        B=8,
        H=8,
        T=512,
        S=512,
        D=64,
        packed=True,
        query_lengths=(512, 77, 130, 301, 256, 19, 400, 198),
        key_lengths=(512, 77, 130, 301, 256, 19, 400, 198),
    ),
    # The shapes of published figures: 16k tokens a batch, width 2048.
    *(
        AttentionCase(
            name=f"{form}_{length}_D{D}",
            kind="benchmark",
            dtypes=(torch.bfloat16,),
            gpu_only=True,
            B=max(1, 16384 // length),
            H=2048 // D,
            T=length,
            S=length,
            D=D,
            is_causal=form == "causal",
            query_lengths=(length // 2,) * max(1, 16384 // length) if form == "padded" else None,
            key_lengths=(length // 2,) * max(1, 16384 // length) if form == "padded" else None,
            bias_shape=(2048 // D, length, length) if form == "bias" else None,
            mask_shape=(length, length) if form == "blocks" else None,
            visible_share=0.5 if form == "blocks" else 1.0,
            arrange=_half_of_the_tiles if form == "blocks" else None,
        )
        for D in (64, 128)
        for form, lengths in (
            ("full", (512, 2048, 8192, 16384)),
            ("causal", (512, 2048, 8192, 16384)),
            ("padded", (2048,)),
            ("bias", (2048,)),
            ("blocks", (8192,)),
        )
        for length in lengths
    ),
    AttentionCase(name="decoding_512", kind="benchmark", dtypes=_FP32, B=16, H=8, T=1, S=512, D=64),
)
