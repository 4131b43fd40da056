"""Named cases of ``additive_attention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._cases import ELEMENTARY, Case, Inputs, columns_first, heads_last
from .api import additive_attention, additive_scores


@dataclass(frozen=True, kw_only=True)
class AdditiveAttentionCase(Case):
    """Normal projections, and what ``arrange`` makes of the call."""

    op: ClassVar[str] = "additive_attention"
    differentiable: ClassVar[tuple[str, ...]] = (
        "query",
        "key",
        "value",
        "score_weight",
        "features",
        "feature_weight",
    )

    B: int
    T: int
    S: int
    E: int
    D: int | None = None
    """Default: E. 0: only the scores are asked for."""
    H: int | None = None
    """None: without the dimension of heads."""
    F: int | None = None
    """None: no features."""
    scale: float = 1.0
    """Of queries and keys."""
    key_lengths: tuple[int, ...] | None = None
    mask_shape: tuple[int, ...] | None = None
    """The mask shows about two thirds of what it has a say in."""
    fp32_parameters: bool = False
    """The weights are fp32 whatever the other tensors are."""
    arrange: Callable[[Inputs], None] | None = None
    """Changes the inputs: strides, NaN out of sight, masks of a form."""

    @property
    def value_size(self) -> int:
        """D."""
        return self.E if self.D is None else self.D

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Inputs:
        """Normal tensors; score_weight in the size of ``torch.nn.Linear``'s, made normal."""

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        def parameter(*shape: int, scale: float) -> Tensor:
            # The same numbers in every dtype.
            weight = (torch.randn(shape, generator=generator) * scale).bfloat16()
            wide = self.fp32_parameters and dtype != torch.float64
            return weight.to(device, torch.float32 if wide else dtype)

        heads = () if self.H is None else (self.H,)
        E = self.E
        inputs: Inputs = {
            "query": normal(self.B, *heads, self.T, E, scale=self.scale),
            "key": normal(self.B, *heads, self.S, E, scale=self.scale),
            "score_weight": parameter(*heads, E, scale=1.0 / math.sqrt(E)),
        }
        if self.value_size > 0:
            inputs["value"] = normal(self.B, *heads, self.S, self.value_size)
        if self.F is not None:
            inputs["features"] = normal(self.B, *heads, self.T, self.S, self.F)
            inputs["feature_weight"] = parameter(
                *heads, self.F, E, scale=1.0 / math.sqrt(max(self.F, 1))
            )
        if self.mask_shape is not None:
            inputs["mask"] = (torch.rand(self.mask_shape, generator=generator) < 0.66).to(device)
        if self.key_lengths is not None:
            inputs["key_lengths"] = torch.tensor(self.key_lengths, device=device)
        if self.arrange is not None:
            self.arrange(inputs)
        return inputs

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Context and weights, or scores."""
        if self.value_size == 0:
            return (additive_scores(**inputs, backend=backend),)
        return additive_attention(**inputs, backend=backend)

    def _lengths(self) -> tuple[int, ...]:
        """Keys of each sentence."""
        return (self.S,) * self.B if self.key_lengths is None else self.key_lengths

    def pairs(self) -> int:
        """Pairs of a query and a key that the lengths leave."""
        return (self.H or 1) * self.T * sum(self._lengths())

    def flops(self, backward: bool = False) -> int:
        """The columns of all pairs, and products of 2 operations: values, and features.

        Backward two such products of the values and three of the features.
        """
        products = 2 * (self.value_size + (self.F or 0) * self.E)
        if backward:
            products = 4 * self.value_size + 6 * (self.F or 0) * self.E
        return self.pairs() * products + self.vector_flops(backward)

    def vector_flops(self, backward: bool = False) -> int:
        """What a pair and column cost at least, with ``tanh(q + k) = 1 - 2 / (1 + e^2q e^2k)``.

        The exponentials are of rows then, and a pair and column takes a multiply-add for the
        denominator and, forward, four operations to add its fraction to others over a common one.
        Backward it takes the reciprocal r itself, of which columns share one for three products
        each; 2 for r - r²; a product and two additions for the gradients of query and key; and a
        multiply-add for that of ``score_weight``. Or else, as with features or a single query, a
        tangent, its sum and a multiply-add; backward also its derivative 2, a product, two
        additions, and that multiply-add.
        """
        heads, direct = self.H or 1, ELEMENTARY + (8 if backward else 3)
        shared = 2 + 3 + 2 + 3 + 2 if backward else 2 + 4
        total = 0
        for length in self._lengths():
            pairs = self.T * length
            total += min(direct * pairs, shared * pairs + ELEMENTARY * (self.T + length))
        if self.F:
            total = direct * self.T * sum(self._lengths())
        return heads * self.E * total

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Inputs and outputs once; backward also the weights, the cotangents and the gradients.

        Behind a length nothing is read, but results are written.
        """
        heads, E, D = self.H or 1, self.E, self.value_size

        def rows(keys: int) -> int:
            return heads * (self.B * self.T * E + keys * (E + D) + self.T * keys * (self.F or 0))

        weights = 4 * heads * self.B * self.T * self.S
        context = heads * self.B * self.T * D * itemsize
        moved = rows(sum(self._lengths())) * itemsize + context + math.prod(self.mask_shape or (0,))
        if backward:
            return moved + rows(self.B * self.S) * itemsize + weights * (2 if D else 1)
        return moved + weights


