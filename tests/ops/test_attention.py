from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import attention
from fused_attn.validation import compare, fused_backends

from .suite import OpSuite, assert_bit_equal

BACKENDS = ["reference", *fused_backends("attention", "cpu")]
FUSED = fused_backends("attention", "cpu")
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
on_each_fused_backend = pytest.mark.parametrize(
    "backend", FUSED or [pytest.param("", marks=pytest.mark.skip(reason="no fused backend here"))]
)


class TestAttention(OpSuite):
    op = "attention"


def random_inputs(
    B: int = 2, H: int = 3, T: int = 21, S: int = 34, D: int = 16, Dv: int = 24, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "query": torch.randn(B, H, T, D, generator=generator),
        "key": torch.randn(B, H, S, D, generator=generator),
        "value": torch.randn(B, H, S, Dv, generator=generator),
    }


def gradients(call: dict[str, Any], backend: str | None) -> dict[str, Tensor]:
    names = [n for n in ("query", "key", "value", "bias") if n in call]
    leaves = {n: call[n].detach().requires_grad_() for n in names}
    output = attention(**{**call, **leaves}, backend=backend)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
    return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


def assert_agree(actual: dict[str, Tensor], call: dict[str, Any]) -> None:
    """Within the budget of the oracle's on `call`."""
    wide = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }
    oracle, same = gradients(wide, "reference"), gradients(call, "reference")
    failed = [
        str(c) for c in (compare(n, actual[n], oracle[n], same[n]) for n in actual) if not c.passed
    ]
    assert not failed, "\n".join(failed)


# --- laws ---------------------------------------------------------------------------------------


@on_each_backend
@pytest.mark.parametrize(("T", "S"), [(21, 34), (50, 20), (130, 300)])
def test_causal_is_a_mask(backend: str, T: int, S: int) -> None:
    inputs = random_inputs(T=T, S=S)
    mask = torch.ones(T, S, dtype=torch.bool).tril()
    assert_agree(gradients({**inputs, "is_causal": True}, backend), {**inputs, "mask": mask})
    assert_agree(gradients({**inputs, "mask": mask}, backend), {**inputs, "is_causal": True})


@on_each_backend
def test_lengths_are_a_mask(backend: str) -> None:
    inputs = random_inputs(B=3, T=130, S=300)
    query_lengths, key_lengths = torch.tensor([130, 1, 70]), torch.tensor([299, 300, 0])
    rows = torch.arange(130) < query_lengths[:, None]
    columns = torch.arange(300) < key_lengths[:, None]
    mask = (rows[:, :, None] & columns[:, None, :])[:, None]
    lengths = {"query_lengths": query_lengths, "key_lengths": key_lengths}
    assert_agree(gradients({**inputs, **lengths}, backend), {**inputs, "mask": mask})
    assert_agree(gradients({**inputs, "mask": mask}, backend), {**inputs, **lengths})


@on_each_backend
def test_lengths_beyond_the_tensor_count_as_its_size(backend: str) -> None:
    inputs = random_inputs()
    beyond = torch.tensor([1000, 2**40])
    expected = gradients(inputs, backend)
    actual = gradients({**inputs, "query_lengths": beyond, "key_lengths": beyond}, backend)
    for name, tensor in expected.items():
        assert_bit_equal(name, actual[name], tensor)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_integer_type(backend: str, dtype: torch.dtype) -> None:
    call = {**random_inputs(), "key_lengths": torch.tensor([5, 34], dtype=dtype)}
    assert_agree(gradients(call, backend), {**call, "key_lengths": torch.tensor([5, 34])})


