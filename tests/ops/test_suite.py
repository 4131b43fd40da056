"""The shared suite's own instruments: they must be able to fail."""

from __future__ import annotations

import pytest
import torch

from fused_attn import add_layer_norm
from fused_attn.validation import fused_backends

from .suite import GUARD, GuardedAllocations, with_guard_zones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("place", [-1, 6])
def test_a_write_outside_a_result_is_seen(dtype: torch.dtype, place: int) -> None:
    allocations = GuardedAllocations()
    result = allocations.guard(torch.zeros(2, 3, dtype=dtype))
    allocations.assert_intact()
    result.as_strided((1,), (1,), GUARD + place).zero_()
    with pytest.raises(AssertionError, match="memory around a result: 1 of"):
        allocations.assert_intact()


@pytest.mark.parametrize("backend", fused_backends("add_layer_norm", "cpu"))
def test_allocations_of_kernels_are_seen(backend: str) -> None:
    x = torch.randn(3, 8)
    with GuardedAllocations() as allocations:
        torch.empty(3)
        assert allocations.count == 0
        add_layer_norm(x, backend=backend)
    assert allocations.count >= 3


def test_a_write_outside_an_input_is_seen() -> None:
    guarded, intact = with_guard_zones({"x": torch.zeros(4)})
    intact()
    guarded["x"].as_strided((1,), (1,), GUARD + 4).zero_()
    with pytest.raises(AssertionError, match="memory around x"):
        intact()
