"""Attention's Triton kernels give what the oracle gives, however they are launched."""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch

from fused_attn.ops.attention import triton as backend
from fused_attn.ops.attention.block_mask import BlockMask
from fused_attn.ops.attention.contract import AttentionInputs
from fused_attn.ops.attention.reference import attention_reference
from fused_attn.ops.attention.triton_launches import Launch
from fused_attn.validation import compare

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="triton is not installed, or chooses launches for the GPU that is here",
)

LAUNCHES = {
    "pointers": Launch(64, 32, 4, 1),
    "wide": Launch(32, 128, 4, 1),
    "descriptors": Launch(64, 64, 4, 1, True),
    "specialized": Launch(64, 64, 4, 1, True, True),
}


def example(dtype: torch.dtype, **change: Any) -> AttentionInputs:
    """One head of keys for two of queries, with lengths and a window."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = AttentionInputs(
        query=normal(2, 2, 150, 16),
        key=normal(2, 1, 170, 16),
        value=normal(2, 1, 170, 32),
        mask=None,
        bias=None,
        alibi_slopes=None,
        query_lengths=torch.tensor([150, 61]),
        key_lengths=torch.tensor([133, 170]),
        query_offsets=None,
        key_offsets=None,
        block_mask=[],
        seed=None,
        left=70,
        right=0,
        align_lower_right=True,
        scale=0.25,
        softcap=0.0,
        activation=0,
        dropout_p=0.0,
        max_queries=150,
        max_keys=170,
    )
    return inputs._replace(**change)


def reference(inputs: AttentionInputs, dtype: torch.dtype, gradient: torch.Tensor) -> list:
    names = ("query", "key", "value")
    leaves = {n: getattr(inputs, n).to(dtype).requires_grad_() for n in names}
    output, lse = attention_reference(inputs._replace(**leaves))
    grads = torch.autograd.grad(output, list(leaves.values()), gradient.to(dtype))
    return [output.detach(), lse.detach(), *grads]


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [False, True])
def test_every_launch_matches_the_oracle(launch: Launch, dtype: torch.dtype, blocks: bool) -> None:
    inputs = example(dtype)
    if blocks:
        mask = torch.rand(150, 170, generator=torch.Generator().manual_seed(4)) < 0.7
        mask[:128, :128] = True
        block_mask = BlockMask.from_mask(mask)
        names = ("tiles", "bits", "key_tiles", "key_counts", "query_tiles", "query_counts")
        inputs = inputs._replace(block_mask=[getattr(block_mask, name) for name in names])
    asked = []

    def launches(architecture: str, kernel: str, *rest: int) -> tuple[Launch, ...]:
        asked.append(kernel)
        return (launch,)

    with (
        mock.patch.object(backend, "launches_for", launches),
        mock.patch.object(backend, "_DESCRIPTOR_ROWS", 0),
    ):
        output, lse = backend.forward(inputs)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        *gradients, _ = backend.backward(gradient, None, inputs, output, lse, False)
    assert asked == ["forward", "query_gradient", "key_gradient"]
    oracle = reference(inputs, torch.float64, gradient)
    same = reference(inputs, dtype, gradient)
    names = ("output", "lse", "grad_query", "grad_key", "grad_value")
    comparisons = map(compare, names, [output, lse, *gradients], oracle, same)
    failed = [str(c) for c in comparisons if not c.passed]
    assert not failed, "\n".join(failed)
