from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import attention, decode_attention
from fused_attn.ops.decode_attention import triton as triton_backend
from fused_attn.ops.decode_attention.cases import search_history
from fused_attn.validation import compare, fused_backends

from .suite import OpSuite, assert_bit_equal

FUSED = fused_backends("decode_attention", "cpu")
BACKENDS = ["reference", *FUSED]
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


class TestDecodeAttention(OpSuite):
    op = "decode_attention"


def random_inputs(
    R: int = 4,
    C: int = 4,
    H: int = 4,
    Hk: int = 2,
    T: int = 1,
    S: int = 34,
    D: int = 16,
    Dv: int = 24,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "query": torch.randn(R, H, T, D, generator=generator),
        "key": torch.randn(C, Hk, S, D, generator=generator),
        "value": torch.randn(C, Hk, S, Dv, generator=generator),
    }


def run(call: dict[str, Any], backend: str | None) -> dict[str, Tensor]:
    output, lse = decode_attention(**call, return_lse=True, backend=backend)
    return {"output": output, "lse": lse}


def wide(call: dict[str, Any]) -> dict[str, Any]:
    return {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }


def assert_agree(
    actual: dict[str, Tensor], oracle: dict[str, Tensor], same: dict[str, Tensor]
) -> None:
    """Within the budget of an oracle in fp64."""
    failed = [
        str(c) for c in (compare(n, actual[n], oracle[n], same[n]) for n in actual) if not c.passed
    ]
    assert not failed, "\n".join(failed)


def assert_same_as(call: dict[str, Any], equivalent: dict[str, Any], backend: str) -> None:
    """Two calls that mean the same: to the bit on the CPU, within the budget elsewhere."""
    actual = run(call, backend)
    if backend == "cpu":
        for name, tensor in run(equivalent, backend).items():
            assert_bit_equal(name, actual[name], tensor)
    assert_agree(actual, run(wide(equivalent), "reference"), run(equivalent, "reference"))


# --- laws ---------------------------------------------------------------------------------------


@on_each_backend
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_equals_attention_with_the_equivalent_mask(
    backend: str, is_causal: bool, window: int | None
) -> None:
    inputs = random_inputs(T=3, S=290)
    lengths = torch.tensor([290, 260, 2, 0])
    slopes = torch.tensor([0.5, 0.25, 0.0, 1.0])
    position = lengths[:, None] - 3 + torch.arange(3)  # [R, T]
    distance = position[:, :, None] - torch.arange(290)  # [R, T, S]
    shown = torch.arange(290) < lengths[:, None, None]
    shown = shown & (distance >= 0 if is_causal else torch.ones_like(shown))
    if window is not None:
        shown = shown & (distance <= window)
    bias = -slopes[:, None, None] * distance.abs()[:, None]
    given = torch.rand(4, 1, 3, 290, generator=torch.Generator().manual_seed(1)) < 0.5

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        query, key, value = (t.to(dtype) for t in inputs.values())
        output, lse = attention(
            query,
            key.repeat_interleave(2, 1),
            value.repeat_interleave(2, 1),
            mask=shown[:, None] & given,
            bias=bias.to(dtype),
            return_lse=True,
            backend="reference",
        )
        return {"output": output, "lse": lse}

    call = {
        **inputs,
        "key_lengths": lengths,
        "mask": given,
        "alibi_slopes": slopes,
        "is_causal": is_causal,
        "window": window,
    }
    assert_agree(run(call, backend), expected(torch.float64), expected(torch.float32))


@on_each_backend
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("of_cache", [True, False])
def test_beams_that_share_a_source_equal_copies_of_it(backend: str, T: int, of_cache: bool) -> None:
    inputs = random_inputs(R=15, C=3, T=T, S=300)
    lengths = torch.tensor([300, 7, 0])
    expanded = {
        "query": inputs["query"],
        "key": inputs["key"].repeat_interleave(5, 0),
        "value": inputs["value"].repeat_interleave(5, 0),
        "key_lengths": lengths.repeat_interleave(5),
    }
    shared = {**inputs, "key_lengths": lengths if of_cache else expanded["key_lengths"]}
    assert_same_as(shared, expanded, backend)


@on_each_backend
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_ancestry_equals_gathering_the_cache(backend: str, T: int, dtype: torch.dtype) -> None:
    B, K, S = 2, 3, 300
    inputs = random_inputs(R=B * K, C=B * K, T=T, S=S)
    ancestry = torch.randint(K, (B, K, S), generator=torch.Generator().manual_seed(1))
    gathered = dict(inputs)
    for name in ("key", "value"):
        rows = inputs[name].unflatten(0, (B, K))
        gathered[name] = torch.stack(
            [
                torch.stack([rows[b, ancestry[b, k, s], :, s] for s in range(S)], dim=1)
                for b in range(B)
                for k in range(K)
            ]
        )
    assert_same_as({**inputs, "ancestry": ancestry.to(dtype)}, gathered, backend)