@on_each_backend
def test_order_of_keys_does_not_matter(backend: str) -> None:
    inputs = random_inputs(S=300)
    bias = torch.randn(21, 300, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    shuffled = {
        "query": inputs["query"],
        "key": inputs["key"][:, :, order],
        "value": inputs["value"][:, :, order],
        "bias": bias[:, order],
    }
    actual = gradients(shuffled, backend)
    back = order.argsort()
    for name in ("key", "value"):
        actual[name] = actual[name][:, :, back]
    actual["bias"] = actual["bias"][:, back]
    assert_agree(actual, {**inputs, "bias": bias})


@on_each_backend
def test_a_query_alone_gives_what_it_gives_among_others(backend: str) -> None:
    inputs = random_inputs(T=60, S=300)
    whole = attention(**inputs, backend=backend)
    same = attention(**inputs, backend="reference")
    oracle = attention(**{n: t.double() for n, t in inputs.items()}, backend="reference")
    for t in (0, 17, 59):
        row = slice(t, t + 1)
        alone = attention(
            inputs["query"][:, :, row], inputs["key"], inputs["value"], backend=backend
        )
        for result in (alone, whole[:, :, row]):
            comparison = compare("row", result, oracle[:, :, row], same[:, :, row])
            assert comparison.passed, str(comparison)


@on_each_fused_backend
def test_a_sentence_alone_gives_the_same_bits_as_in_a_batch(backend: str) -> None:
    call = {**random_inputs(B=20, H=1, T=40, S=40), "is_causal": True}
    batch = attention(**call, backend=backend)
    for b in (0, 19):
        one = {n: v[b : b + 1] if isinstance(v, Tensor) else v for n, v in call.items()}
        assert_bit_equal("output", attention(**one, backend=backend), batch[b : b + 1])


@on_each_fused_backend
def test_bias_gradient_has_the_shape_of_the_bias(backend: str) -> None:
    # Several tiles of keys, several blocks and chunks of queries.
    inputs = random_inputs(B=2, H=2, T=400, S=270, D=8, Dv=8)
    generator = torch.Generator().manual_seed(3)
    for shape in itertools.product((1, 2), (1, 2), (1, 400), (1, 270)):
        call = {**inputs, "bias": torch.randn(shape, generator=generator), "is_causal": True}
        call["query_lengths"] = torch.tensor([400, 250])
        actual = gradients(call, backend)
        assert actual["bias"].shape == shape
        if shape[-1] == 1:
            # A bias that is the same for all keys changes nothing: its gradient is rounding error.
            assert actual.pop("bias").abs().max() < 1e-3
        assert_agree(actual, call)
    for shape in ((270,), (400, 270), (2, 1, 270), (1,), ()):
        call = {**inputs, "bias": torch.randn(shape, generator=generator)}
        assert gradients(call, backend)["bias"].shape == shape


@on_each_fused_backend
def test_the_number_of_threads_does_not_change_a_bit(backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for shape in ((2, 1, 1, 70), (1, 1, 500, 70), (70,)):
        call = {
            **random_inputs(B=2, H=2, T=500, S=70, D=8, Dv=8),
            "bias": torch.randn(shape, generator=generator),
        }
        before = torch.get_num_threads()
        expected = gradients(call, backend)
        try:
            torch.set_num_threads(1)
            actual = gradients(call, backend)
        finally:
            torch.set_num_threads(before)
        for name, tensor in expected.items():
            assert_bit_equal(name, actual[name], tensor)


@on_each_backend
def test_nan_in_sight_is_not_hidden(backend: str) -> None:
    inputs = random_inputs()
    inputs["query"][0, 0, 3] = math.nan
    output, lse = attention(**inputs, return_lse=True, backend=backend)
    assert output[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    output[0, 0, 3] = 0.0
    assert output.isfinite().all()


@on_each_fused_backend
def test_backward_skips_gradients_nobody_asked_for(backend: str) -> None:
    inputs = random_inputs()
    inputs["value"].requires_grad_()
    attention(**inputs, backend=backend).sum().backward()
    assert inputs["value"].grad is not None
    assert inputs["query"].grad is None


@on_each_fused_backend
def test_no_second_derivative(backend: str) -> None:
    inputs = {n: t.requires_grad_() for n, t in random_inputs().items()}
    output = attention(**inputs, backend=backend)
    (gradient,) = torch.autograd.grad(output.sum(), inputs["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"attention: .* no second derivative"):
        gradient.sum().backward()


@on_each_backend
def test_lse_has_no_gradient(backend: str) -> None:
    inputs = {n: t.requires_grad_() for n, t in random_inputs().items()}
    _, lse = attention(**inputs, return_lse=True, backend=backend)
    assert not lse.requires_grad


_EVERY_CASE = """
import sys
from fused_attn import _extension
from fused_attn.validation import validate
assert _extension.load() is None
assert _extension.cpu_instruction_set() == sys.argv[1], _extension.cpu_instruction_set()
rows = list(validate(["attention"], ["cpu"]))
assert rows
bad = [(r.case, r.dtype, r.verdict, r.detail) for r in rows if r.verdict != "passed"]
sys.exit("\\n".join(map(str, bad)) or 0)
"""


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("capability", "name"), [("default", "baseline"), ("avx2", "avx2")], ids=["baseline", "avx2"]
)
def test_every_instruction_set(capability: str, name: str) -> None:
    if name not in torch.ops.fused_attn_C.compiled_instruction_sets():
        pytest.skip(f"this build has no {name} kernels")
    if name != "baseline" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip(f"this machine has no {name}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", _EVERY_CASE, name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- refusals and errors ------------------------------------------------------------------------


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "dropout_p > 0"),
        ({"D": 257}, "head size 257 > 256"),
        ({"Dv": 300}, "head size 300 of value > 256"),
    ],
)
def test_cpu_refuses_and_the_default_falls_back(change: dict[str, Any], reason: str) -> None:
    sizes = {n: v for n, v in change.items() if n in ("D", "Dv")}
    flags = {n: v for n, v in change.items() if n not in sizes}
    inputs = random_inputs(T=3, S=4, **sizes)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        attention(**inputs, **flags, backend="cpu")
    seed = torch.zeros(1, dtype=torch.int64)
    assert_bit_equal(
        "output",
        attention(**inputs, **flags, seed=seed),
        attention(**inputs, **flags, seed=seed, backend="reference"),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
        ({"query": torch.zeros(2, 3, 4)}, ValueError, "query must have shape [B, H, T, D]"),
        (
            {"query": torch.zeros(2, 3, 21, 16, dtype=torch.int32)},
            TypeError,
            "query must have dtype float32, float16, bfloat16 or float64, got int32",
        ),
        (
            {"key": torch.zeros(2, 3, 34, 16, dtype=torch.float16)},
            TypeError,
            "key must have the dtype of query, float32, got float16",
        ),
        (
            {"value": torch.zeros(2, 3, 34, 24, device="meta")},
            ValueError,
            "value must be on the device of query, cpu, got meta",
        ),
        (
            {"key": torch.zeros(2, 3, 34, 8)},
            ValueError,
            "key must have shape [B, H, S, D] with B = 2, H = 3, D = 16 (from query), got "
            "[2, 3, 34, 8]",
        ),
        (
            {"value": torch.zeros(2, 3, 33, 24)},
            ValueError,
            "value must have shape [B, H, S, Dv] with B = 2, H = 3 (from query), S = 34 (from "
            "key), got [2, 3, 33, 24]",
        ),
        ({"mask": 1}, TypeError, "mask must be a tensor, got int"),
        ({"mask": torch.zeros(21, 34)}, TypeError, "mask must have dtype bool, got float32"),
        (
            {"mask": torch.zeros(2, 21, 34, dtype=torch.bool)},
            ValueError,
            "mask must be broadcastable to [B, H, T, S] = [2, 3, 21, 34], got [2, 21, 34]",
        ),
        (
            {"mask": torch.zeros(21, 34, dtype=torch.bool, device="meta")},
            ValueError,
            "mask must be on the device of query, cpu, got meta",
        ),
        (
            {"bias": torch.zeros(21, 34, dtype=torch.float16)},
            TypeError,
            "bias must have dtype float32 or float32, got float16",
        ),
        (
            {"bias": torch.zeros(1, 1, 1, 21, 34)},
            ValueError,
            "bias must be broadcastable to [B, H, T, S] = [2, 3, 21, 34], got [1, 1, 1, 21, 34]",
        ),
        (
            {"query_lengths": torch.zeros(2)},
            TypeError,
            "query_lengths must have dtype int32 or int64, got float32",
        ),
        (
            {"key_lengths": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "key_lengths must have shape [B] with B = 2 (from query), got [3]",
        ),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ({"seed": torch.zeros(1)}, TypeError, "seed must have dtype int64, got float32"),
        (
            {"seed": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            "seed must have shape [1], got [2]",
        ),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"attention: {message}")):
        attention(**{**random_inputs(), **change})
