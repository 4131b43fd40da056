"""The repaired interpreter against PyTorch's bf16."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, less_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    tl.store(sum_ptr + offs, a + b)
    tl.store(product_ptr + offs, (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16))
    tl.store(less_ptr + offs, (a < b).to(tl.int32))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


def test_bf16_arithmetic_rounds_to_nearest_even() -> None:
    torch.manual_seed(0)
    N = 1024
    a = torch.randn(N).bfloat16()
    b = torch.randn(N).bfloat16()
    a[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    total, product = torch.empty_like(a), torch.empty_like(a)
    less = torch.empty(N, dtype=torch.int32)
    arithmetic_kernel[(1,)](a, b, total, product, less, N)
    torch.testing.assert_close(total, a + b, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(product, a * b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(less.bool(), a < b)


def test_bf16_dot() -> None:
    torch.manual_seed(0)
    N = 16
    # Small integers: every product and partial sum is exact.
    a = torch.randint(-8, 8, (N, N)).bfloat16()
    b = torch.randint(-8, 8, (N, N)).bfloat16()
    out = torch.empty(N, N)
    dot_kernel[(1,)](a, b, out, N)
    assert torch.equal(out, a.float() @ b.float())
