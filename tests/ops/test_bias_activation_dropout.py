from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import bias_activation_dropout
from fused_attn.ops._philox import keep_mask
from fused_attn.ops.bias_activation_dropout.cases import BiasActivationDropoutCase
from fused_attn.validation import check_case, compare, fused_backends

from .suite import OpSuite, RecordFusedCalls, assert_bit_equal

OP = "bias_activation_dropout"
BACKENDS = ("reference", *fused_backends(OP, "cpu"))

TORCH: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class TestBiasActivationDropout(OpSuite):
    op = OP


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", TORCH, ids=str)
def test_equals_torch(backend: str, activation: Any) -> None:
    x, bias, residual = (2.0 * draw(3, 5, 40)).requires_grad_(), draw(40), draw(3, 5, 40, seed=8)
    output = bias_activation_dropout(x, bias, residual, activation=activation, backend=backend)
    expected = residual + TORCH[activation](x + bias)
    torch.testing.assert_close(output, expected)
    grad = draw(3, 5, 40, seed=9)
    torch.testing.assert_close(
        *(torch.autograd.grad(result, x, grad)[0] for result in (output, expected))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_glu_is_a_sigmoid_gate_with_the_halves_swapped(backend: str) -> None:
    x = draw(4, 6, 26)
    output = bias_activation_dropout(x, activation="sigmoid", gated=True, backend=backend)
    gate, value = x.chunk(2, dim=-1)
    torch.testing.assert_close(output, F.glu(torch.cat([value, gate], dim=-1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [12, 13, 64])
def test_drops_what_philox_says_in_every_backend(backend: str, gated: bool, width: int) -> None:
    seed = torch.tensor([2**40 + 11])
    x = torch.ones(6, 2 * width if gated else width)
    output = bias_activation_dropout(x, gated=gated, dropout_p=0.3, seed=seed, backend=backend)
    kept = keep_mask(seed, (6, width), 0.3)
    assert 0.5 < kept.float().mean() < 0.9
    assert_bit_equal("mask", output != 0.0, kept)
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1.0 / 0.7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", TORCH, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_dropped_is_not_seen(
    backend: str, activation: Any, gated: bool, special: float
) -> None:
    seed = torch.tensor([5])
    kept = keep_mask(seed, (4, 30), 0.5)
    where = kept.repeat(1, 2) if gated else kept
    x = draw(*where.shape)
    call: dict[str, Any] = {"activation": activation, "gated": gated, "dropout_p": 0.5}
    results = []
    for held in (special, 0.5):
        bias = torch.zeros(x.size(1)).requires_grad_()
        leaves = torch.where(where, x, held).requires_grad_(), bias
        output = bias_activation_dropout(*leaves, **call, seed=seed, backend=backend)
        grad_x, grad_bias = torch.autograd.grad(output, leaves, draw(4, 30, seed=2))
        assert not output[~kept].any()
        assert not grad_x[~where].any()
        results.append((output, grad_x, grad_bias))
    for name, *pair in zip(("output", "grad_x", "grad_bias"), *results, strict=True):
        assert_bit_equal(name, *pair)


def test_dropout_follows_the_generator() -> None:
    x = torch.randn(4, 64)
    torch.manual_seed(1)
    first, second = (bias_activation_dropout(x, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = bias_activation_dropout(x, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_has_no_gradient_at_zero(backend: str) -> None:
    x = torch.tensor([[-1.0, -0.0, 0.0, 1.0]], requires_grad=True)
    output = bias_activation_dropout(x, backend=backend)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert grad.tolist() == [[0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", TORCH, ids=str)
def test_special_values_are_torchs(backend: str, activation: Any) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30]])
    output = bias_activation_dropout(x, activation=activation, backend=backend)
    # In fp32 torch's gelu of infinity is NaN, for some instruction sets.
    assert_bit_equal("output", output, TORCH[activation](x.double()).float())


@pytest.mark.parametrize("forward", BACKENDS[1:])
@pytest.mark.parametrize("backward", BACKENDS[1:])
@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("silu", True), (None, False)])
def test_any_backward_takes_any_forwards_residuals(
    forward: str, backward: str, activation: Any, gated: bool
) -> None:
    """The gradient through one backend's forward and another's backward is the oracle's."""
    columns = 40 if gated else 20
    inputs = {"x": draw(3, 5, columns), "bias": draw(columns), "residual": draw(3, 5, 20, seed=8)}
    call: dict[str, Any] = {
        "activation": activation,
        "gated": gated,
        "dropout_p": 0.2,
        "seed": torch.tensor([99]),
    }
    grad = draw(3, 5, 20, seed=1)

    def gradients(kind: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = {name: tensor.to(kind).requires_grad_() for name, tensor in inputs.items()}
        output = bias_activation_dropout(**leaves, **call, backend=backend)
        return torch.autograd.grad(output, list(leaves.values()), grad.to(kind))

    oracle = gradients(torch.float64, "reference")
    low = gradients(torch.float32, "reference")
    with RecordFusedCalls() as recorder:
        gradients(torch.float32, forward)
    (operator, arguments) = recorder.calls[-1]
    assert operator is torch.ops.fused_attn.bias_activation_dropout_backward.default
    assert arguments[-1] == forward
    # What passes through needs no residual but the seed.
    assert (arguments[1] is None) == (activation is None and not gated)
    results = operator(*arguments[:-1], backward)
    for name, *tensors in zip(("x", "bias"), results, oracle, low, strict=False):
        assert compare(name, *tensors).passed, compare(name, *tensors)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_only_what_a_gradient_needs_is_saved_and_computed(backend: str) -> None:
    x, bias, residual = draw(3, 8), draw(8), draw(3, 8, seed=8)

    def calls(names: str, **options: Any) -> tuple[list[Any], tuple[Tensor, ...], int]:
        leaves = {"x": x, "bias": bias, "residual": residual}
        wanted = [leaves[n].clone().requires_grad_() for n in names.split()]
        leaves |= dict(zip(names.split(), wanted, strict=True))
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += 1
            return tensor

        with (
            RecordFusedCalls() as recorder,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            output = bias_activation_dropout(**leaves, **options, backend=backend)
            gradients = torch.autograd.grad(output, wanted, torch.ones(3, 8))
        return [c for c in recorder.calls if "backward" in str(c[0])], gradients, saved

    backward, (grad,), saved = calls("residual")
    assert (backward, saved) == ([], 0)
    assert_bit_equal("gradient of the residual", grad, torch.ones(3, 8))

    backward, (grad_x, grad_residual), saved = calls("x residual", activation=None)
    assert (backward, saved) == ([], 0)
    assert_bit_equal("gradient of x", grad_x, torch.ones(3, 8))
    assert_bit_equal("gradient of the residual", grad_residual, torch.ones(3, 8))

    ((_, arguments),), (grad,), saved = calls("bias", activation=None)
    assert (arguments[1], arguments[7], arguments[8], saved) == (None, False, True, 0)
    assert_bit_equal("gradient of the bias", grad, torch.full((8,), 3.0))

    ((_, arguments),), _, saved = calls("bias")
    assert (arguments[7], arguments[8], saved) == (False, True, 2)
    ((_, arguments),), _, saved = calls("x")
    assert (arguments[7], arguments[8], saved) == (True, False, 2)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_may_have_any_strides(backend: str, gated: bool) -> None:
    columns = 48 if gated else 24
    leaves = draw(3, 4, columns).requires_grad_(), draw(columns).requires_grad_()
    output = bias_activation_dropout(*leaves, activation="silu", gated=gated, backend=backend)
    wide = draw(3, 4, 30, seed=1)
    for grad in (
        wide[..., :24],
        wide[..., 1:25].transpose(0, 1).contiguous().transpose(0, 1),
        draw(3, 24, 4, seed=2).transpose(1, 2),
        draw(1, 1, 24, seed=3).expand(3, 4, 24),
        torch.ones(()).expand(3, 4, 24),
    ):
        got = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        expected = torch.autograd.grad(output, leaves, grad.contiguous(), retain_graph=True)
        for name, *pair in zip(("x", "bias"), got, expected, strict=True):
            assert_bit_equal(name, *pair)


@st.composite
def random_cases(draw: Any) -> tuple[BiasActivationDropoutCase, torch.dtype]:
    # A single row would make the error of the reference, which the budget is made of, a matter of
    # luck.
    rows = draw(st.integers(2, 17))
    leading = draw(st.sampled_from([(rows,), (2, rows), (3, 1, 2), (2, 3, 2, 2)]))
    edges = [1, 2, 3, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1025]
    width = draw(st.one_of(st.integers(1, 70), st.sampled_from(edges)))
    layouts = ["contiguous", "sliced", "columns_first", "expanded"]
    options: dict[str, Any] = {
        "activation": draw(st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid"])),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "fp32_parameters": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])),
        "offset": draw(st.sampled_from([0.0, 0.0, -3.0, 3.0])),
        "scale": draw(st.sampled_from([0.01, 1.0, 1.0, 30.0])),
        "layout": draw(st.sampled_from(layouts + ["transposed"] * (len(leading) > 1))),
    }
    words = " ".join(f"{k}={v}" for k, v in options.items())
    case = BiasActivationDropoutCase(
        name=f"{leading} {width} {words}", kind="edge", leading=leading, width=width, **options
    )
    return case, draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))


@pytest.mark.parametrize(
    "backend",
    BACKENDS[1:] or [pytest.param("", marks=pytest.mark.skip(reason="no fused backend"))],
)
@given(drawn=random_cases())
def test_any_combination(
    backend: str, drawn: tuple[BiasActivationDropoutCase, torch.dtype]
) -> None:
    case, dtype = drawn
    for numbers in range(3):
        # A case's name decides on its numbers.
        comparisons = check_case(replace(case, name=f"{case.name} {numbers}"), backend, dtype)
        failed = [c for c in comparisons if not c.passed]
        if not failed:
            return
        # The budget is made of the error that the reference happens to have, and with few numbers
        # that may be luck: a wrong kernel is far beyond it, or beyond it with other numbers too.
        assert all(c.share < 2.0 for c in failed), "\n".join(map(str, failed))
    assert not failed, "\n".join(map(str, failed))


def test_threads_do_not_change_a_bit() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    x, bias = draw(600, 96).requires_grad_(), draw(96).requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = bias_activation_dropout(x, bias, activation="gelu", backend="cpu")
            results.append((output, *torch.autograd.grad(output, (x, bias), draw(600, 96, seed=1))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, *pair in zip(("output", "grad_x", "grad_bias"), results[0], other, strict=True):
            assert_bit_equal(name, *pair)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(
        bias_activation_dropout(x, activation="silu", backend="cpu").square().sum(),
        x,
        create_graph=True,
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a tensor, got int"),
        ({"x": torch.zeros(2, 8).long()}, TypeError, "x must have dtype float32, float16"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have shape [..., F] with F >= 1, got []"),
        (
            {"x": torch.zeros(2, 7), "gated": True},
            ValueError,
            "x must have shape [..., 2 F] with F >= 1, got [2, 7]",
        ),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        (
            {"bias": torch.zeros(7)},
            ValueError,
            "bias must have shape [F] with F = 8 (from x), got [7]",
        ),
        (
            {"bias": torch.zeros(4), "gated": True},
            ValueError,
            "bias must have shape [2 F] with F = 4 (from x), got [4]",
        ),
        ({"bias": torch.zeros(8).half()}, TypeError, "bias must have dtype float32"),
        (
            {"bias": torch.zeros(8, device="meta")},
            ValueError,
            "bias must be on the device of x, cpu, got meta",
        ),
        ({"residual": [1.0]}, TypeError, "residual must be a tensor, got list"),
        (
            {"residual": torch.zeros(2, 8), "gated": True},
            ValueError,
            "residual must have the shape of the output, [2, 4], got [2, 8]",
        ),
        (
            {"residual": torch.zeros(2, 8).half()},
            TypeError,
            "residual must have the dtype of x, float32, got float16",
        ),
        (
            {"residual": torch.zeros(2, 8, device="meta")},
            ValueError,
            "residual must be on the device of x, cpu, got meta",
        ),
        (
            {"activation": "tanh"},
            ValueError,
            "activation must be one of relu, gelu, gelu_tanh, silu, sigmoid or None, got 'tanh'",
        ),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
        ({"seed": torch.zeros(2).long()}, ValueError, "seed must have shape [1], got [2]"),
        ({"seed": torch.zeros(1)}, TypeError, "seed must have dtype int64, got float32"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu', expected one of"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:40] if isinstance(value, str) else None,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{OP}: .*" + re.escape(message)):
        bias_activation_dropout(**{"x": torch.zeros(2, 8), **change})


def test_a_named_backend_says_why_it_cannot() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    with pytest.raises(NotImplementedError) as caught:
        bias_activation_dropout(torch.zeros(2, 8, dtype=torch.float64), backend="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{OP}: backend 'cpu' cannot run this call:"
    assert lines[1] == "  x [2, 8] float64 cpu"
    assert "float64" in lines[2]
    assert lines[-1].startswith("  available here: ")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not available here")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "unknown activation tanh"),
        ({"x": None}, "the backward of relu needs x"),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
    ],
)
def test_the_private_calls_check_what_the_public_one_promises(
    change: dict[str, Any], message: str
) -> None:
    call = {
        "grad_output": torch.zeros(2, 8),
        "x": torch.zeros(2, 8),
        "bias": None,
        "seed": None,
        "activation": "relu",
        "gated": False,
        "dropout_p": 0.0,
        "need_grad_x": True,
        "need_grad_bias": True,
        **change,
    }
    with pytest.raises(RuntimeError, match=f"{OP}: .*{message}"):
        torch.ops.fused_attn_C.bias_activation_dropout_backward(*call.values())