@on_each_backend
def test_a_search_by_ancestry_equals_one_that_copies_its_cache(backend: str) -> None:
    # Beams append a key each step and change places: once by copying, once by the table.
    B, K, steps = 2, 3, 12
    inputs = random_inputs(R=B * K, C=B * K, S=steps, Dv=16)
    generator = torch.Generator().manual_seed(2)
    copied = {name: torch.full_like(inputs[name], math.nan) for name in ("key", "value")}
    written = {name: torch.full_like(inputs[name], math.nan) for name in ("key", "value")}
    ancestry = torch.arange(K, dtype=torch.int32)[None, :, None].repeat(B, 1, steps)
    for s in range(steps):
        for cache in (copied, written):
            for name in cache:
                cache[name][:, :, s] = inputs[name][:, :, s]
        lengths = torch.full((B * K,), s + 1)
        query = torch.randn(inputs["query"].shape, generator=generator)
        assert_same_as(
            {"query": query, **written, "ancestry": ancestry, "key_lengths": lengths},
            {"query": query, **copied, "key_lengths": lengths},
            backend,
        )
        parents = torch.randint(K, (B, K), generator=generator)
        rows = (parents + K * torch.arange(B)[:, None]).flatten()
        copied = {name: cache[rows] for name, cache in copied.items()}
        index = parents[:, :, None].expand(-1, -1, s + 1)
        ancestry[:, :, : s + 1] = ancestry[:, :, : s + 1].gather(1, index)


def test_a_history_is_one() -> None:
    # What the cases use: every beam's last key is its own, and all stem from one first beam.
    history = search_history(3, 4, 40)
    assert history.dtype == torch.int32
    assert torch.equal(history[:, :, -1], torch.arange(4, dtype=torch.int32).expand(3, 4))
    assert (history[:, :, 0] == history[:, :1, 0]).all()
    for s in range(1, 40):  # beams that share a position share all before it
        same = history[:, :, None, s] == history[:, None, :, s]
        assert (history[:, :, None, s - 1] == history[:, None, :, s - 1])[same].all()


@on_each_backend
def test_several_queries_equal_one_after_the_other(backend: str) -> None:
    inputs = random_inputs(T=4, S=290)
    lengths = torch.tensor([290, 257, 6, 4])
    whole = run({**inputs, "key_lengths": lengths, "window": 40}, backend)
    for t in range(4):
        step = {**inputs, "query": inputs["query"][:, :, t : t + 1]}
        step |= {"key_lengths": lengths - 3 + t, "window": 40}
        row = {n: v[:, :, t : t + 1] for n, v in whole.items()}
        if backend == "cpu":
            for name, tensor in run(step, backend).items():
                assert_bit_equal(name, row[name], tensor)
        assert_agree(row, run(wide(step), "reference"), run(step, "reference"))


@pytest.mark.parametrize("backend", FUSED)
def test_a_row_alone_gives_the_same_bits_as_in_a_batch(backend: str) -> None:
    inputs = random_inputs(R=6, C=6, S=300)
    batch = run(inputs, backend)
    for r in (0, 5):
        one = {name: tensor[r : r + 1] for name, tensor in inputs.items()}
        for name, tensor in run(one, backend).items():
            assert_bit_equal(name, tensor, batch[name][r : r + 1])


@on_each_backend
def test_keys_behind_the_length_change_nothing(backend: str) -> None:
    inputs = random_inputs(S=300)
    expected = run({**inputs, "key_lengths": torch.tensor([20, 20, 20, 20])}, backend)
    for extent in (20, 40, 300):
        cut = {
            **inputs,
            "key": inputs["key"][:, :, :extent],
            "value": inputs["value"][:, :, :extent],
        }
        actual = run({**cut, "key_lengths": torch.tensor([20, 20, 20, 20])}, backend)
        same = run({**inputs, "key_lengths": torch.full((4,), 20)}, "reference")
        assert_agree(actual, {n: t.double() for n, t in expected.items()}, same)


@on_each_backend
def test_lengths_beyond_the_cache_count_as_its_size(backend: str) -> None:
    inputs = random_inputs(T=2)
    expected = run(inputs, backend)
    actual = run({**inputs, "key_lengths": torch.tensor([34, 2**40, 99, 35])}, backend)
    for name, tensor in expected.items():
        assert_bit_equal(name, actual[name], tensor)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_negative_lengths_count_as_none(backend: str, dtype: torch.dtype) -> None:
    inputs = random_inputs()
    actual = run({**inputs, "key_lengths": torch.tensor([-5, 3, 34, -1], dtype=dtype)}, backend)
    for row in (0, 3):
        assert (actual["output"][row] == 0).all()
        assert (actual["lse"][row] == -math.inf).all()
    assert actual["lse"][[1, 2]].isfinite().all()


