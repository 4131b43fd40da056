"""What ``recurrent_layer`` owes beside the shared suite, which runs in ``test_recurrent_cell``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import recurrent_cell, recurrent_layer
from fused_attn.ops.recurrent_cell import layer_is_fused
from fused_attn.validation import fused_backends

from .suite import RecordFusedCalls, assert_bit_equal

OP = "recurrent_layer"
HAS_CPU = "cpu" in fused_backends("recurrent_cell", "cpu")
BACKENDS = ("reference", *(("cpu",) if HAS_CPU else ()))
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
needs_extension = pytest.mark.skipif(not HAS_CPU, reason="the C++ extension is not available here")


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(kind: str, H: int = 24) -> dict[str, Any]:
    columns = GATES[kind] * H
    return {
        "input_gates": draw(9, columns),
        "batch_sizes": torch.tensor([4, 3, 2]),
        "hidden": draw(4, H, seed=1).tanh(),
        "cell": draw(4, H, seed=2) if kind == "lstm" else None,
        "weight": draw(columns, H, seed=3) * H**-0.5,
        "bias": draw(columns, seed=4),
        "kind": kind,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_is_the_cell_step_by_step(backend: str, reverse: bool, kind: Any) -> None:
    """Each sequence by itself, with a product and a ``recurrent_cell`` a step."""
    call = call_of(kind)
    output, final_hidden, final_cell = recurrent_layer(**call, reverse=reverse, backend=backend)
    first = [0, 4, 7]
    for row, length in enumerate((3, 3, 2, 1)):
        hidden = call["hidden"][row : row + 1]
        cell = call["cell"][row : row + 1] if kind == "lstm" else None
        for s in reversed(range(length)) if reverse else range(length):
            gates = call["input_gates"][first[s] + row : first[s] + row + 1]
            product = torch.nn.functional.linear(hidden, call["weight"], call["bias"])
            hidden, new_cell = recurrent_cell(
                gates, product, hidden, cell, kind=kind, backend="reference"
            )
            cell = new_cell if kind == "lstm" else None
            torch.testing.assert_close(output[first[s] + row], hidden[0])
        torch.testing.assert_close(final_hidden[row], hidden[0])
        if cell is not None:
            torch.testing.assert_close(final_cell[row], cell[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_are(backend: str) -> None:
    call = call_of("lstm")
    before = {n: t.clone() for n, t in call.items() if isinstance(t, Tensor)}
    recurrent_layer(**call, backend=backend)
    for name, tensor in before.items():
        assert_bit_equal(name, call[name], tensor)


@needs_extension
@pytest.mark.parametrize("kind", GATES)
def test_only_a_forward_with_a_gradient_saves(kind: Any) -> None:
    call = call_of(kind)
    saved = []
    for needs in (False, True):
        call["weight"].requires_grad_(needs)
        with RecordFusedCalls() as recorder:
            recurrent_layer(**call, backend="cpu")
        ((operator, arguments),) = recorder.calls
        saved.append([t.numel() for t in operator(*arguments)[3:]])
    assert saved[0] == [0, 0, 0]
    assert saved[1] == [9 * 24, 9 * 24 if kind == "lstm" else 0, 9 * 24 * GATES[kind]]


@needs_extension
def test_threads_do_not_change_a_bit() -> None:
    call = call_of("lstm", H=160)
    names = [n for n, t in call.items() if isinstance(t, Tensor) and t.is_floating_point()]
    leaves = [call[name].requires_grad_() for name in names]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, *_ = recurrent_layer(**call, backend="cpu")
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves[:3])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_bit_equal("result", got, want)


@needs_extension
def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    call = call_of("gru")
    x = call["input_gates"].requires_grad_()
    total = recurrent_layer(**call, backend="cpu")[0].square().sum()
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "peephole"}, ValueError, "kind must be one of lstm, gru, tanh, relu, got 'peep"),
        ({"input_gates": 3}, TypeError, "input_gates must be a tensor, got int"),
        (
            {"input_gates": torch.zeros(9, 12).int()},
            TypeError,
            "input_gates must have dtype float32, float16",
        ),
        (
            {"input_gates": torch.zeros(9, 13)},
            ValueError,
            "input_gates must have shape [N, 12] (from hidden), got [9, 13]",
        ),
        ({"batch_sizes": [4, 3, 2]}, TypeError, "batch_sizes must be a tensor, got list"),
        (
            {"batch_sizes": torch.tensor([4, 3, 2]).int()},
            TypeError,
            "batch_sizes must have dtype int64, got int32",
        ),
        (
            {"batch_sizes": torch.tensor([[9]])},
            ValueError,
            "batch_sizes must have shape [S] and be on the cpu, got [1, 1] on cpu",
        ),
        (
            {"batch_sizes": torch.tensor([3, 4, 2])},
            ValueError,
            "batch_sizes must descend from at most 4 sequences (from hidden) to at least 1 and add "
            "up to 9 (from input_gates), got [3, 4, 2]",
        ),
        ({"batch_sizes": torch.tensor([5, 4])}, ValueError, "batch_sizes must descend from at mo"),
        ({"batch_sizes": torch.tensor([4, 3])}, ValueError, "batch_sizes must descend from at mo"),
        ({"batch_sizes": torch.tensor([4, 4, 1, 0])}, ValueError, "batch_sizes must descend from"),
        ({"hidden": torch.zeros(4)}, ValueError, "hidden must have shape [B, H] with H >= 1, got"),
        ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
        ({"cell": None}, ValueError, "kind 'lstm' needs cell, got None"),
        ({"cell": torch.zeros(3, 3)}, ValueError, "cell must have shape [4, 3], got [3, 3]"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": torch.zeros(12, 4)}, ValueError, "weight must have shape [12, 3], got [12, 4"),
        (
            {"weight": torch.zeros(12, 3).half()},
            TypeError,
            "weight must have the dtype of input_gates, float32, got float16",
        ),
        ({"bias": torch.zeros(3)}, ValueError, "bias must have shape [12], got [3]"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu', expected one of"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:40] if isinstance(value, str) else None,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {
        "input_gates": torch.zeros(9, 12),
        "batch_sizes": torch.tensor([4, 3, 2]),
        "hidden": torch.zeros(4, 3),
        "cell": torch.zeros(4, 3),
        "weight": torch.zeros(12, 3),
        "bias": torch.zeros(12),
        "kind": "lstm",
    }
    with pytest.raises(error, match=rf"^{OP}: .*" + re.escape(message)):
        recurrent_layer(**{**call, **change})


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_sizes": torch.tensor([3, 4, 2])}, "batch_sizes must not rise"),
        ({"batch_sizes": torch.tensor([4, 3])}, "batch_sizes must add up to .* 9, got 7"),
        ({"cell": None}, "lstm needs a cell"),
        ({"kind": "peephole"}, "unknown kind peephole"),
    ],
)
def test_the_private_calls_check_what_the_public_one_promises(
    change: dict[str, Any], message: str
) -> None:
    call = {**call_of("lstm"), **change}
    order = ("input_gates", "hidden", "cell", "weight", "bias", "batch_sizes", "kind")
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.fused_attn_C.recurrent_layer_forward(*(call[n] for n in order), False, False)


@needs_extension
def test_a_named_backend_says_why_it_cannot() -> None:
    call = {
        n: t.half() if isinstance(t, Tensor) and n != "batch_sizes" else t
        for n, t in call_of("lstm").items()
    }
    with pytest.raises(NotImplementedError) as caught:
        recurrent_layer(**call, backend="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{OP}: backend 'cpu' cannot run this call:"
    assert lines[1] == "  input_gates [9, 96] float16 cpu"
    assert lines[2] == "  - dtype torch.float16: float32 only"
    assert layer_is_fused(torch.zeros(1))
    assert not layer_is_fused(torch.zeros(1).half())
