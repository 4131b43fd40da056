"""The most memory that a call holds."""

from __future__ import annotations

import torch

from benchmarks import compiled


def test_the_peak_is_what_is_held_at_a_time() -> None:
    x = torch.randn(1000, 250)  # 1 MB

    def call() -> torch.Tensor:
        for _ in range(3):
            y = x + 1.0
            y = y * y  # two tensors, and then one
        return y

    assert 2_000_000 <= compiled.peak_bytes(call) <= 3_001_000
