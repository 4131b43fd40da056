from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fused_attn import BlockMask, attention
from fused_attn.ops.attention import cases as attention_cases
from fused_attn.ops.attention.reference import dropout_mask
from fused_attn.validation import case_inputs, compare, fused_backends, op_cases, run_case

from .suite import OpSuite, assert_bit_equal

BACKENDS = ["reference", *fused_backends("attention", "cpu")]
FUSED = fused_backends("attention", "cpu")
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
on_each_fused_backend = pytest.mark.parametrize(
    "backend", FUSED or [pytest.param("", marks=pytest.mark.skip(reason="no fused backend here"))]
)


class TestAttention(OpSuite):
    op = "attention"
    refused_dtypes: ClassVar = {"cuda": (torch.float32,)}


def dtype_of(backend: str) -> torch.dtype:
    """The most exact one that the backend computes in."""
    return torch.float16 if backend == "cuda" else torch.float32


def random_inputs(
    backend: str = "reference",
    B: int = 2,
    H: int = 3,
    T: int = 21,
    S: int = 34,
    D: int = 16,
    Dv: int = 24,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype_of(backend))
        for name, shape in (
            ("query", (B, H, T, D)),
            ("key", (B, H, S, D)),
            ("value", (B, H, S, Dv)),
        )
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
    inputs = random_inputs(backend, T=T, S=S)
    mask = torch.ones(T, S, dtype=torch.bool).tril()
    assert_agree(gradients({**inputs, "is_causal": True}, backend), {**inputs, "mask": mask})
    assert_agree(gradients({**inputs, "mask": mask}, backend), {**inputs, "is_causal": True})


@on_each_backend
def test_lengths_are_a_mask(backend: str) -> None:
    inputs = random_inputs(backend, B=3, T=130, S=300)
    query_lengths, key_lengths = torch.tensor([130, 1, 70]), torch.tensor([299, 300, 0])
    rows = torch.arange(130) < query_lengths[:, None]
    columns = torch.arange(300) < key_lengths[:, None]
    mask = (rows[:, :, None] & columns[:, None, :])[:, None]
    lengths = {"query_lengths": query_lengths, "key_lengths": key_lengths}
    assert_agree(gradients({**inputs, **lengths}, backend), {**inputs, "mask": mask})
    assert_agree(gradients({**inputs, "mask": mask}, backend), {**inputs, **lengths})


@on_each_backend
def test_lengths_that_nobody_checked_count_as_the_size(backend: str) -> None:
    # On a GPU and in a compiled graph they are not read in advance.
    inputs = random_inputs(backend)
    beyond = torch.tensor([1000, 2**40])
    call = torch.compile(
        lambda **given: attention(**given, backend=backend), backend="eager", fullgraph=True
    )
    actual = call(**inputs, query_lengths=beyond, key_lengths=beyond)
    assert_bit_equal("output", actual, attention(**inputs, backend=backend))


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_integer_type(backend: str, dtype: torch.dtype) -> None:
    call = {**random_inputs(backend), "key_lengths": torch.tensor([5, 34], dtype=dtype)}
    assert_agree(gradients(call, backend), {**call, "key_lengths": torch.tensor([5, 34])})


@on_each_backend
def test_order_of_keys_does_not_matter(backend: str) -> None:
    inputs = random_inputs(backend, S=300)
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
    inputs = random_inputs(backend, T=60, S=300)
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
    call = {**random_inputs(backend, B=20, H=1, T=40, S=40), "is_causal": True}
    batch = attention(**call, backend=backend)
    for b in (0, 19):
        one = {n: v[b : b + 1] if isinstance(v, Tensor) else v for n, v in call.items()}
        assert_bit_equal("output", attention(**one, backend=backend), batch[b : b + 1])


