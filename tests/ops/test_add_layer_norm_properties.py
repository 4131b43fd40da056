"""Random combinations of everything that ``add_layer_norm`` takes, against the fp64 oracle.

The examples are the same in every run; `--hypothesis-profile=long` draws many new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_attn.ops.add_layer_norm.cases import AddLayerNormCase

from .properties import assert_agrees, each_backend

WIDTHS = (3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 100, 127, 255, 257, 511, 768, 1023, 2049)


@st.composite
def random_cases(draw: Any) -> tuple[AddLayerNormCase, torch.dtype]:
    flag = st.booleans()
    # A single row would make the error of the reference, which the budget is made of, a matter of
    # luck. Of one or two numbers a normalisation leaves the signs, and the gradient is rounding
    # errors: so short are rows only by dropout, and beside others.
    width = draw(st.one_of(st.sampled_from(WIDTHS), st.integers(3, 300)))
    # Tiles of long rows have one or two, and Triton's interpreter takes its time for each tile.
    most = 9 if width <= 300 else 2
    leading = (*draw(st.lists(st.integers(1, most), max_size=2)), draw(st.integers(2, 2 * most)))
    layout = draw(st.sampled_from(["contiguous", "sliced", "transposed"]))
    options: dict[str, Any] = {
        "leading": leading,
        "width": width,
        "layout": "contiguous" if layout == "transposed" and len(leading) < 2 else layout,
        "norm": draw(st.sampled_from(["layer_norm", "rms_norm"])),
        **{name: draw(flag) for name in ("residual", "weight", "bias", "x_bias")},
        **{name: draw(flag) for name in ("fp32_parameters", "fp32_residual", "fp32_sum")},
        "return_sum": draw(flag),
        "dropout_p": draw(st.sampled_from([0.0, 0.1, 0.9 if width >= 64 else 0.1])),
        "eps": draw(st.sampled_from([1e-5, 1e-12, 0.3])),
        "offset": draw(st.sampled_from([0.0, 0.0, 5.0])),
    }
    name = " ".join(f"{key}={value}" for key, value in options.items())
    case = AddLayerNormCase(name=name, kind="edge", **options)
    return case, draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))


@each_backend("add_layer_norm")
@given(drawn=random_cases())
def test_any_combination(backend: str, drawn: tuple[AddLayerNormCase, torch.dtype]) -> None:
    assert_agrees(*drawn, backend)
