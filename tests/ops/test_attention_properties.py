"""Random combinations of everything that ``attention`` takes, against the fp64 oracle.

The examples are the same in every run; `--hypothesis-profile=long` draws many new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_attn.ops._cases import columns_first, heads_last
from fused_attn.ops.attention import cases
from fused_attn.ops.attention.cases import AttentionCase

from .properties import assert_agrees, each_backend


def sizes(most: int) -> st.SearchStrategy[int]:
    """Small ones, and some around the edges of tiles."""
    edges = [n for n in (0, 1, 15, 16, 17, 48, 63, 64, 65, 128, 129, 200, 257) if n <= most]
    return st.one_of(st.integers(1, min(most, 40)), st.sampled_from(edges))


@st.composite
def random_cases(draw: Any) -> tuple[AttentionCase, torch.dtype]:
    # A single row would make the error of the reference, which the budget is made of, a matter of
    # luck.
    B, H = draw(st.integers(2, 3)), draw(st.sampled_from([2, 4]))
    T, S = draw(sizes(257)), draw(sizes(257))
    lengths = draw(st.booleans())
    packed = lengths and draw(st.booleans())

    def shape(*options: tuple[int, ...]) -> tuple[int, ...] | None:
        return draw(st.sampled_from([None, None, *options]))

    def of_batch(most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(0, most), min_size=B, max_size=B)))

    pairs = ((T, S), (B, 1, T, S), (H, 1, S), (B, 1, 1, S), (1, H, T, 1), (1,))
    activation = draw(st.sampled_from(["softmax", "softmax", "sigmoid", "relu"]))
    # A bias that is the same for all keys changes no softmax: its gradient is rounding errors.
    # One number for everything is a sum of so many terms that the order of summation decides on
    # its last bits; named cases have it.
    biases = [p for p in pairs[:-1] if activation != "softmax" or p[-1] > 1]
    side = st.none() | st.integers(0, 150)
    arrangements = [None, None]
    if not packed:
        # No large logits: the backward knows them by the fp32 lse, and loses what its last bit is
        # worth, against which the luck of a few elements in the reference is no measure.
        arrangements += [heads_last, columns_first]
        arrangements += [cases._nan_behind_lengths] if lengths else []
    options: dict[str, Any] = {
        "D": draw(st.sampled_from([1, 8, 13, 16, 32, 64, 80])),
        "Dv": draw(st.sampled_from([None, 1, 16, 40])),
        "key_heads": draw(st.sampled_from([k for k in (1, 2, 4) if H % k == 0])),
        "query_lengths": of_batch(T) if lengths else None,
        "key_lengths": of_batch(S) if lengths else None,
        "packed": packed,
        "mask_shape": shape(*pairs),
        "bias_shape": shape(*biases),
        "sparse_tiles": shape((), (B, 1), (1, H)),
        "is_causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(side, side)),
        "align": draw(st.sampled_from(["upper_left", "lower_right"])),
        "softcap": draw(st.sampled_from([None, None, 0.7, 20.0])),
        "alibi": draw(st.booleans()),
        "activation": activation,
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.9])),
        "scale": draw(st.sampled_from([None, None, 0.3, -0.1])),
        "arrange": draw(st.sampled_from(arrangements)),
    }
    words = (f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())
    name = f"{B}-{H}-{T}-{S}-{' '.join(words)}"
    case = AttentionCase(name=name, kind="edge", B=B, H=H, T=T, S=S, **options)
    return case, draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))


@each_backend("attention")
@given(drawn=random_cases())
def test_any_combination(backend: str, drawn: tuple[AttentionCase, torch.dtype]) -> None:
    case, dtype = drawn
    if backend == "cuda" and dtype == torch.float32:
        dtype = torch.float16  # its products are made by 16-bit tensor cores
    assert_agrees(case, dtype, backend)
