from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import recurrent_cell
from fused_attn.ops.recurrent_cell.cases import CASES, RecurrentLayerCase
from fused_attn.validation import compare, fused_backends

from .suite import OpSuite, RecordFusedCalls, assert_bit_equal

OP = "recurrent_cell"
BACKENDS = ("reference", *fused_backends(OP, "cpu"))
LAYERS = [case.name for case in CASES if isinstance(case, RecurrentLayerCase)]
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


class TestRecurrentCell(OpSuite):
    op = OP
    refusals = frozenset(("triton", name) for name in LAYERS)


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(kind: str, rows: int = 6, size: int = 24) -> dict[str, Any]:
    call: dict[str, Any] = {
        "input_gates": draw(rows, GATES[kind] * size),
        "hidden_gates": draw(rows, GATES[kind] * size, seed=8),
        "kind": kind,
    }
    if kind == "lstm":
        call["cell"] = draw(rows, size, seed=9)
    if kind == "gru":
        call["hidden"] = draw(rows, size, seed=9).tanh()
    return call


def torch_cell(kind: str) -> nn.RNNCellBase:
    torch.manual_seed(5)
    if kind == "lstm":
        return nn.LSTMCell(11, 24)
    if kind == "gru":
        return nn.GRUCell(11, 24)
    return nn.RNNCell(11, 24, nonlinearity=kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", GATES)
def test_equals_the_cells_of_torch(backend: str, kind: Any) -> None:
    module: Any = torch_cell(kind)
    x, hidden, cell = draw(6, 11), draw(6, 24, seed=1).tanh(), draw(6, 24, seed=2)
    leaves = [t.requires_grad_() for t in (x, hidden, cell)] + list(module.parameters())
    expected = module(x, (hidden, cell)) if kind == "lstm" else (module(x, hidden),)
    outputs = recurrent_cell(
        F.linear(x, module.weight_ih, module.bias_ih),
        F.linear(hidden, module.weight_hh, module.bias_hh),
        hidden,
        cell,
        kind=kind,
        backend=backend,
    )
    if kind != "lstm":
        assert outputs[1].shape == (0,)
        outputs = outputs[:1]
    grads = [draw(6, 24, seed=3), draw(6, 24, seed=4)][: len(outputs)]
    torch.testing.assert_close(outputs, expected)
    results = [
        torch.autograd.grad(these, leaves, grads, allow_unused=True)
        for these in (outputs, expected)
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["lstm", "tanh", "relu"])
def test_the_products_may_be_one(backend: str, kind: Any) -> None:
    call = call_of(kind)
    total = call["input_gates"] + call["hidden_gates"]
    one = {**call, "input_gates": total, "hidden_gates": torch.zeros_like(total)}
    expected = recurrent_cell(**call, backend=backend)
    for name, *pair in zip(
        ("hidden", "cell"), recurrent_cell(**one, backend=backend), expected, strict=True
    ):
        assert_bit_equal(name, *pair)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gru_keeps_its_state_where_its_update_gate_is_one(backend: str) -> None:
    call = call_of("gru")
    call["input_gates"][:, 24:48] = 200.0
    new_hidden, _ = recurrent_cell(**call, backend=backend)
    torch.testing.assert_close(new_hidden, call["hidden"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", GATES)
def test_a_row_depends_on_itself_alone(backend: str, kind: Any) -> None:
    """Of 1, 3 and 40 rows the first has the same bits, its gradients too."""
    many = call_of(kind, rows=40, size=37)
    results = []
    for rows in (40, 3, 1):
        call = {n: t[:rows] if isinstance(t, Tensor) else t for n, t in many.items()}
        leaves = [t.clone().requires_grad_() for t in call.values() if isinstance(t, Tensor)]
        names = [n for n, t in call.items() if isinstance(t, Tensor)]
        call |= dict(zip(names, leaves, strict=True))
        outputs = recurrent_cell(**call, backend=backend)
        outputs = outputs if kind == "lstm" else outputs[:1]
        grads = [draw(40, 37, seed=3)[:rows] for _ in outputs]
        gradients = torch.autograd.grad(outputs, leaves, grads)
        results.append([t[:1] for t in (*outputs, *gradients)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_bit_equal("row", got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e30, -0.0])
def test_special_values_are_torchs(backend: str, kind: Any, special: float) -> None:
    call = call_of(kind, rows=1)
    call["input_gates"][:, ::3] = special
    outputs = recurrent_cell(**call, backend=backend)
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in call.items()}
    expected = recurrent_cell(**wide, backend="reference")
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want.float(), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_has_no_gradient_at_zero(backend: str) -> None:
    x = torch.tensor([[-1.0, -0.0, 0.0, 1.0]], requires_grad=True)
    new_hidden, _ = recurrent_cell(x, torch.zeros(1, 4), kind="relu", backend=backend)
    (grad,) = torch.autograd.grad(new_hidden.sum(), x)
    assert grad.tolist() == [[0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_an_lstm_may_be_without_a_gradient(backend: str, used: int) -> None:
    call = call_of("lstm")
    names = ("input_gates", "hidden_gates", "cell")
    leaves = [call[name].requires_grad_() for name in names]
    results = [
        torch.autograd.grad(recurrent_cell(**call, backend=b)[used].sum(), leaves)
        for b in (backend, "reference")
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wider_state_stays_wide(backend: str) -> None:
    lstm, gru = call_of("lstm"), call_of("gru")
    for call in (lstm, gru):
        for name in ("input_gates", "hidden_gates"):
            call[name] = call[name].bfloat16()
    new_hidden, new_cell = recurrent_cell(**lstm, backend=backend)
    assert (new_hidden.dtype, new_cell.dtype) == (torch.bfloat16, torch.float32)
    assert recurrent_cell(**gru, backend=backend)[0].dtype == torch.float32


@pytest.mark.parametrize("forward", BACKENDS[1:])
@pytest.mark.parametrize("backward", BACKENDS[1:])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_any_backward_takes_any_forwards_residuals(forward: str, backward: str, kind: Any) -> None:
    call = call_of(kind)
    names = [name for name, value in call.items() if isinstance(value, Tensor)]
    grad = draw(6, 24, seed=3)

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = {name: call[name].to(dtype).requires_grad_() for name in names}
        outputs = recurrent_cell(**{**call, **leaves}, backend=backend)
        return torch.autograd.grad(outputs[0], list(leaves.values()), grad.to(dtype))

    oracle, low = (gradients(t, "reference") for t in (torch.float64, torch.float32))
    with RecordFusedCalls() as recorder:
        gradients(torch.float32, forward)
    (operator, arguments) = recorder.calls[-1]
    assert operator is torch.ops.fused_attn.recurrent_cell_backward.default
    assert arguments[-1] == forward
    grad_gates, grad_hidden_gates, grad_state = operator(*arguments[:-1], backward)
    results = grad_gates, grad_gates if kind == "lstm" else grad_hidden_gates, grad_state
    for name, *tensors in zip(names, results, oracle, low, strict=True):
        assert compare(name, *tensors).passed, compare(name, *tensors)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_gradient_of_a_state_is_made_where_it_is_wanted(backend: str) -> None:
    call = call_of("lstm")
    call["input_gates"].requires_grad_()
    with RecordFusedCalls() as recorder:
        torch.autograd.grad(recurrent_cell(**call, backend=backend)[0].sum(), call["input_gates"])
    (operator, arguments) = recorder.calls[-1]
    assert arguments[1] is None
    assert operator(*arguments)[2].numel() == 0


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_may_have_any_strides(backend: str) -> None:
    call = call_of("gru", rows=12)
    names = ("input_gates", "hidden_gates", "hidden")
    for name in names:
        call[name] = call[name].view(3, 4, -1).requires_grad_()
    leaves = [call[name] for name in names]
    new_hidden, _ = recurrent_cell(**call, backend=backend)
    for grad in (
        draw(3, 4, 30, seed=1)[..., :24],
        draw(4, 3, 24, seed=1).transpose(0, 1),
        draw(3, 24, 4, seed=2).transpose(1, 2),
        torch.ones(()).expand(3, 4, 24),
    ):
        got = torch.autograd.grad(new_hidden, leaves, grad, retain_graph=True)
        want = torch.autograd.grad(new_hidden, leaves, grad.contiguous(), retain_graph=True)
        for name, *pair in zip(names, got, want, strict=True):
            assert_bit_equal(name, *pair)


def test_threads_do_not_change_a_bit() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    call = call_of("lstm", rows=300, size=96)
    leaves = [call[name].requires_grad_() for name in ("input_gates", "hidden_gates", "cell")]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = recurrent_cell(**call, backend="cpu")
            gradients = torch.autograd.grad(outputs, leaves, [draw(300, 96, seed=1)] * 2)
            results.append((*outputs, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_bit_equal("result", got, want)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_second_derivative_is_refused_and_not_wrong(backend: str) -> None:
    call = call_of("lstm")
    x = call["input_gates"].requires_grad_()
    total = recurrent_cell(**call, backend=backend)[0].square().sum()
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "peephole"}, ValueError, "kind must be one of lstm, gru, tanh, relu, got 'peep"),
        ({"input_gates": 3}, TypeError, "input_gates must be a tensor, got int"),
        (
            {"input_gates": torch.zeros(2, 8).long()},
            TypeError,
            "input_gates must have dtype float32, float16",
        ),
        (
            {"input_gates": torch.zeros(2, 9)},
            ValueError,
            "input_gates must have shape [..., 4 H] with H >= 1, got [2, 9]",
        ),
        (
            {"input_gates": torch.tensor(1.0), "kind": "tanh"},
            ValueError,
            "input_gates must have shape [..., H] with H >= 1, got []",
        ),
        ({"hidden_gates": None}, TypeError, "hidden_gates must be a tensor, got NoneType"),
        (
            {"hidden_gates": torch.zeros(2, 8).half()},
            TypeError,
            "hidden_gates must have the dtype of input_gates, float32, got float16",
        ),
        (
            {"hidden_gates": torch.zeros(2, 8, device="meta")},
            ValueError,
            "hidden_gates must be on the device of input_gates, cpu, got meta",
        ),
        (
            {"hidden_gates": torch.zeros(1, 8)},
            ValueError,
            "hidden_gates must have the shape of input_gates, [2, 8], got [1, 8]",
        ),
        ({"cell": None}, ValueError, "kind 'lstm' needs cell, got None"),
        (
            {"input_gates": torch.zeros(2, 9), "hidden_gates": torch.zeros(2, 9), "kind": "gru"},
            ValueError,
            "kind 'gru' needs hidden, got None",
        ),
        ({"cell": 1.0}, TypeError, "cell must be a tensor, got float"),
        ({"cell": torch.zeros(2, 2).half()}, TypeError, "cell must have dtype float32, got float1"),
        (
            {"cell": torch.zeros(2, 2, device="meta")},
            ValueError,
            "cell must be on the device of input_gates, cpu, got meta",
        ),
        (
            {"cell": torch.zeros(2, 3)},
            ValueError,
            "cell must have shape [2, 2] (from input_gates), got [2, 3]",
        ),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu', expected one of"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:40] if isinstance(value, str) else None,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {
        "input_gates": torch.zeros(2, 8),
        "hidden_gates": torch.zeros(2, 8),
        "cell": torch.zeros(2, 2),
        "kind": "lstm",
    }
    with pytest.raises(error, match=rf"^{OP}: .*" + re.escape(message)):
        recurrent_cell(**{**call, **change})


def test_a_named_backend_says_why_it_cannot() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    gates = torch.zeros(2, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError) as caught:
        recurrent_cell(gates, gates, kind="tanh", backend="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{OP}: backend 'cpu' cannot run this call:"
    assert lines[1] == "  input_gates [2, 8] float64 cpu"
    assert "float64" in lines[2]
    assert lines[-1].startswith("  available here: ")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not available here")
@pytest.mark.parametrize(
    ("kind", "message"), [("peephole", "unknown kind peephole"), ("gru", "gru needs a state")]
)
def test_the_private_calls_check_what_the_public_one_promises(kind: str, message: str) -> None:
    gates = torch.zeros(2, 12)
    with pytest.raises(RuntimeError, match=f"{OP}: {message}"):
        torch.ops.fused_attn_C.recurrent_cell_forward(gates, gates, None, kind)
    with pytest.raises(RuntimeError, match=f"{OP}: {message}"):
        torch.ops.fused_attn_C.recurrent_cell_backward(None, None, gates, gates, None, kind, True)