@on_each_backend
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_leaks_from_stale_memory(backend: str, poison: float) -> None:
    B, K, S = 2, 3, 280
    inputs = random_inputs(R=B * K, C=B * K, S=S)
    lengths = torch.tensor([280, 270, 257, 256, 40, 1])
    ancestry = search_history(B, K, S)
    call = {**inputs, "key_lengths": lengths, "ancestry": ancestry}
    clean = run(call, backend)
    reached = torch.zeros(B * K, S, dtype=torch.bool)
    for b in range(B):
        for k in range(K):
            for s in range(int(lengths[b * K + k])):
                reached[b * K + int(ancestry[b, k, s]), s] = True
    assert 0 < int((~reached).sum()) < reached.numel()
    stale = ~reached[:, None, :, None]
    poisoned = {
        **call,
        "key": inputs["key"].masked_fill(stale, poison),
        "value": inputs["value"].masked_fill(stale, poison),
    }
    for name, tensor in run(poisoned, backend).items():
        assert_bit_equal(name, tensor, clean[name])


@on_each_backend
def test_nan_in_sight_is_not_hidden(backend: str) -> None:
    inputs = random_inputs(Hk=4)
    inputs["query"][1, 2] = math.nan
    inputs["key"][3, 0, 4] = math.nan
    result = run(inputs, backend)
    bad = torch.zeros(4, 4, 1, dtype=torch.bool)
    bad[1, 2] = bad[3, 0] = True
    assert torch.equal(result["lse"].isnan(), bad)
    assert torch.equal(result["output"].isnan(), bad[..., None].expand(4, 4, 1, 24))


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize("form", ["plain", "shared", "ancestry"])
def test_the_number_of_threads_does_not_change_a_bit(form: str) -> None:
    inputs = random_inputs(R=8, C=2 if form == "shared" else 8, S=700, D=64, Dv=64)
    if form == "ancestry":
        inputs["ancestry"] = search_history(2, 4, 700)
    before = torch.get_num_threads()
    expected = run(inputs, "cpu")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, tensor in run(inputs, "cpu").items():
                assert_bit_equal(name, tensor, expected[name])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("triton" not in FUSED, reason="triton is not installed")
