"""Named cases of ``decode_attention``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._cases import ELEMENTARY, Case, Inputs, columns_first, heads_last, large_logits, shared_keys
from .api import decode_attention


@dataclass(frozen=True, kw_only=True)
class DecodeAttentionCase(Case):
    """Normal queries and caches, and what ``arrange`` makes of the call."""

    op: ClassVar[str] = "decode_attention"

    B: int
    """Sentences: rows of the cache, but for an ancestry."""
    K: int = 1
    """Beams of a sentence."""
    H: int
    Hk: int | None = None
    """Default: H."""
    T: int = 1
    S: int
    D: int
    Dv: int | None = None
    """Default: D."""
    has_ancestry: bool = False
    """Each beam has a row of the cache and reads it through the history of a search."""
    key_lengths: tuple[int, ...] | None = None
    """One a row of queries or a row of the cache."""
    mask_shape: tuple[int, ...] | None = None
    """The mask shows about two thirds of what it has a say in."""
    has_alibi: bool = False
    is_causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    arrange: Callable[[Inputs], None] | None = None
    """Changes the inputs: strides, NaN out of sight."""

    @property
    def rows(self) -> int:
        """R."""
        return self.B * self.K

    @property
    def cache_rows(self) -> int:
        """C."""
        return self.rows if self.has_ancestry else self.B

    @property
    def kv_heads(self) -> int:
        """Hk."""
        return self.H if self.Hk is None else self.Hk

    @property
    def value_size(self) -> int:
        """Dv."""
        return self.D if self.Dv is None else self.Dv

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Inputs:
        """Normal tensors, uniform masks, then ``arrange``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        inputs: Inputs = {
            "query": normal(self.rows, self.H, self.T, self.D),
            "key": normal(self.cache_rows, self.kv_heads, self.S, self.D),
            "value": normal(self.cache_rows, self.kv_heads, self.S, self.value_size),
            "is_causal": self.is_causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        if self.has_ancestry:
            inputs["ancestry"] = search_history(self.B, self.K, self.S).to(device)
        if self.key_lengths is not None:
            inputs["key_lengths"] = torch.tensor(self.key_lengths, device=device)
        if self.mask_shape is not None:
            shown = torch.rand(self.mask_shape, generator=generator) < 0.66
            inputs["mask"] = shown.to(device)
        if self.has_alibi:
            slopes = 2.0 ** -torch.arange(1.0, self.H + 1)
            inputs["alibi_slopes"] = slopes.to(device)
        if self.arrange is not None:
            self.arrange(inputs)
        return inputs

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Call ``decode_attention``, with the lse."""
        output, lse = decode_attention(**inputs, return_lse=True, backend=backend)
        return output, lse

    def _seen(self) -> list[tuple[int, int, int]]:
        """Of each row of queries: pairs of a head, and the first key seen and the last, plus 1."""
        lengths = [self.S] if self.key_lengths is None else self.key_lengths
        repeats = self.rows // len(lengths)
        seen = []
        for length in (min(n, self.S) for n in lengths for _ in range(repeats)):
            pairs, first, end = 0, length, 0
            for position in range(length - self.T, length):
                begin = 0 if self.window is None else max(0, position - self.window)
                stop = max(0, position + 1) if self.is_causal else length
                if stop > begin:
                    pairs += stop - begin
                    first, end = min(first, begin), max(end, stop)
            seen.append((pairs, first, end))
        return seen

    def flops(self, backward: bool = False) -> int:
        """Two products of 2 operations a pair and column."""
        pairs = self.H * sum(pairs for pairs, _, _ in self._seen())
        return 2 * pairs * (self.D + self.value_size)

    def vector_flops(self, backward: bool = False) -> int:
        """The exponential of each logit, and the tangent of a softcap."""
        functions = 1 + int(self.softcap is not None)
        return self.H * sum(pairs for pairs, _, _ in self._seen()) * functions * ELEMENTARY

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """One read of the keys and values that anything looks at; queries and outputs once."""
        seen = self._seen()
        history = search_history(self.B, self.K, self.S) if self.has_ancestry else None
        cells = ancestry = 0
        for b in range(self.B):
            beams = seen[b * self.K : (b + 1) * self.K]
            if history is None:
                cells += len(set().union(*(range(first, end) for _, first, end in beams)))
                continue
            places = (
                zip(row[first:end], range(first, end), strict=True)
                for row, (_, first, end) in zip(history[b].tolist(), beams, strict=True)
            )
            cells += len(set().union(*places))
            ancestry += 4 * sum(max(0, end - first) for _, first, end in beams)
        queries = self.rows * self.H * self.T
        columns = self.D + self.value_size
        mask = math.prod(self.mask_shape or (0,))
        return (
            (cells * self.kv_heads + queries) * columns * itemsize + queries * 4 + ancestry + mask
        )


@functools.lru_cache(maxsize=8)
def search_history(B: int, K: int, S: int) -> Tensor:
    """int32 ``[B, K, S]``: an ancestry as S steps of a search with random parents leave it."""
    generator = torch.Generator().manual_seed(0)
    history = torch.arange(K, dtype=torch.int32)[None, :, None].repeat(B, 1, S)
    for s in range(1, S):
        parents = torch.randint(K, (B, K, 1), generator=generator)
        history[:, :, :s] = history[:, :, :s].gather(1, parents.expand(-1, -1, s))
    return history


# --- arrangements -------------------------------------------------------------------------------


def _expanded_mask(inputs: Inputs) -> None:
    shape = (*inputs["query"].shape[:3], inputs["key"].size(2))
    inputs["mask"] = inputs["mask"].expand(shape)


def _nan_behind_lengths(inputs: Inputs) -> None:
    lengths = inputs["key_lengths"].view(inputs["key"].size(0), -1).amax(1)
    for c, length in enumerate(lengths.tolist()):
        inputs["key"][c, :, length:] = math.nan
        inputs["value"][c, :, length:] = math.inf


def _nan_behind_mask(inputs: Inputs) -> None:
    # Hidden from all queries that share a key: mask [R, 1, 1, S], K rows a row of the cache.
    C, _, S, _ = inputs["key"].shape
    shown = inputs["mask"].view(C, -1, S).any(dim=1)
    hidden = ~shown[:, None].expand(inputs["key"].shape[:3])
    inputs["key"][hidden] = math.nan
    inputs["value"][hidden] = -math.inf


def _nan_before_window(inputs: Inputs) -> None:
    first = inputs["key"].size(2) - inputs["query"].size(2) - inputs["window"]
    inputs["key"][:, :, :first] = math.inf
    inputs["value"][:, :, :first] = math.nan


def _nan_between_windows(inputs: Inputs) -> None:
    # Two beams of one source, at different positions: what lies between their windows is hidden.
    near, far = inputs["key_lengths"].tolist()
    hidden = slice(near, far - 1 - inputs["window"])
    inputs["key"][:, :, hidden] = math.nan
    inputs["value"][:, :, hidden] = math.nan


def _stale_rows(inputs: Inputs) -> None:
    # Everything that the ancestry does not lead to is NaN.
    ancestry, K = inputs["ancestry"].long(), inputs["ancestry"].size(1)
    for name in ("key", "value"):
        cache = inputs[name].unflatten(0, (-1, K))  # [B, K, Hk, S, D]
        reached = torch.zeros(ancestry.shape, dtype=torch.bool, device=ancestry.device)
        reached.scatter_(1, ancestry, True)
        stale = ~reached[:, :, None, :, None].expand(cache.shape)
        inputs[name] = cache.masked_fill(stale, math.nan).flatten(0, 1)


def _garbage_behind_lengths(inputs: Inputs) -> None:
    # The ancestry is not defined where there is no key yet.
    lengths = inputs["key_lengths"].view(inputs["ancestry"].shape[:2])
    behind = torch.arange(inputs["key"].size(2), device=lengths.device) >= lengths[..., None]
    inputs["ancestry"] = inputs["ancestry"].long().masked_fill(behind, -(2**40))


def _steps_first(inputs: Inputs) -> None:
    inputs["ancestry"] = inputs["ancestry"].permute(2, 1, 0).contiguous().permute(2, 1, 0)


_FP32 = (torch.float32,)


def _case(name: str, kind: Any = "edge", **fields: Any) -> DecodeAttentionCase:
    return DecodeAttentionCase(name=name, kind=kind, **fields)


def _gpu(name: str, **fields: Any) -> DecodeAttentionCase:
    """A benchmark of a GPU's size, in the type that caches have there."""
    return _case(f"{name}_gpu", "benchmark", dtypes=(torch.bfloat16,), gpu_only=True, **fields)


CASES: tuple[DecodeAttentionCase, ...] = (
    # --- edge -----------------------------------------------------------------------------------
    _case("one_pair", B=1, H=1, S=1, D=1),
    _case("empty_batch", B=0, H=2, S=4, D=8),
    _case("no_queries", B=2, H=2, T=0, S=4, D=8),
    _case("no_keys", B=2, H=2, S=0, D=8),
    _case("no_values", B=2, H=2, S=5, D=8, Dv=0),
    _case("primes", B=2, H=3, T=1, S=53, D=13, Dv=29),
    _case("primes_few_queries", B=1, K=3, H=3, T=5, S=43, D=17, Dv=7),
    _case("head_256", B=1, H=1, S=47, D=256, Dv=251),
    _case("head_128", B=1, K=3, H=2, S=40, D=128),
    _case("narrow_values", B=1, H=2, S=40, D=64, Dv=1),
    _case("several_chunks", B=1, H=2, S=587, D=24, key_lengths=(586,)),
    _case(
        "several_chunks_shared", B=1, K=5, H=2, Hk=1, S=531, D=16, key_lengths=(531, 1, 257, 0, 256)
    ),
    _case("several_chunks_causal", B=1, H=2, T=7, S=519, D=16, key_lengths=(515,)),
    _case("several_chunks_ancestry", B=1, K=3, H=1, S=300, D=16, has_ancestry=True, dtypes=_FP32),
    _case("large_logits", B=1, H=2, S=300, D=32, arrange=large_logits),
    _case("negative_scale", B=2, H=2, S=21, D=8, scale=-0.7),
    _case("lengths_of_queries", B=2, K=2, H=2, S=21, D=16, key_lengths=(21, 3, 0, 8)),
    _case("lengths_of_cache", B=2, K=3, H=2, S=21, D=16, key_lengths=(13, 40)),
    _case("shorter_than_the_queries", B=2, H=2, T=6, S=21, D=16, key_lengths=(4, 0)),
    _case("not_causal", B=2, H=2, T=6, S=21, D=16, key_lengths=(4, 20), is_causal=False),
    _case(
        "nan_behind_lengths",
        B=3,
        H=2,
        T=2,
        S=35,
        D=16,
        key_lengths=(18, 35, 7),
        arrange=_nan_behind_lengths,
    ),
    _case(
        "nan_behind_shared_lengths",
        B=2,
        K=2,
        H=2,
        S=35,
        D=16,
        key_lengths=(18, 20, 7, 0),
        arrange=_nan_behind_lengths,
    ),
    _case(
        "nan_behind_mask",
        B=2,
        K=2,
        H=4,
        Hk=2,
        S=35,
        D=16,
        mask_shape=(4, 1, 1, 35),
        arrange=_nan_behind_mask,
    ),
    _case("nan_before_window", B=2, H=2, T=3, S=70, D=16, window=20, arrange=_nan_before_window),
    _case(
        "nan_between_windows",
        B=1,
        K=2,
        H=2,
        S=70,
        D=16,
        window=4,
        key_lengths=(10, 60),
        arrange=_nan_between_windows,
    ),
    _case("nan_in_stale_rows", B=2, K=3, H=2, S=19, D=16, has_ancestry=True, arrange=_stale_rows),
    _case(
        "undefined_ancestry",
        B=2,
        K=2,
        H=2,
        S=19,
        D=16,
        has_ancestry=True,
        key_lengths=(19, 18, 3, 0),
        arrange=_garbage_behind_lengths,
    ),
    _case("ancestry_in_steps", B=2, K=3, H=2, S=19, D=16, has_ancestry=True, arrange=_steps_first),
    _case("window_of_itself", B=2, H=2, T=3, S=17, D=16, window=0),
    _case("mask_of_heads", B=2, H=4, Hk=2, T=3, S=19, D=16, mask_shape=(4, 3, 19)),
    _case("expanded_mask", B=2, K=2, H=2, S=19, D=16, mask_shape=(1, 19), arrange=_expanded_mask),
    _case("small_softcap", B=2, H=2, S=35, D=16, softcap=0.5),
    _case("columns_first", B=2, H=2, T=2, S=35, D=16, arrange=columns_first),
    _case("expanded_heads", B=2, H=4, S=35, D=16, arrange=shared_keys),
    _case("many_queries", B=1, K=2, H=4, Hk=1, T=9, S=70, D=32),
    _case(
        "everything",
        B=2,
        K=3,
        H=4,
        Hk=2,
        T=2,
        S=61,
        D=24,
        Dv=40,
        has_ancestry=True,
        key_lengths=(61, 60, 33, 20, 1, 0),
        mask_shape=(6, 1, 2, 61),
        has_alibi=True,
        window=30,
        scale=0.3,
        softcap=5.0,
        arrange=heads_last,
    ),
    # --- typical --------------------------------------------------------------------------------
    _case("self_attention", "typical", B=4, H=4, S=40, D=32, key_lengths=(40, 7, 23, 1)),
    _case("grouped_query", "typical", B=2, H=8, Hk=2, S=40, D=64),
    _case(
        "beams_of_a_source",
        "typical",
        B=2,
        K=4,
        H=4,
        S=48,
        D=32,
        key_lengths=(48, 17),
        is_causal=False,
        arrange=heads_last,
    ),
    _case("beams_with_an_ancestry", "typical", B=2, K=4, H=4, S=24, D=32, has_ancestry=True),
    _case("speculative", "typical", B=2, H=4, T=5, S=40, D=32, key_lengths=(40, 23)),
    _case("alibi", "typical", B=2, H=4, T=2, S=40, D=32, has_alibi=True),
    _case("window_and_softcap", "typical", B=2, H=4, S=64, D=32, window=31, softcap=20.0),
    # --- benchmark ------------------------------------------------------------------------------
    _case("self_512", "benchmark", dtypes=_FP32, B=16, H=8, S=512, D=64),
    _case(
        "self_padded_512",
        "benchmark",
        dtypes=_FP32,
        B=16,
        H=8,
        S=512,
        D=64,
        key_lengths=tuple(range(32, 513, 32)),
    ),
    _case("grouped_4096", "benchmark", dtypes=_FP32, B=2, H=32, Hk=8, S=4096, D=128),
    _case(
        "cross_64_4_beams", "benchmark", dtypes=_FP32, B=16, K=4, H=8, S=64, D=64, is_causal=False
    ),
    _case(
        "cross_512_4_beams", "benchmark", dtypes=_FP32, B=16, K=4, H=8, S=512, D=64, is_causal=False
    ),
    _case(
        "ancestry_64_4_beams",
        "benchmark",
        dtypes=_FP32,
        B=16,
        K=4,
        H=8,
        S=64,
        D=64,
        has_ancestry=True,
    ),
    _case(
        "ancestry_256_4_beams",
        "benchmark",
        dtypes=_FP32,
        B=16,
        K=4,
        H=8,
        S=256,
        D=64,
        has_ancestry=True,
    ),
    _gpu("self_4096", B=64, H=16, S=4096, D=64),
    _gpu("self_1024_one", B=1, H=32, S=1024, D=128),
    _gpu("self_16384_one", B=1, H=32, S=16384, D=128),
    _gpu("grouped_4096", B=64, H=32, Hk=8, S=4096, D=128),
    _gpu("cross_1024_4_beams", B=64, K=4, H=16, S=1024, D=64, is_causal=False),
    _gpu("ancestry_1024_4_beams", B=16, K=4, H=16, S=1024, D=64, has_ancestry=True),
)