# --- arrangements -------------------------------------------------------------------------------


def _nan_behind_lengths(inputs: Inputs) -> None:
    for b, length in enumerate(inputs["key_lengths"].tolist()):
        inputs["key"][b, ..., length:, :] = math.nan
        inputs["value"][b, ..., length:, :] = math.inf
        if "features" in inputs:
            inputs["features"][b, ..., length:, :] = math.nan


def _nan_behind_key_mask(inputs: Inputs) -> None:
    hidden = ~inputs["mask"].expand(*inputs["key"].shape[:2], 1, -1)[:, :, 0]  # [B, H, S]
    inputs["key"][hidden] = math.nan
    inputs["value"][hidden] = -math.inf


def _nan_in_hidden_features(inputs: Inputs) -> None:
    inputs["features"][~inputs["mask"].expand(inputs["features"].shape[:-1])] = math.nan


def _some_queries_see_nothing(inputs: Inputs) -> None:
    inputs["mask"][..., 0, :] = False
    inputs["mask"][..., -1, :] = False
    # Nor does anybody look at what they hold.
    inputs["query"][..., 0, :] = math.nan


def _nothing_visible(inputs: Inputs) -> None:
    inputs["mask"][:] = False


def _transposed_pairs(inputs: Inputs) -> None:
    inputs["mask"] = inputs["mask"].transpose(-1, -2).contiguous().transpose(-1, -2)
    inputs["features"] = inputs["features"].transpose(-1, -3).contiguous().transpose(-1, -3)


def _shared_keys(inputs: Inputs) -> None:
    # One head of keys and values, and one query, for all, without copies.
    for name in ("key", "value"):
        inputs[name] = inputs[name][:, :1].expand_as(inputs[name])
    inputs["query"] = inputs["query"][..., :1, :].expand_as(inputs["query"])


def _far_apart(inputs: Inputs) -> None:
    # Exponentials of the rows overflow, those of their sums do not.
    inputs["query"] = inputs["query"] + 60.0
    inputs["key"] = inputs["key"] - 60.0


def _opposite(inputs: Inputs) -> None:
    # Sums are small where neither of the numbers is.
    inputs["key"] = inputs["key"] * 0.01 - 2.0
    inputs["query"] = inputs["query"] * 0.01 + 2.0


def _one_large_column(inputs: Inputs) -> None:
    inputs["query"][..., 3] = 1000.0


_FP32 = (torch.float32,)
_TWO = (torch.float32, torch.bfloat16)


def _edge(name: str, B: int, T: int, S: int, E: int, **options: Any) -> AdditiveAttentionCase:
    return AdditiveAttentionCase(name=name, kind="edge", B=B, T=T, S=S, E=E, **options)


def _benchmark(name: str, B: int, T: int, S: int, E: int, **options: Any) -> AdditiveAttentionCase:
    return AdditiveAttentionCase(name=name, kind="benchmark", B=B, T=T, S=S, E=E, **options)


