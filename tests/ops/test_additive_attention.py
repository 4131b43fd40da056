from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import additive_attention, additive_scores
from fused_attn.ops.additive_attention.cases import AdditiveAttentionCase
from fused_attn.validation import check_case, fused_backends

from .suite import OpSuite, RecordFusedCalls, assert_bit_equal

OP = "additive_attention"
BACKENDS = ("reference", *fused_backends(OP, "cpu"))


class TestAdditiveAttention(OpSuite):
    op = OP
    # One of each kind: every branch of the kernels, every way to hide something.
    interpreted = frozenset(
        {
            "typical",
            "typical_features",
            "typical_scores",
            "no_keys",
            "many_keys",
            "one_query_19",
            "queries_33",
            "rows_hidden",
            "nan_behind_key_mask",
            "nan_in_hidden_features",
            "empty_source_features",
            "columns_first",
            "small",
            "opposite",
            "one_large_column",
        }
    )


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(B: int = 2, T: int = 3, S: int = 5, E: int = 8, D: int = 6) -> dict[str, Tensor]:
    return {
        "query": draw(B, T, E),
        "key": draw(B, S, E, seed=8),
        "value": draw(B, S, D, seed=9),
        "score_weight": draw(E, seed=10),
    }


def test_equals_a_loop_over_pairs() -> None:
    inputs = call()
    features, feature_weight = draw(2, 3, 5, 4, seed=11), draw(4, 8, seed=12)
    context, weights = additive_attention(
        **inputs, features=features, feature_weight=feature_weight, backend="reference"
    )
    for b in range(2):
        for t in range(3):
            scores = []
            for s in range(5):
                hidden = inputs["query"][b, t] + inputs["key"][b, s]
                hidden = torch.tanh(hidden + features[b, t, s] @ feature_weight)
                scores.append(inputs["score_weight"] @ hidden)
            row = torch.softmax(torch.stack(scores), dim=0)
            torch.testing.assert_close(weights[b, t], row)
            torch.testing.assert_close(context[b, t], row @ inputs["value"][b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_independent_calls(backend: str) -> None:
    B, H, T, S, E = 2, 3, 4, 6, 16
    inputs = {
        "query": draw(B, H, T, E),
        "key": draw(B, H, S, E, seed=1),
        "value": draw(B, H, S, 5, seed=2),
        "features": draw(B, H, T, S, 2, seed=3),
    }
    parameters = {"score_weight": draw(H, E, seed=4), "feature_weight": draw(H, 2, E, seed=5)}
    together = additive_attention(**inputs, **parameters, backend=backend)
    for h in range(H):
        one = additive_attention(
            **{name: tensor[:, h] for name, tensor in inputs.items()},
            **{name: tensor[h] for name, tensor in parameters.items()},
            backend=backend,
        )
        for name, all_heads, head in zip(("context", "weights"), together, one, strict=True):
            assert_bit_equal(name, all_heads[:, h].contiguous(), head)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_source_equals_the_source_alone(backend: str) -> None:
    inputs = call(B=3)
    lengths = torch.tensor([5, 2, 4])
    context, weights = additive_attention(**inputs, key_lengths=lengths, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        alone = {name: tensor[b : b + 1] for name, tensor in inputs.items() if tensor.dim() == 3}
        alone["key"], alone["value"] = alone["key"][:, :length], alone["value"][:, :length]
        other = additive_attention(**alone, score_weight=inputs["score_weight"], backend=backend)
        torch.testing.assert_close(context[b], other[0][0])
        torch.testing.assert_close(weights[b, :, :length], other[1][0])
        assert not weights[b, :, length:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_is_a_mask(backend: str) -> None:
    inputs, lengths = call(), torch.tensor([4, 0])
    mask = (torch.arange(5) < lengths[:, None])[:, None]  # [B, 1, S]
    for name, by_length, by_mask in zip(
        ("context", "weights"),
        additive_attention(**inputs, key_lengths=lengths, backend=backend),
        additive_attention(**inputs, mask=mask, backend=backend),
        strict=True,
    ):
        assert_bit_equal(name, by_length, by_mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_the_softmax_of_the_scores(backend: str) -> None:
    inputs = call()
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[0, 1] = False
    context, weights = additive_attention(**inputs, mask=mask, backend=backend)
    value = inputs.pop("value")
    scores = additive_scores(**inputs, mask=mask, backend=backend)
    assert torch.equal(scores.isinf(), ~mask)
    expected = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(context, expected @ value)
    assert not weights[0, 1].any()
    assert not context[0, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_feature_that_is_the_same_everywhere_is_a_bias_of_the_query(backend: str) -> None:
    inputs = call()
    coverage, weight = torch.full((2, 3, 5, 1), 0.75), draw(1, 8, seed=13)
    got = additive_attention(**inputs, features=coverage, feature_weight=weight, backend=backend)
    inputs["query"] = inputs["query"] + 0.75 * weight
    torch.testing.assert_close(got, additive_attention(**inputs, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_both_outputs_arrive(backend: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in call().items()}
    leaves = list(inputs.values())
    cotangents = draw(2, 3, 6, seed=20), draw(2, 3, 5, seed=21)

    def gradients(*chosen: int) -> list[Tensor]:
        outputs = additive_attention(**inputs, backend=backend)
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(
                leaves,
                torch.autograd.grad(
                    [outputs[i] for i in chosen],
                    leaves,
                    [cotangents[i] for i in chosen],
                    allow_unused=True,
                ),
                strict=True,
            )
        ]

    both = gradients(0, 1)
    for name, together, first, second in zip(inputs, both, gradients(0), gradients(1), strict=True):
        assert together.any(), name
        torch.testing.assert_close(together, first + second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_into_a_hidden_score_is_ignored(backend: str) -> None:
    inputs = call()
    del inputs["value"]
    query = inputs.pop("query").requires_grad_()
    lengths = torch.tensor([3, 0])
    scores = additive_scores(query, **inputs, key_lengths=lengths, backend=backend)
    grad = draw(2, 3, 5, seed=1)
    garbage = grad.masked_fill(scores.isinf(), math.nan)
    for cotangent in (grad, garbage):
        (got,) = torch.autograd.grad(scores, query, cotangent, retain_graph=True)
        alone = additive_scores(
            query[:1], inputs["key"][:1, :3], inputs["score_weight"], backend=backend
        )
        (want,) = torch.autograd.grad(alone, query, grad[:1, :, :3])
        torch.testing.assert_close(got, want)


def test_what_is_kept_for_the_backward() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    inputs = {name: tensor.requires_grad_() for name, tensor in call(T=64, S=64, E=64).items()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, weights = additive_attention(**inputs, backend="cpu")
    own = {tensor.data_ptr() for tensor in inputs.values()}
    assert {t.data_ptr() for t in saved} == own | {weights.data_ptr()}


def test_only_gradients_that_are_wanted_are_computed() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    inputs = call()
    everything = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    features = {"features": draw(2, 3, 5, 2), "feature_weight": draw(2, 8)}
    for more in ({}, features):
        for name in inputs:
            leaf = inputs[name].clone().requires_grad_()
            with RecordFusedCalls() as recorder:
                outputs = additive_attention(**{**inputs, name: leaf}, **more, backend="cpu")
                (got,) = torch.autograd.grad(outputs[0].square().sum(), leaf)
            ((_, arguments),) = [c for c in recorder.calls if "backward" in str(c[0])]
            asked = dict(
                zip((*list(inputs), "features", "feature_weight"), arguments[-2], strict=True)
            )
            assert [n for n, needed in asked.items() if needed] == [name]
            outputs = additive_attention(**everything, **more, backend="cpu")
            (want,) = torch.autograd.grad(outputs[0].square().sum(), everything[name])
            assert_bit_equal(name, got, want)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_cotangents_may_have_any_strides(backend: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in call().items()}
    leaves = list(inputs.values())
    outputs = additive_attention(**inputs, backend=backend)
    for grads in (
        (draw(2, 6, 3).transpose(1, 2), draw(5, 3, 2).permute(2, 1, 0)),
        (draw(1, 1, 6).expand(2, 3, 6), torch.ones(()).expand(2, 3, 5)),
        (draw(2, 3, 9)[..., 1:7], draw(2, 3, 9)[..., ::2]),
    ):
        got = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        dense = [grad.contiguous() for grad in grads]
        expected = torch.autograd.grad(outputs, leaves, dense, retain_graph=True)
        for name, *pair in zip(inputs, got, expected, strict=True):
            assert_bit_equal(name, *pair)


@st.composite
def random_cases(draw: Any) -> tuple[AdditiveAttentionCase, torch.dtype]:
    B, T = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8, 33]))
    S = draw(st.sampled_from([1, 2, 4, 7, 16, 17, 35]))
    E = draw(st.one_of(st.integers(2, 70), st.sampled_from([128, 129, 257])))
    heads = draw(st.sampled_from([None, 1, 2]))
    H = () if heads is None else (heads,)
    masks = [None, (T, S), (B, *(1 for _ in H), 1, S), (B, *H, T, S)]
    options: dict[str, Any] = {
        "H": heads,
        "D": draw(st.sampled_from([0, 1, 7, 16, 40, 129])),
        "F": draw(st.sampled_from([None, None, 1, 5])),
        "scale": draw(st.sampled_from([0.01, 0.1, 1.0, 1.0, 4.0, 20.0])),
        "mask_shape": draw(st.sampled_from(masks)),
        "key_lengths": draw(
            st.sampled_from([None, tuple(draw(st.integers(0, S)) for _ in range(B))])
        ),
        "fp32_parameters": draw(st.booleans()),
    }
    words = " ".join(f"{k}={v}" for k, v in options.items())
    case = AdditiveAttentionCase(
        name=f"{B} {T} {S} {E} {words}", kind="edge", B=B, T=T, S=S, E=E, **options
    )
    return case, draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not available here")
@given(drawn=random_cases())
def test_any_combination(drawn: tuple[AdditiveAttentionCase, torch.dtype]) -> None:
    case, dtype = drawn
    for numbers in range(3):
        # A case's name decides on its numbers.
        comparisons = check_case(replace(case, name=f"{case.name} {numbers}"), "cpu", dtype)
        failed = [c for c in comparisons if not c.passed]
        if not failed:
            return
        # The budget is made of the error that the reference happens to have, and with few numbers
        # that may be luck: a wrong kernel is far beyond it, or beyond it with other numbers too.
        assert all(c.share < 2.0 for c in failed), "\n".join(map(str, failed))
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize("with_features", [False, True])
def test_threads_do_not_change_a_bit(with_features: bool) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    inputs = call(B=9, T=40, S=30, E=70)
    if with_features:
        inputs |= {"features": draw(9, 40, 30, 2), "feature_weight": draw(2, 70)}
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    cotangents = draw(9, 40, 6), draw(9, 40, 30)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = additive_attention(**inputs, backend="cpu")
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, cotangents)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, *pair in zip(("context", "weights", *inputs), results[0], other, strict=True):
            assert_bit_equal(name, *pair)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    inputs = call()
    query = inputs.pop("query").requires_grad_()
    context, _ = additive_attention(query, **inputs, backend="cpu")
    (first,) = torch.autograd.grad(context.square().sum(), query, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), query)


ZEROS = {
    "query": torch.zeros(2, 3, 8),
    "key": torch.zeros(2, 5, 8),
    "value": torch.zeros(2, 5, 6),
    "score_weight": torch.zeros(8),
}
FEATURES = {"features": torch.zeros(2, 3, 5, 4), "feature_weight": torch.zeros(4, 8)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": 1}, TypeError, "query must be a tensor, got int"),
        ({"query": ZEROS["query"].int()}, TypeError, "query must have dtype float32, float16"),
        (
            {"query": torch.zeros(3, 8)},
            ValueError,
            "query must have shape [B, H, T, E] or [B, T, E] with E >= 1, got [3, 8]",
        ),
        ({"query": torch.zeros(2, 3, 0)}, ValueError, "with E >= 1, got [2, 3, 0]"),
        ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
        ({"key": ZEROS["key"].half()}, TypeError, "key must have the dtype of query, float32"),
        (
            {"key": torch.zeros(2, 5, 7)},
            ValueError,
            "key must have shape [B, S, E] with B = 2, E = 8 (from query), got [2, 5, 7]",
        ),
        (
            {"query": torch.zeros(2, 4, 3, 8)},
            ValueError,
            "key must have shape [B, H, S, E] with B = 2, H = 4, E = 8 (from query), got [2, 5, 8]",
        ),
        ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
        ({"value": ZEROS["value"].bfloat16()}, TypeError, "value must have the dtype of query"),
        (
            {"value": torch.zeros(2, 4, 6)},
            ValueError,
            "value must have shape [B, S, D] with the first sizes of key, [2, 5], got [2, 4, 6]",
        ),
        ({"score_weight": 0.5}, TypeError, "score_weight must be a tensor, got float"),
        (
            {"score_weight": torch.zeros(8).half()},
            TypeError,
            "score_weight must have dtype float32",
        ),
        (
            {"score_weight": torch.zeros(8, device="meta")},
            ValueError,
            "score_weight must be on the device of query, cpu, got meta",
        ),
        (
            {"score_weight": torch.zeros(1, 8)},
            ValueError,
            "score_weight must have shape [E] = [8], got [1, 8]",
        ),
        (
            {"features": FEATURES["features"]},
            ValueError,
            "features and feature_weight go together, got one of them",
        ),
        ({**FEATURES, "features": [1]}, TypeError, "features must be a tensor, got list"),
        (
            {**FEATURES, "features": FEATURES["features"].half()},
            TypeError,
            "features must have the dtype of query, float32, got float16",
        ),
        (
            {**FEATURES, "features": torch.zeros(2, 5, 3, 4)},
            ValueError,
            "features must have shape [B, T, S, F] with the sizes of query and key, [2, 3, 5], got",
        ),
        (
            {**FEATURES, "feature_weight": torch.zeros(8, 4)},
            ValueError,
            "feature_weight must have shape [F, E] = [4, 8], got [8, 4]",
        ),
        ({"mask": 1}, TypeError, "mask must be a tensor, got int"),
        ({"mask": torch.zeros(3, 5)}, TypeError, "mask must have dtype bool, got float32"),
        (
            {"mask": torch.ones(3, 5, dtype=torch.bool, device="meta")},
            ValueError,
            "mask must be on the device of query, cpu, got meta",
        ),
        (
            {"mask": torch.ones(2, 2, 5, dtype=torch.bool)},
            ValueError,
            "mask must be broadcastable to [B, T, S] = [2, 3, 5], got [2, 2, 5]",
        ),
        ({"key_lengths": [5, 5]}, TypeError, "key_lengths must be a tensor, got list"),
        ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must have dtype int32 or int64"),
        (
            {"key_lengths": torch.ones(3).int()},
            ValueError,
            "key_lengths must have shape [B] with B = 2 (from query), got [3]",
        ),
        (
            {"key_lengths": torch.tensor([1, 6])},
            ValueError,
            "key_lengths must lie within 0 and 5, got 6",
        ),
        (
            {"key_lengths": torch.tensor([-1, 5])},
            ValueError,
            "key_lengths must lie within 0 and 5, got -1",
        ),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu', expected one of"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:40] if isinstance(value, str) else None,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{OP}: .*" + re.escape(message)):
        additive_attention(**{**ZEROS, **change})


def test_a_named_backend_says_why_it_cannot() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    with pytest.raises(NotImplementedError) as caught:
        additive_attention(**{name: t.double() for name, t in ZEROS.items()}, backend="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{OP}: backend 'cpu' cannot run this call:"
    assert lines[1] == "  query [2, 3, 8] float64 cpu"
    assert "float64" in lines[2]
    assert lines[-1].startswith("  available here: ")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not available here")
def test_the_private_call_checks_what_the_contract_promises() -> None:
    grads = torch.zeros(2, 1, 3, 6), None
    inputs = [t.unsqueeze(0 if t.dim() == 1 else 1) for t in ZEROS.values()]
    with pytest.raises(RuntimeError, match=f"{OP}: the backward needs the weights"):
        torch.ops.fused_attn_C.additive_attention_backward(
            *grads, *inputs, None, None, None, None, None, [True] * 6
        )
