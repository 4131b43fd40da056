"""The choice between GPU backends by what was measured."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from fused_attn.ops import _backend
from fused_attn.ops._fastest import FASTEST, Fastest, fastest
from fused_attn.validation import OPS, op_backends

ROOT = Path(__file__).resolve().parents[2]
HALF = Fastest("attention", "sm_90", torch.float16, 65, 128, "cuda", "somewhere")


def on_gpu(dtype: torch.dtype, size: int) -> torch.Tensor:
    """A stand-in for a tensor on a GPU."""
    tensor = mock.Mock(spec=torch.Tensor)
    tensor.dtype = dtype
    tensor.size = lambda _: size
    tensor.device = torch.device("cuda", 0)
    return tensor


@pytest.mark.parametrize(
    ("op", "dtype", "size", "capability", "expected"),
    [
        ("attention", torch.float16, 128, (9, 0), "cuda"),
        ("attention", torch.float16, 65, (9, 0), "cuda"),
        ("attention", torch.float16, 64, (9, 0), ""),
        ("attention", torch.float16, 129, (9, 0), ""),
        ("attention", torch.bfloat16, 128, (9, 0), ""),
        ("attention", torch.float16, 128, (8, 0), ""),
        ("add_layer_norm", torch.float16, 128, (9, 0), ""),
    ],
)
def test_what_was_measured_counts_where_it_was_measured(
    op: str, dtype: torch.dtype, size: int, capability: tuple[int, int], expected: str
) -> None:
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        assert fastest(op, on_gpu(dtype, size), (HALF,)) == expected


def test_the_table_names_what_exists() -> None:
    for row in FASTEST:
        assert (ROOT / row.measurement).is_file()
        assert row.op.removesuffix("_step") in OPS
        assert row.backend in op_backends(row.op.removesuffix("_step"))


@pytest.mark.parametrize(("measured", "expected"), [("", "triton"), ("cuda", "cuda")])
def test_triton_comes_first_until_something_was_measured(measured: str, expected: str) -> None:
    backends = {name: mock.Mock() for name in ("cpu", "cuda", "triton", "reference")}
    with (
        mock.patch.object(_backend, "fastest", return_value=measured),
        mock.patch.object(_backend, "unavailable_reason", return_value=""),
        mock.patch.dict("os.environ", clear=False) as environment,
    ):
        environment.pop("FUSED_ATTN_BACKEND", None)
        tensor = on_gpu(torch.float16, 64)
        name = _backend.resolve("attention", backends, None, tensor, lambda _: [], lambda: "")
    assert name == expected