CASES: tuple[AdditiveAttentionCase, ...] = (
    AdditiveAttentionCase(
        name="typical", kind="typical", B=2, T=5, S=7, E=32, D=24, key_lengths=(7, 4)
    ),
    AdditiveAttentionCase(
        name="typical_features",
        kind="typical",
        B=2,
        H=2,
        T=3,
        S=6,
        E=20,
        F=4,
        mask_shape=(2, 1, 3, 6),
        fp32_parameters=True,
    ),
    AdditiveAttentionCase(
        name="typical_scores", kind="typical", B=2, T=4, S=9, E=40, D=0, key_lengths=(3, 9)
    ),
    _edge("one_pair", 1, 1, 1, 1),
    _edge("gradcheck", 2, 3, 4, 3, D=2, H=2, F=2, key_lengths=(4, 3), gradcheck=True),
    _edge("gradcheck_scores", 2, 3, 4, 3, D=0, mask_shape=(3, 4), gradcheck=True),
    _edge(
        "gradcheck_empty_row",
        2,
        4,
        3,
        2,
        H=1,
        mask_shape=(2, 1, 4, 3),
        key_lengths=(3, 0),
        gradcheck=True,
    ),
    _edge("empty_batch", 0, 3, 4, 8),
    _edge("no_queries", 2, 0, 4, 8),
    _edge("no_keys", 2, 3, 0, 8, H=2, F=2),
    _edge("no_keys_scores", 2, 3, 0, 8, D=0),
    _edge("primes", 3, 37, 53, 29, D=13),
    _edge("primes_features", 2, 7, 11, 37, D=5, H=3, F=3),
    _edge("wide", 1, 3, 5, 1027, D=515, dtypes=_TWO),
    _edge("many_keys", 1, 2, 301, 24, D=3, H=2, dtypes=_TWO),
    _edge("many_queries", 1, 97, 3, 16, D=1, dtypes=_TWO),
    *(_edge(f"one_query_{S}", 2, 1, S, 48, D=32) for S in (1, 19)),
    *(_edge(f"queries_{T}", 2, T, 13, 33, D=65, dtypes=_FP32) for T in (2, 3, 6, 33)),
    _edge("one_feature", 2, 3, 9, 32, F=1),
    _edge("no_features", 2, 3, 9, 32, F=0, dtypes=_FP32),
    _edge("scores_features", 2, 3, 9, 31, D=0, F=5, key_lengths=(9, 2)),
    _edge("empty_source", 3, 4, 6, 16, key_lengths=(6, 0, 2), arrange=_nan_behind_lengths),
    _edge(
        "empty_source_features",
        3,
        4,
        6,
        16,
        F=2,
        key_lengths=(0, 6, 5),
        arrange=_nan_behind_lengths,
    ),
    _edge(
        "nan_behind_key_mask",
        2,
        5,
        9,
        24,
        H=2,
        mask_shape=(2, 2, 1, 9),
        arrange=_nan_behind_key_mask,
    ),
    _edge(
        "nan_in_hidden_features",
        2,
        5,
        9,
        24,
        F=3,
        mask_shape=(2, 5, 9),
        arrange=_nan_in_hidden_features,
    ),
    _edge("mask", 2, 37, 21, 40, mask_shape=(37, 21)),
    _edge("mask_of_queries", 2, 6, 5, 18, H=2, mask_shape=(6, 1)),
    _edge("rows_hidden", 2, 6, 5, 18, mask_shape=(2, 6, 5), arrange=_some_queries_see_nothing),
    _edge(
        "rows_hidden_scores",
        2,
        6,
        5,
        18,
        D=0,
        H=2,
        mask_shape=(2, 1, 6, 5),
        arrange=_some_queries_see_nothing,
    ),
    _edge("nothing_visible", 2, 3, 4, 8, F=2, mask_shape=(1, 4), arrange=_nothing_visible),
    _edge("heads_last", 2, 5, 6, 16, H=3, arrange=heads_last),
    _edge("columns_first", 2, 5, 6, 16, H=3, arrange=columns_first),
    _edge("transposed_pairs", 2, 5, 6, 16, F=3, mask_shape=(2, 5, 6), arrange=_transposed_pairs),
    _edge("shared_keys", 2, 5, 6, 16, H=3, arrange=_shared_keys),
    # Where exponentials of rows lose digits or overflow.
    _edge("small", 2, 8, 12, 40, scale=1e-3),
    _edge("small_scores", 2, 8, 12, 40, D=0, scale=1e-2),
    _edge("rather_small", 2, 8, 12, 40, scale=0.1),
    _edge("large", 2, 8, 12, 40, scale=5.0),
    _edge("huge", 2, 8, 12, 40, scale=1e3),
    _edge("far_apart", 2, 8, 12, 40, arrange=_far_apart),
    _edge("opposite", 2, 8, 12, 40, arrange=_opposite),
    _edge("one_large_column", 2, 8, 12, 40, arrange=_one_large_column),
    _benchmark("translation", 32, 32, 64, 512),
    _benchmark("translation_ragged", 32, 32, 64, 512, key_lengths=tuple(range(2, 65, 2))),
    _benchmark("translation_small", 32, 32, 64, 512, scale=0.1),
    _benchmark("location", 16, 8, 128, 256, F=10),
    *(_benchmark(f"decode_{K}", 32, K, 32, 512) for K in (1, 4, 5)),
    _benchmark("translation_large", 128, 64, 64, 1024, gpu_only=True, dtypes=(torch.bfloat16,)),
)