@on_each_fused_backend
def test_bias_gradient_has_the_shape_of_the_bias(backend: str) -> None:
    # Several tiles of keys, several blocks and chunks of queries; of the interpreter, which takes
    # its time for each, two by two.
    T, S = (150, 140) if backend == "triton" else (400, 270)
    inputs = random_inputs(backend, B=2, H=2, T=T, S=S, D=8, Dv=8)
    generator = torch.Generator().manual_seed(3)
    for shape in itertools.product((1, 2), (1, 2), (1, T), (1, S)):
        call = {**inputs, "bias": torch.randn(shape, generator=generator), "is_causal": True}
        call["query_lengths"] = torch.tensor([T, 5 * T // 8])
        actual = gradients(call, backend)
        assert actual["bias"].shape == shape
        if shape[-1] == 1:
            # A bias that is the same for all keys changes nothing: its gradient is rounding error.
            assert actual.pop("bias").abs().max() < 1e-3
        assert_agree(actual, call)
    for shape in ((S,), (T, S), (2, 1, S), (1,), ()):
        call = {**inputs, "bias": torch.randn(shape, generator=generator)}
        assert gradients(call, backend)["bias"].shape == shape


@on_each_fused_backend
def test_the_number_of_threads_does_not_change_a_bit(backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for shape in ((2, 1, 1, 70), (1, 1, 500, 70), (70,)):
        call = {
            **random_inputs(backend, B=2, H=2, T=500, S=70, D=8, Dv=8),
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
    inputs = random_inputs(backend)
    inputs["query"][0, 0, 3] = math.nan
    output, lse = attention(**inputs, return_lse=True, backend=backend)
    assert output[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    output[0, 0, 3] = 0.0
    assert output.isfinite().all()


@on_each_fused_backend
def test_backward_skips_gradients_nobody_asked_for(backend: str) -> None:
    inputs = random_inputs(backend)
    inputs["value"].requires_grad_()
    attention(**inputs, backend=backend).sum().backward()
    assert inputs["value"].grad is not None
    assert inputs["query"].grad is None


@on_each_fused_backend
def test_no_second_derivative(backend: str) -> None:
    inputs = {n: t.requires_grad_() for n, t in random_inputs(backend).items()}
    output = attention(**inputs, backend=backend)
    (gradient,) = torch.autograd.grad(output.sum(), inputs["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"attention: .* no second derivative"):
        gradient.sum().backward()


@on_each_backend
def test_halves_merge_by_their_lse(backend: str) -> None:
    inputs = random_inputs(backend, S=40)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    parts = [
        attention(
            leaves["query"],
            leaves["key"][:, :, half],
            leaves["value"][:, :, half],
            return_lse=True,
            backend=backend,
        )
        for half in (slice(0, 25), slice(25, 40))
    ]
    lse = torch.stack([part[1] for part in parts])
    shares = lse.softmax(dim=0)[..., None]
    merged = (shares * torch.stack([part[0] for part in parts])).sum(dim=0)
    cotangent = torch.randn(merged.shape, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad(merged, list(leaves.values()), cotangent)
    actual = {"output": merged.detach(), **dict(zip(leaves, grads, strict=True))}
    assert_agree(actual, {n: t.detach() for n, t in inputs.items()})


@on_each_backend
@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
@pytest.mark.parametrize(
    ("is_causal", "window"),
    [(True, None), (False, (5, 9)), (True, (60, 3)), (False, (None, 0)), (False, (0, None))],
)
def test_windows_are_masks(
    backend: str, align: str, is_causal: bool, window: tuple[int | None, int | None] | None
) -> None:
    inputs = random_inputs(backend, B=3, T=90, S=150)
    lengths = {
        "query_lengths": torch.tensor([90, 33, 80]),
        "key_lengths": torch.tensor([150, 140, 20]),
    }
    call = {**inputs, **lengths, "is_causal": is_causal, "window": window, "align": align}
    mask = torch.zeros(3, 1, 90, 150, dtype=torch.bool)
    left, right = window or (None, None)
    for b, (queries, keys) in enumerate(zip(*map(Tensor.tolist, lengths.values()), strict=True)):
        for t in range(queries):
            diagonal = t + (keys - queries if align == "lower_right" else 0)
            first = 0 if left is None else max(diagonal - left, 0)
            last = keys if right is None else diagonal + right + 1
            last = min(last, diagonal + 1) if is_causal else last
            mask[b, 0, t, first : max(min(last, keys), 0)] = True
    assert_agree(gradients(call, backend), {**inputs, "mask": mask})
    assert_agree(gradients({**inputs, "mask": mask}, backend), call)


@on_each_backend
def test_a_block_mask_is_its_mask(backend: str) -> None:
    inputs = random_inputs(backend, B=2, H=2, T=300, S=270, D=8, Dv=8)
    mask = torch.rand(2, 1, 300, 270, generator=torch.Generator().manual_seed(5)) < 0.3
    mask[:, :, :128, 128:] = False
    mask[0, :, 128:256, :128] = True
    mask[:, :, 260:] = False
    call = {**inputs, "block_mask": BlockMask.from_mask(mask)}
    assert_agree(gradients(call, backend), {**inputs, "mask": mask})


@on_each_backend
def test_a_graph_is_its_neighbourhoods(backend: str) -> None:
    inputs = random_inputs(backend, B=1, H=1, T=40, S=40)
    edges = torch.tensor([[0, 0, 7, 39, 7], [1, 5, 7, 0, 7]])
    output = attention(**inputs, block_mask=BlockMask.from_edges(edges, 40, 40), backend=backend)
    value = inputs["value"][0, 0]
    torch.testing.assert_close(output[0, 0, 7], value[7])
    torch.testing.assert_close(output[0, 0, 39], value[0])
    assert output[0, 0, 0].abs().max() > 0
    others = [t for t in range(40) if t not in (0, 7, 39)]
    assert not output[0, 0, others].any()


@on_each_backend
def test_grouped_heads_are_repeated_heads(backend: str) -> None:
    inputs = random_inputs(backend, H=6)
    few = {**inputs, "key": inputs["key"][:, :2], "value": inputs["value"][:, :2]}
    many = {n: t if n == "query" else t.repeat_interleave(3, dim=1) for n, t in few.items()}
    actual = gradients(few, backend)
    expected = gradients({n: t.double() for n, t in many.items()}, "reference")
    for name in ("key", "value"):
        expected[name] = expected[name].unflatten(1, (2, 3)).sum(dim=2)
    same = gradients(few, "reference")
    for name, tensor in actual.items():
        comparison = compare(name, tensor, expected[name], same[name])
        assert comparison.passed, str(comparison)


@on_each_backend
def test_alibi_is_a_bias(backend: str) -> None:
    inputs = random_inputs(backend, T=30, S=50)
    slopes = torch.tensor([0.5, 0.25, 2.0])
    distance = torch.arange(50) - torch.arange(30)[:, None] - 20
    call = {**inputs, "alibi_slopes": slopes, "align": "lower_right", "is_causal": True}
    bias = -slopes[:, None, None] * distance.abs()
    actual = gradients({**call}, backend)
    want = {**call, "bias": bias}
    del want["alibi_slopes"]
    actual["bias"] = gradients(want, backend)["bias"]
    assert_agree(actual, want)


def packed_call(backend: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same sequences padded and packed."""
    queries, keys = [20, 0, 7, 33], [11, 5, 40, 33]
    inputs = random_inputs(backend, B=4, T=33, S=40)
    padded = {
        **inputs,
        "query_lengths": torch.tensor(queries),
        "key_lengths": torch.tensor(keys),
        **options,
    }
    packed = {
        n: torch.cat([x[:, :length].transpose(0, 1) for x, length in zip(t, sizes, strict=True)])
        for n, t, sizes in (
            ("query", inputs["query"], queries),
            ("key", inputs["key"], keys),
            ("value", inputs["value"], keys),
        )
    }
    offsets = {
        "query_offsets": torch.tensor([0, *itertools.accumulate(queries)]),
        "key_offsets": torch.tensor([0, *itertools.accumulate(keys)]).int(),
        "max_queries": 33,
        "max_keys": 40,
    }
    return padded, {**packed, **offsets, **options}


@on_each_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "align": "lower_right"},
        {"dropout_p": 0.3, "seed": torch.tensor([5]), "window": (9, 2)},
    ],
    ids=["plain", "causal", "dropout"],
)
def test_packed_equals_padded(backend: str, options: dict[str, Any]) -> None:
    padded, packed = packed_call(backend, **options)
    whole = gradients(padded, backend)
    parts = gradients(packed, backend)
    starts = {"query": packed["query_offsets"], "key": packed["key_offsets"]}
    for name, side in (("output", "query"), ("query", "query"), ("key", "key"), ("value", "key")):
        for b, (first, last) in enumerate(itertools.pairwise(starts[side].tolist())):
            if name == "output":
                got, want = parts[name][first:last], whole[name][b, :, : last - first]
                torch.testing.assert_close(got.transpose(0, 1), want)
    # Gradients have cotangents of their own layout: compare with the reference in that layout.
    assert_agree(parts, packed)


@on_each_backend
def test_nested_equals_packed(backend: str) -> None:
    _, packed = packed_call(backend, is_causal=True)
    names = ("query", "key", "value")
    leaves = {n: packed[n].clone().requires_grad_() for n in names}
    query = torch.nested.nested_tensor_from_jagged(leaves["query"], packed["query_offsets"])
    offsets = packed["key_offsets"].long()
    key, value = (
        torch.nested.nested_tensor_from_jagged(leaves[n], offsets) for n in ("key", "value")
    )
    output, weights = attention(
        *(t.transpose(1, 2) for t in (query, key, value)),
        is_causal=True,
        return_weights=True,
        backend=backend,
    )
    assert output.is_nested
    assert output.shape[:2] == (4, 3)
    expected, same_weights = attention(**packed, return_weights=True, backend=backend)
    assert_bit_equal("output", output.transpose(1, 2).values(), expected)
    assert_bit_equal("weights", weights, same_weights)
    grads = torch.autograd.grad(output.values().square().sum(), list(leaves.values()))
    plain = {n: packed[n].clone().requires_grad_() for n in names}
    loss = attention(**{**packed, **plain}, backend=backend).square().sum()
    for name, a, b in zip(
        names, grads, torch.autograd.grad(loss, list(plain.values())), strict=True
    ):
        assert_bit_equal(name, a, b)


@on_each_backend
@pytest.mark.parametrize("shape", [(2, 2, 5, 37), (1, 3, 150, 256), (1, 1, 3, 1)])
def test_drops_what_philox_says_in_every_backend(
    backend: str, shape: tuple[int, int, int, int]
) -> None:
    B, H, T, S = shape
    seed = torch.tensor([2**40 + 11])
    # Equal weights of unit vectors: the output shows each weight by itself.
    output = attention(
        torch.zeros(B, H, T, 8).to(dtype_of(backend)),
        torch.zeros(B, H, S, 8).to(dtype_of(backend)),
        torch.eye(S).to(dtype_of(backend)).expand(B, H, S, S),
        dropout_p=0.3,
        seed=seed,
        backend=backend,
    )
    kept = dropout_mask(seed, shape, 0.3)
    assert_bit_equal("mask", output != 0.0, kept)
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1.0 / (0.7 * S)))


@on_each_backend
def test_dropout_follows_the_generator(backend: str) -> None:
    inputs = random_inputs(backend)
    torch.manual_seed(3)
    first = attention(**inputs, dropout_p=0.5, backend=backend)
    second = attention(**inputs, dropout_p=0.5, backend=backend)
    torch.manual_seed(3)
    assert_bit_equal("output", attention(**inputs, dropout_p=0.5, backend=backend), first)
    assert not torch.equal(first, second)


@on_each_backend
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "relu"])
def test_weights_make_the_output(backend: str, activation: str) -> None:
    call = {
        **random_inputs(backend, H=4),
        "activation": activation,
        "is_causal": True,
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.0, 1.0]),
        "block_mask": BlockMask.from_mask(torch.rand(4, 21, 34) < 0.8),
        "bias": torch.randn(4, 1, 34),
    }
    call["key"], call["value"] = call["key"][:, :2], call["value"][:, :2]
    output, weights = attention(**call, return_weights=True, backend=backend)
    value = call["value"].repeat_interleave(2, dim=1)
    # Weights and output are rounded.
    tolerance = 16 * torch.finfo(output.dtype).eps
    torch.testing.assert_close(weights @ value, output, rtol=tolerance, atol=tolerance)
    mean = attention(**call, return_weights="mean", backend=backend)[1]
    torch.testing.assert_close(mean, weights.mean(dim=1))


@on_each_backend
def test_weights_have_the_gradient_of_the_reference(backend: str) -> None:
    inputs = random_inputs(backend)

    def gradients_of(name: str, precision: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [inputs[n].to(precision).requires_grad_() for n in ("query", "key")]
        _, weights = attention(
            *leaves,
            inputs["value"].to(precision),
            is_causal=True,
            return_weights=True,
            backend=name,
        )
        return torch.autograd.grad(weights.square().sum(), leaves)

    exact = gradients_of("reference", torch.float64)
    same = gradients_of("reference", dtype_of(backend))
    got = gradients_of(backend, dtype_of(backend))
    for name, *tensors in zip(("query", "key"), got, exact, same, strict=True):
        comparison = compare(name, *tensors)
        assert comparison.passed, str(comparison)


_PEAK = """
import resource, sys, torch
from fused_attn import attention
torch.set_num_threads(2)
def run(T):
    q, k, v = (torch.randn(1, 1, T, 16, requires_grad=True) for _ in range(3))
    attention(q, k, v, is_causal=True, backend=sys.argv[1]).sum().backward()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(16384)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
def test_memory_grows_with_the_length_and_not_its_square() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, "cpu"], capture_output=True, text=True, check=True
    )
    # 16384 x 16384 fp32 weights would be 1 GiB; a tensor [T, 16] is 1 MiB.
    assert int(done.stdout) < 64 * 1024, f"{done.stdout} KiB"


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
            "key must have shape [B, Hk, S, D] with B = 2, Hk a divisor of 3, D = 16 (from query), "
            "got [2, 3, 34, 8]",
        ),
        (
            {"value": torch.zeros(2, 3, 33, 24)},
            ValueError,
            "value must have shape [B, Hk, S, Dv] with B = 2, Hk = 3, S = 34 (from key), got "
            "[2, 3, 33, 24]",
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
            "bias must have dtype float32, got float16",
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
        (
            {"key": torch.zeros(2, 2, 34, 16), "value": torch.zeros(2, 2, 34, 16)},
            ValueError,
            "key must have shape [B, Hk, S, D] with B = 2, Hk a divisor of 3",
        ),
        (
            {"key_lengths": torch.tensor([34, 35])},
            ValueError,
            "key_lengths must lie within 0 and 34, got 35",
        ),
        (
            {"query_lengths": torch.tensor([-1, 3])},
            ValueError,
            "query_lengths must lie within 0 and 21, got -1",
        ),
        ({"window": 3}, TypeError, "window must be a pair (left, right), got 3"),
        ({"window": (1, 2.0)}, TypeError, "window must hold integers or None, got (1, 2.0)"),
        ({"window": (True, 2)}, TypeError, "window must hold integers or None, got (True, 2)"),
        ({"window": (3, -1)}, ValueError, "window must not be negative, got (3, -1)"),
        ({"align": "centre"}, ValueError, "align must be one of upper_left, lower_right, got"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be positive and finite, got inf"),
        ({"activation": "tanh"}, ValueError, "activation must be one of softmax, sigmoid, relu"),
        (
            {"activation": "relu", "return_lse": True},
            ValueError,
            "return_lse needs the activation 'softmax', got 'relu'",
        ),
        (
            {"return_weights": "sum"},
            ValueError,
            "return_weights must be a bool or 'mean', got 'sum'",
        ),
        ({"block_mask": torch.ones(21, 34)}, TypeError, "block_mask must be a BlockMask, got Ten"),
        (
            {"block_mask": BlockMask.from_mask(torch.ones(21, 35, dtype=torch.bool))},
            ValueError,
            "block_mask must be broadcastable to [B, H, T, S] = [2, 3, 21, 34], got [1, 1, 21, 35]",
        ),
        (
            {"block_mask": BlockMask.from_mask(torch.ones(21, 34, dtype=torch.bool)).to("meta")},
            ValueError,
            "block_mask must be on the device of query, cpu, got meta",
        ),
        ({"alibi_slopes": 1.0}, TypeError, "alibi_slopes must be a tensor, got float"),
        (
            {"alibi_slopes": torch.zeros(3).half()},
            TypeError,
            "alibi_slopes must have dtype float32, got float16",
        ),
        (
            {"alibi_slopes": torch.zeros(3, device="meta")},
            ValueError,
            "alibi_slopes must be on the device of query, cpu, got meta",
        ),
        (
            {"alibi_slopes": torch.zeros(2)},
            ValueError,
            "alibi_slopes must have shape [H] = [3] or [B, H] = [2, 3] (from query), got [2]",
        ),
        (
            {"alibi_slopes": torch.zeros(3, requires_grad=True)},
            ValueError,
            "alibi_slopes must not require a gradient: they have none",
        ),
        ({"max_keys": 3}, ValueError, "max_queries and max_keys go with offsets, got none"),
        (
            {"query_offsets": torch.tensor([0, 3])},
            ValueError,
            "query_offsets and key_offsets go together, got one of them",
        ),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
        (
            {"seed": torch.zeros(1, dtype=torch.int64, device="meta")},
            ValueError,
            "seed must be on the device of query, cpu, got meta",
        ),
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(1, 2, 3, 4)}, ValueError, "query must have shape [N, H, D]"),
        (
            {"key": torch.zeros(89, 2, 16)},
            ValueError,
            "key must have shape [M, Hk, D] with Hk a divisor of 3, D = 16 (from query), got "
            "[89, 2, 16]",
        ),
        (
            {"value": torch.zeros(88, 3, 16)},
            ValueError,
            "value must have shape [M, Hk, Dv] with M = 89, Hk = 3 (from key), got [88, 3, 16]",
        ),
        (
            {"key_lengths": torch.zeros(4).long()},
            ValueError,
            "offsets already say the lengths: give no lengths with them",
        ),
        ({"key_offsets": [0, 1]}, TypeError, "key_offsets must be a tensor, got list"),
        (
            {"key_offsets": torch.zeros(5)},
            TypeError,
            "key_offsets must have dtype int32 or int64, got float32",
        ),
        (
            {"key_offsets": torch.zeros(4).long()},
            ValueError,
            "key_offsets must have shape [B + 1], that of query_offsets, got [4]",
        ),
        (
            {"query_offsets": torch.tensor([0, 5, 4, 20, 60])},
            ValueError,
            "query_offsets must ascend within 0 and 60 rows, got [0, 5, 4, 20, 60]",
        ),
        (
            {"query_offsets": torch.tensor([0, 5, 14, 20, 61])},
            ValueError,
            "query_offsets must ascend within 0 and 60 rows, got [0, 5, 14, 20, 61]",
        ),
        (
            {"max_keys": -1},
            ValueError,
            "max_queries and max_keys must not be negative, got -1",
        ),
        (
            {"query_offsets": torch.zeros(5, dtype=torch.int64, device="meta")},
            ValueError,
            "query_offsets must be on the device of query, cpu, got meta",
        ),
    ],
)
def test_errors_of_packed_batches(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(f"attention: {message}")):
        attention(**{**packed_call("reference")[1], **change})


def test_errors_of_nested_tensors() -> None:
    nested = torch.nested.nested_tensor_from_jagged(torch.zeros(9, 2, 4), torch.tensor([0, 4, 9]))
    other = torch.nested.nested_tensor_from_jagged(torch.zeros(9, 2, 4), torch.tensor([0, 3, 9]))
    right, wrong = nested.transpose(1, 2), other.transpose(1, 2)
    with pytest.raises(TypeError, match="attention: key must be nested as query is"):
        attention(right, torch.zeros(2, 2, 5, 4), right)
    with pytest.raises(ValueError, match="attention: query must be a jagged tensor"):
        attention(nested, nested, nested)
    with pytest.raises(ValueError, match="attention: nested tensors already say the lengths"):
        attention(right, right, right, key_lengths=torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="attention: value must have the sequence lengths of key"):
        attention(right, right, wrong)


@pytest.mark.parametrize("name", ["encoder_padded", "relative_positions", "graph", "primes_causal"])
def test_the_reference_of_a_large_case_takes_a_head_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in op_cases("attention") if case.name == name)
    inputs = case_inputs(case, torch.float64, "cpu")
    whole = run_case(case, inputs, "reference")
    logits = []
    original = attention_cases.attention
    monkeypatch.setattr(attention_cases, "_HELD_LOGITS", 0)
    monkeypatch.setattr(
        attention_cases,
        "attention",
        lambda query, **call: logits.append(query.size(1)) or original(query, **call),
    )
    by_heads = run_case(case, inputs, "reference")
    assert set(logits) == {1}
    assert whole.keys() == by_heads.keys()
    for tensor in whole:
        torch.testing.assert_close(by_heads[tensor], whole[tensor], atol=1e-14, rtol=1e-12)
