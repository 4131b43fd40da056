from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_attn import add_layer_norm
from fused_attn.ops._philox import keep_mask
from fused_attn.validation import compare, fused_backends

from .suite import OpSuite, assert_bit_equal

BACKENDS = ("reference", *fused_backends("add_layer_norm", "cpu"))


class TestAddLayerNorm(OpSuite):
    op = "add_layer_norm"


def example(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    shape = shape or (3, 5, 40)
    return {
        "x": torch.randn(shape, generator=generator).to(dtype),
        "residual": torch.randn(shape, generator=generator).to(dtype),
        "weight": torch.randn(shape[-1], generator=generator).to(dtype),
        "bias": torch.randn(shape[-1], generator=generator).to(dtype),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch(backend: str) -> None:
    call = example()
    output, total = add_layer_norm(**call, return_sum=True, backend=backend)
    expected_sum = call["x"] + call["residual"]
    expected = F.layer_norm(expected_sum, (40,), call["weight"], call["bias"])
    assert_bit_equal("sum", total, expected_sum)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [12, 13, 64])
def test_drops_what_philox_says_in_every_backend(backend: str, width: int) -> None:
    seed = torch.tensor([2**40 + 11])
    x = torch.ones(6, width)
    _, total = add_layer_norm(x, dropout_p=0.3, seed=seed, return_sum=True, backend=backend)
    kept = keep_mask(seed, x.shape, 0.3)
    assert 0.5 < kept.float().mean() < 0.9
    assert_bit_equal("mask", total != 0.0, kept)
    torch.testing.assert_close(total[kept], torch.full_like(total[kept], 1.0 / 0.7))


def test_dropout_follows_the_generator() -> None:
    x = torch.randn(4, 64)
    torch.manual_seed(1)
    first, second = (add_layer_norm(x, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = add_layer_norm(x, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("forward", BACKENDS[1:])
@pytest.mark.parametrize("backward", BACKENDS[1:])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_any_backward_takes_any_forwards_residuals(forward: str, backward: str, norm: str) -> None:
    """The gradient through one backend's forward and another's backward is the oracle's."""
    call = example(dtype=torch.float32) | {"x_bias": torch.linspace(-1.0, 1.0, 40)}
    seed = torch.tensor([99])
    options: dict[str, Any] = {"norm": norm, "dropout_p": 0.2, "seed": seed}
    operator = torch.ops.fused_attn
    leaves = {name: tensor.double().requires_grad_() for name, tensor in call.items()}
    expected = add_layer_norm(**leaves, **options)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    oracle = torch.autograd.grad(expected, list(leaves.values()), grad.double())
    same = {name: tensor.clone().requires_grad_() for name, tensor in call.items()}
    output = add_layer_norm(**same, **options, backend="reference")
    low = torch.autograd.grad(output, list(same.values()), grad)

    shared = call | {"seed": seed, "dropout_p": 0.2, "is_rms": norm == "rms_norm"}
    made_of = {"x": call["x"], "x_bias": call["x_bias"], "residual": call["residual"]}
    for x_is_sum in (True, False):
        forwards = shared | {"eps": 1e-5, "sum_dtype": torch.float32 if x_is_sum else None}
        _, total, mean, rstd = by_name(operator.add_layer_norm_forward, forwards, forward)
        sums = {"x": total, "x_bias": None, "residual": None} if x_is_sum else made_of
        backwards = shared | sums | {"grad_output": grad, "grad_sum": None}
        backwards |= {"mean": mean, "rstd": rstd, "x_is_sum": x_is_sum}
        backwards |= {"grad_residual_dtype": torch.float32, "need_x_bias": True}
        backwards |= {"need_weight": True, "need_bias": True}
        found = by_name(operator.add_layer_norm_backward, backwards, backward)
        grad_x, grad_residual, grad_x_bias, grad_weight, grad_bias = found
        results = (grad_x, grad_residual, grad_weight, grad_bias, grad_x_bias)
        for name, got, want, reference in zip(call, results, oracle, low, strict=True):
            comparison = compare(name, got, want, reference)
            assert comparison.passed, comparison


def by_name(operator: Any, arguments: dict[str, Any], backend: str) -> Any:
    """Calls an operator with those of the arguments that it has."""
    values = arguments | {"backend": backend}
    return operator(*(values[a.name] for a in operator.default._schema.arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_have_the_bits_of_small_ones(dtype: torch.dtype) -> None:
    """Kernels may write a large output in another way."""
    if "cpu" not in BACKENDS:
        pytest.skip("add_layer_norm: the C++ extension is not available here")
    rows = (2**25 // 1024) // dtype.itemsize + 8  # a little more than 32 MiB
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(3)).to(dtype)

    def run(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x[part].clone().requires_grad_()
        output = add_layer_norm(leaf, leaf.detach(), backend="cpu")
        (grad,) = torch.autograd.grad(output, leaf, x[part].flip(-1))
        return output.detach(), grad

    whole = run(slice(None))
    parts = run(slice(0, rows // 2)), run(slice(rows // 2, None))
    for i, name in enumerate(("output", "gradient")):
        assert_bit_equal(name, whole[i], torch.cat([part[i] for part in parts]))


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("add_layer_norm: the C++ extension is not available here")
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(
        add_layer_norm(x, backend="cpu").square().sum(), x, create_graph=True
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a tensor, got int"),
        ({"x": torch.zeros(2, 8).long()}, TypeError, "x must have dtype float32, float16"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have shape [..., E] with E >= 1, got []"),
        (
            {"residual": torch.zeros(2, 7)},
            ValueError,
            "residual must have the shape of x, [2, 8], got [2, 7]",
        ),
        (
            {"residual": torch.zeros(2, 8).half()},
            TypeError,
            "residual must have dtype float32, got float16",
        ),
        (
            {"x": torch.zeros(2, 8).half(), "residual": torch.zeros(2, 8).bfloat16()},
            TypeError,
            "residual must have dtype float16 or float32, got bfloat16",
        ),
        (
            {"residual": torch.zeros(2, 8, device="meta")},
            ValueError,
            "residual must be on the device of x, cpu, got meta",
        ),
        (
            {"weight": torch.zeros(7)},
            ValueError,
            "weight must have shape [E] with E = 8 (from x), got [7]",
        ),
        ({"bias": torch.zeros(8).half()}, TypeError, "bias must have dtype float32"),
        (
            {"weight": torch.zeros(8, device="meta")},
            ValueError,
            "weight must be on the device of x, cpu, got meta",
        ),
        (
            {"x": torch.zeros(2, 8).bfloat16(), "weight": torch.zeros(8).half()},
            TypeError,
            "weight must have dtype bfloat16 or float32, got float16",
        ),
        ({"x_bias": [0.0] * 8}, TypeError, "x_bias must be a tensor, got list"),
        (
            {"x_bias": torch.zeros(1, 8)},
            ValueError,
            "x_bias must have shape [E] with E = 8 (from x), got [1, 8]",
        ),
        (
            {"norm": "batch_norm"},
            ValueError,
            "norm must be 'layer_norm' or 'rms_norm', got 'batch_norm'",
        ),
        ({"eps": float("nan")}, ValueError, "eps must not be negative, got nan"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in [0, 1), got nan"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
        ({"seed": torch.zeros(2).long()}, ValueError, "seed must have shape [1], got [2]"),
        ({"seed": torch.zeros(1)}, TypeError, "seed must have dtype int64, got float32"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu', expected one of"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:40] if isinstance(value, str) else None,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^add_layer_norm: .*" + re.escape(message)):
        add_layer_norm(**{"x": torch.zeros(2, 8), **change})


def test_a_named_backend_says_why_it_cannot() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("add_layer_norm: the C++ extension is not available here")
    with pytest.raises(NotImplementedError) as caught:
        add_layer_norm(torch.zeros(2, 8, dtype=torch.float64), backend="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == "add_layer_norm: backend 'cpu' cannot run this call:"
    assert lines[1] == "  x [2, 8] float64 cpu"
    assert "float64" in lines[2]
    assert lines[-1].startswith("  available here: ")