@pytest.mark.parametrize("form", ["plain", "shared", "ancestry"])
def test_splits_of_the_keys_are_merged(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU that one row does not fill. The last split has no keys in some rows.
    inputs = random_inputs(R=4, C=2 if form == "shared" else 4, S=1100)
    inputs["key_lengths"] = torch.tensor([1100, 600, 5, 0])
    if form == "ancestry":
        inputs["ancestry"] = search_history(2, 2, 1100)
    monkeypatch.setattr(triton_backend, "multiprocessor_count", lambda _: 64)
    splits, keys_per_split = triton_backend._split(1100, 8, 64, 64)
    assert splits == 4
    assert (splits - 1) * keys_per_split < 1100 <= splits * keys_per_split
    oracle, same = run(wide(inputs), "reference"), run(inputs, "reference")
    assert_agree(run(inputs, "triton"), oracle, same)


@on_each_backend
def test_no_graph_is_recorded_without_a_gradient(backend: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in random_inputs().items()}
    with torch.no_grad():
        output = decode_attention(**inputs, backend=backend)
    assert not output.requires_grad
    with pytest.raises(ValueError, match="query must not require a gradient, which only `att"):
        decode_attention(**inputs, backend=backend)


_EVERY_CASE = """
import sys
from fused_attn import _extension
from fused_attn.validation import validate
assert _extension.load() is None
assert _extension.cpu_instruction_set() == sys.argv[1], _extension.cpu_instruction_set()
rows = list(validate(["decode_attention"], ["cpu"]))
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
    done = subprocess.run(
        [sys.executable, "-c", _EVERY_CASE, name],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- refusals and errors ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [({"D": 257}, "head size 257 > 256"), ({"Dv": 300}, "head size 300 of value > 256")],
)
def test_kernels_refuse_and_the_default_falls_back(
    backend: str, sizes: dict[str, int], reason: str
) -> None:
    inputs = random_inputs(S=4, **sizes)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        decode_attention(**inputs, backend=backend)
    assert_bit_equal(
        "output", decode_attention(**inputs), decode_attention(**inputs, backend="reference")
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
        ({"query": torch.zeros(2, 3, 4)}, ValueError, "query must have shape [R, H, T, D], got"),
        (
            {"query": torch.zeros(4, 4, 1, 16, dtype=torch.int32)},
            TypeError,
            "query must have dtype float32, float16, bfloat16 or float64, got int32",
        ),
        (
            {"key": torch.zeros(4, 2, 34, 16, dtype=torch.float16)},
            TypeError,
            "key must have the dtype of query, float32, got float16",
        ),
        (
            {"value": torch.zeros(4, 2, 34, 24, device="meta")},
            ValueError,
            "value must be on the device of query, cpu, got meta",
        ),
        (
            {"key": torch.zeros(4, 2, 34, 8)},
            ValueError,
            "key must have shape [C, Hk, S, D] with D = 16 (from query), got [4, 2, 34, 8]",
        ),
        (
            {"value": torch.zeros(4, 2, 33, 24)},
            ValueError,
            "value must have shape [C, Hk, S, Dv] with C = 4, Hk = 2, S = 34 (from key), got "
            "[4, 2, 33, 24]",
        ),
        (
            {"query": torch.zeros(4, 3, 1, 16)},
            ValueError,
            "query must have a multiple of Hk = 2 heads (from key), got 3",
        ),
        (
            {"query": torch.zeros(6, 4, 1, 16)},
            ValueError,
            "query must have a multiple of C = 4 rows (from key), got 6",
        ),
        (
            {"query": torch.zeros(8, 4, 1, 16), "ancestry": torch.zeros(2, 4, 34).long()},
            ValueError,
            "query must have C = 4 rows (from key) where there is an ancestry, got 8",
        ),
        (
            {"ancestry": torch.zeros(2, 4, 34).long()},
            ValueError,
            "ancestry must have shape [B, K, S] with B * K = 4 (from query), S = 34 (from key), "
            "got [2, 4, 34]",
        ),
        ({"ancestry": [0]}, TypeError, "ancestry must be a tensor, got list"),
        (
            {"ancestry": torch.zeros(2, 2, 34)},
            TypeError,
            "ancestry must have dtype int32 or int64, got float32",
        ),
        (
            {"ancestry": torch.zeros(2, 2, 34, dtype=torch.int32, device="meta")},
            ValueError,
            "ancestry must be on the device of query, cpu, got meta",
        ),
        ({"key_lengths": 3}, TypeError, "key_lengths must be a tensor, got int"),
        (
            {"key_lengths": torch.zeros(4)},
            TypeError,
            "key_lengths must have dtype int32 or int64, got float32",
        ),
        (
            {"key_lengths": torch.zeros(4, dtype=torch.int64, device="meta")},
            ValueError,
            "key_lengths must be on the device of query, cpu, got meta",
        ),
        (
            {"key_lengths": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "key_lengths must have shape [R] or [C] with R = 4 (from query), C = 4 (from key), "
            "got [3]",
        ),
        ({"mask": 1}, TypeError, "mask must be a tensor, got int"),
        ({"mask": torch.zeros(1, 34)}, TypeError, "mask must have dtype bool, got float32"),
        (
            {"mask": torch.zeros(2, 1, 34, dtype=torch.bool)},
            ValueError,
            "mask must be broadcastable to [R, H, T, S] = [4, 4, 1, 34], got [2, 1, 34]",
        ),
        (
            {"mask": torch.zeros(1, 34, dtype=torch.bool, device="meta")},
            ValueError,
            "mask must be on the device of query, cpu, got meta",
        ),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes must be a tensor, got float"),
        (
            {"alibi_slopes": torch.zeros(4).half()},
            TypeError,
            "alibi_slopes must have dtype float32, got float16",
        ),
        (
            {"alibi_slopes": torch.zeros(4, device="meta")},
            ValueError,
            "alibi_slopes must be on the device of query, cpu, got meta",
        ),
        (
            {"alibi_slopes": torch.zeros(2)},
            ValueError,
            "alibi_slopes must have shape [H] with H = 4 (from query), got [2]",
        ),
        ({"window": 2.0}, TypeError, "window must be an int, got float"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0, got 0.0"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"decode_attention: {message}")):
        decode_attention(**{**random_inputs(), **change})


def test_a_named_backend_says_why_it_cannot() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("decode_attention: the C++ extension is not available here")
    with pytest.raises(
        NotImplementedError,
        match=r"(?s)decode_attention: backend 'cpu' cannot run this call:\n  query \[4, 4, 1, 16\] "
        r"float64 cpu\n  - dtype torch.float64.*available here: reference",
    ):
        decode_attention(**wide(random_inputs()), backend="cpu")
