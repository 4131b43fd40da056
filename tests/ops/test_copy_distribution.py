from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn import copy_distribution, copy_nll
from fused_attn.validation import compare, fused_backends

from .suite import OpSuite, RecordFusedCalls, assert_bit_equal

OP = "copy_distribution"
BACKENDS = ("reference", *fused_backends(OP, "cpu"))
INFINITY = math.inf

each_backend = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "copynet"])


class TestCopyDistribution(OpSuite):
    op = OP


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_call(has_gate: bool, B: int = 2, T: int = 3, V: int = 6, S: int = 5) -> dict[str, Any]:
    """Sources of words 0..V+2, each with a word that is there twice and one that only it has."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, V + 3, (B, 1, S), generator=generator)
    tokens[:, :, 3:4] = tokens[:, :, 1:2]
    tokens[:, :, 2:3] = V + 1
    copy = draw(B, T, S, seed=1)
    call = {"logits": draw(B, T, V), "copy": copy, "source_tokens": tokens}
    if has_gate:
        call |= {"copy": copy.softmax(dim=-1), "gate": draw(B, T, seed=2)}
    return call


def leaves_of(call: dict[str, Any]) -> dict[str, Tensor]:
    """The call's differentiable tensors, made leaves in place."""
    leaves = {n: call[n].clone().requires_grad_() for n in ("logits", "copy", "gate") if n in call}
    call |= leaves
    return leaves


def by_brute_force(call: dict[str, Any], b: int, t: int, word: int, length: int) -> float:
    """p(word), as it is written in the papers."""
    logits = call["logits"][b, t].tolist()
    copy = call["copy"][b, t].tolist()[:length]
    tokens = call["source_tokens"][b, 0].tolist()[:length]
    weights = [math.exp(x) for x in logits]
    if "gate" in call:
        gate = 1.0 / (1.0 + math.exp(-call["gate"][b, t].item()))
        p = gate * weights[word] / sum(weights) if word < len(logits) else 0.0
        for token, weight in zip(tokens, copy, strict=True):
            p += (1.0 - gate) * weight if token == word else 0.0
        return p
    scores = [math.exp(x) for x in copy]
    p = weights[word] if word < len(logits) else 0.0
    for token, score in zip(tokens, scores, strict=True):
        p += score if token == word else 0.0
    return p / (sum(weights) + sum(scores))


@each_backend
@both_ways
@pytest.mark.parametrize("lengths", [None, [4, 0]], ids=["all", "lengths"])
def test_equals_brute_force(backend: str, has_gate: bool, lengths: list[int] | None) -> None:
    call = draw_call(has_gate)
    (B, T, V), S = call["logits"].shape, call["copy"].size(-1)
    options: dict[str, Any] = {"backend": backend}
    if lengths is not None:
        options["source_lengths"] = torch.tensor(lengths)
    log_probs = copy_distribution(**call, extended_size=V + 3, **options)
    for word in range(V + 3):
        nll = copy_nll(**call, targets=torch.full((B, T), word), **options)
        for b in range(B):
            length = S if lengths is None else lengths[b]
            for t in range(T):
                p = by_brute_force(call, b, t, word, length)
                assert log_probs[b, t, word].exp().item() == pytest.approx(p, rel=1e-5), word
                assert nll[b, t].neg().exp().item() == pytest.approx(p, rel=1e-5), word
    words = set(call["source_tokens"][0, 0].tolist())
    assert V + 1 in words
    assert len(words) < S


@each_backend
@both_ways
def test_probabilities_sum_to_1(backend: str, has_gate: bool) -> None:
    call = draw_call(has_gate, V=301, S=40)
    log_probs = copy_distribution(**call, extended_size=310, backend=backend)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(2, 3))


@each_backend
def test_copynet_is_a_softmax_over_words_and_positions(backend: str) -> None:
    call = draw_call(False)
    joint = torch.cat([call["logits"], call["copy"]], dim=-1).softmax(dim=-1)
    expected = torch.zeros(2, 3, 9)
    for place in range(joint.size(-1)):
        for b in range(2):
            word = place if place < 6 else int(call["source_tokens"][b, 0, place - 6])
            expected[b, :, word] += joint[b, :, place]
    log_probs = copy_distribution(**call, extended_size=9, backend=backend)
    torch.testing.assert_close(log_probs.exp(), expected)


@each_backend
def test_an_open_gate_leaves_the_cross_entropy(backend: str) -> None:
    call = draw_call(True) | {"gate": torch.full((2, 3), INFINITY)}
    leaves = leaves_of(call)
    targets = torch.tensor([[0, 1, 5], [-100, 3, 2]])
    nll = copy_nll(**call, targets=targets, backend=backend)
    logits = call["logits"]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nll.flatten(), expected)
    gradients = torch.autograd.grad(nll, leaves.values(), draw(2, 3, seed=9))
    (grad,) = torch.autograd.grad(expected, logits, draw(2, 3, seed=9).flatten())
    torch.testing.assert_close(gradients[0], grad)
    assert not gradients[2].any()


@each_backend
def test_a_closed_gate_leaves_the_weights(backend: str) -> None:
    call = draw_call(True) | {"gate": torch.full((2, 3), -INFINITY)}
    leaves = leaves_of(call)
    log_probs = copy_distribution(**call, extended_size=9, backend=backend)
    expected = torch.zeros(2, 3, 9)
    expected.scatter_add_(2, call["source_tokens"].expand(2, 3, 5), call["copy"].detach())
    torch.testing.assert_close(log_probs.exp(), expected)
    gradients = torch.autograd.grad(log_probs, leaves.values(), draw(2, 3, 9, seed=9))
    assert not gradients[0].any()
    assert gradients[1].isfinite().all()
    assert not gradients[2].any()


@each_backend
@both_ways
@pytest.mark.parametrize("source", ["no positions", "length 0", "negative tokens"])
def test_without_a_source_only_words_are_generated(
    backend: str, has_gate: bool, source: str
) -> None:
    call = draw_call(has_gate, S=0 if source == "no positions" else 5)
    options: dict[str, Any] = {}
    if source == "length 0":
        options["source_lengths"] = torch.tensor([0, 0], dtype=torch.int32)
    if source == "negative tokens":
        call["source_tokens"] = torch.full((2, 1, 5), -1)
    leaves = leaves_of(call)
    log_probs = copy_distribution(**call, extended_size=7, **options, backend=backend)
    expected = call["logits"].log_softmax(dim=-1)
    if has_gate:
        expected = expected + F.logsigmoid(call["gate"])[..., None]
    torch.testing.assert_close(log_probs[..., :6], expected)
    assert (log_probs[..., 6] == -INFINITY).all()
    gradients = torch.autograd.grad(log_probs, leaves.values(), draw(2, 3, 7, seed=9))
    assert not gradients[1].any()
    (grad,) = torch.autograd.grad(expected, call["logits"], draw(2, 3, 7, seed=9)[..., :6])
    torch.testing.assert_close(gradients[0], grad)


@each_backend
def test_weights_of_0_copy_nothing(backend: str) -> None:
    call = draw_call(True)
    call["copy"] = torch.zeros_like(call["copy"])
    log_probs = copy_distribution(**call, extended_size=9, backend=backend)
    expected = F.logsigmoid(call["gate"])[..., None] + call["logits"].log_softmax(dim=-1)
    torch.testing.assert_close(log_probs[..., :6], expected)
    assert (log_probs[..., 6:] == -INFINITY).all()


@each_backend
@both_ways
def test_nll_is_the_distribution_at_the_target(backend: str, has_gate: bool) -> None:
    call = draw_call(has_gate)
    targets = torch.tensor([[0, 7, 4], [2, 7, 5]])
    results = []
    for kind in ("nll", "distribution"):
        leaves = leaves_of(call)
        if kind == "nll":
            nll = copy_nll(**call, targets=targets, backend=backend)
        else:
            log_probs = copy_distribution(**call, extended_size=9, backend=backend)
            nll = -log_probs.gather(2, targets[..., None]).squeeze(2)
        results.append((nll, *torch.autograd.grad(nll, leaves.values(), draw(2, 3, seed=9))))
    for nll, log_probs in zip(*results, strict=True):
        torch.testing.assert_close(nll, log_probs)


@each_backend
@both_ways
def test_what_is_impossible_has_no_gradient(backend: str, has_gate: bool) -> None:
    call = draw_call(has_gate)
    call["logits"][..., 2] = -INFINITY
    call["source_tokens"][call["source_tokens"] == 2] = 3
    leaves = leaves_of(call)
    # A masked word, one that is nowhere, and no word.
    targets = torch.tensor([[2, 8, -7], [2, 100, -1]])
    call["source_tokens"][call["source_tokens"] == 8] = 3
    nll = copy_nll(**call, targets=targets, backend=backend)
    assert (nll == INFINITY).all()
    for gradient in torch.autograd.grad(nll, leaves.values(), torch.ones(2, 3)):
        assert not gradient.any()
    log_probs = copy_distribution(**call, extended_size=9, backend=backend)
    impossible = log_probs == -INFINITY
    assert impossible[..., [2, 8]].all()
    grad = draw(2, 3, 9)
    got, expected = (
        torch.autograd.grad(log_probs, leaves.values(), arriving, retain_graph=True)
        for arriving in (grad.masked_fill(impossible, INFINITY), grad.masked_fill(impossible, 0.0))
    )
    if backend != "reference":  # which multiplies infinity by 0
        for name, *pair in zip(leaves, got, expected, strict=True):
            assert_bit_equal(name, *pair)


@each_backend
@both_ways
def test_an_ignored_row_may_hold_anything(backend: str, has_gate: bool) -> None:
    call = draw_call(has_gate)
    for name in ("logits", "copy", "gate"):
        if name in call:
            call[name][0, 1] = math.nan
    leaves = leaves_of(call)
    targets = torch.tensor([[0, 5, 4], [2, 7, 5]])
    nll = copy_nll(**call, targets=targets, ignore_index=5, backend=backend)
    assert nll[0, 1] == nll[1, 2] == 0.0
    gradients = torch.autograd.grad(nll, leaves.values(), torch.ones(2, 3))
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[0, 1].any()
        assert not gradient[1, 2].any()
    assert gradients[0][1, 0].any()


@each_backend
@both_ways
def test_a_word_that_is_not_listed_still_counts(backend: str, has_gate: bool) -> None:
    call = draw_call(has_gate)
    full = copy_distribution(**call, extended_size=9, backend=backend)
    short = copy_distribution(**call, extended_size=6, backend=backend)
    assert_bit_equal("listed words", short, full[..., :6])


@each_backend
def test_extreme_numbers_stay_finite(backend: str) -> None:
    """Neither a word of probability e^-100 is lost, nor is the gradient of its weight infinite."""
    logits = torch.tensor([[0.0, -200.0, -50.0]]).requires_grad_()
    copy = torch.tensor([[0.0, 1e-30, 1.0]]).requires_grad_()
    gate = torch.tensor([100.0]).requires_grad_()
    tokens = torch.tensor([[1, 3, 0]])
    log_probs = copy_distribution(logits, copy, tokens, gate, extended_size=4, backend=backend)
    expected = torch.tensor([[0.0, -200.0, -50.0, -100.0 + math.log(1e-30)]])
    torch.testing.assert_close(log_probs, expected)
    for gradient in torch.autograd.grad(log_probs, (logits, copy, gate), torch.ones(1, 4)):
        assert gradient.isfinite().all()
    for target in range(4):
        nll = copy_nll(logits, copy, tokens, torch.tensor([target]), gate, backend=backend)
        torch.testing.assert_close(nll, -expected[:, target])
        for gradient in torch.autograd.grad(nll, (logits, copy, gate), torch.ones(1)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@both_ways
def test_results_do_not_depend_on_the_batch(backend: str, has_gate: bool) -> None:
    call = draw_call(has_gate, V=70, S=20)
    for all_words in (True, False):
        rows = []
        for batch in (slice(0, 2), slice(1, 2)):
            part = {name: tensor[batch] for name, tensor in call.items()}
            leaves = leaves_of(part)
            if all_words:
                output = copy_distribution(**part, extended_size=73, backend=backend)
            else:
                targets = torch.tensor([[0, 71, 4], [2, 71, 5]])[batch]
                output = copy_nll(**part, targets=targets, backend=backend)
            grad = torch.ones_like(output)
            results = (output, *torch.autograd.grad(output, leaves.values(), grad))
            rows.append([result[-1] for result in results])
        for alone, together in zip(*rows, strict=True):
            assert_bit_equal("a row", alone, together)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_source_of_a_batch_is_not_copied_for_its_rows(backend: str) -> None:
    call = draw_call(True, T=4)
    own = call | {"source_tokens": call["source_tokens"].expand(2, 4, 5).contiguous()}
    with RecordFusedCalls() as recorder:
        shared = copy_distribution(**call, extended_size=9, backend=backend)
    assert recorder.calls[0][1][2].shape == (2, 1, 5)
    assert_bit_equal(
        "log_probs", shared, copy_distribution(**own, extended_size=9, backend=backend)
    )


@pytest.mark.parametrize("forward", BACKENDS[1:])
@pytest.mark.parametrize("backward", BACKENDS[1:])
@both_ways
@pytest.mark.parametrize("all_words", [True, False])
def test_any_backward_takes_any_forwards_residuals(
    forward: str, backward: str, has_gate: bool, all_words: bool
) -> None:
    """The gradient through one backend's forward and another's backward is the oracle's."""
    call = draw_call(has_gate, V=40, S=9)
    targets = torch.tensor([[0, 41, -100], [2, 39, 5]])

    def gradients(kind: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        inputs = {n: t.to(kind) if t.is_floating_point() else t for n, t in call.items()}
        leaves = leaves_of(inputs)
        if all_words:
            output = copy_distribution(**inputs, extended_size=43, backend=backend)
        else:
            output = copy_nll(**inputs, targets=targets, backend=backend)
        grad = draw(*output.shape, seed=5).to(kind)
        return torch.autograd.grad(output, leaves.values(), grad)

    oracle = gradients(torch.float64, "reference")
    low = gradients(torch.float32, "reference")
    with RecordFusedCalls() as recorder:
        gradients(torch.float32, forward)
    operator, arguments = recorder.calls[-1]
    assert operator is torch.ops.fused_attn.copy_distribution_backward.default
    assert arguments[-1] == forward
    results = operator(*arguments[:-1], backward)
    for name, *tensors in zip(("logits", "copy", "gate"), results, oracle, low, strict=False):
        assert compare(name, *tensors).passed, compare(name, *tensors)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_may_have_any_strides(backend: str) -> None:
    call = draw_call(True)
    leaves = leaves_of(call)
    log_probs = copy_distribution(**call, extended_size=9, backend=backend)
    for grad in (
        draw(2, 3, 12, seed=1)[..., 1:10],
        draw(2, 9, 3, seed=2).transpose(1, 2),
        draw(1, 1, 9, seed=3).expand(2, 3, 9),
        torch.ones(()).expand(2, 3, 9),
    ):
        got = torch.autograd.grad(log_probs, leaves.values(), grad, retain_graph=True)
        expected = torch.autograd.grad(
            log_probs, leaves.values(), grad.contiguous(), retain_graph=True
        )
        for name, *pair in zip(leaves, got, expected, strict=True):
            assert_bit_equal(name, *pair)


@both_ways
def test_threads_do_not_change_a_bit(has_gate: bool) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    call = draw_call(has_gate, B=5, T=40, V=1100, S=30)
    leaves = leaves_of(call)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            log_probs = copy_distribution(**call, extended_size=1103, backend="cpu")
            grad = draw(5, 40, 1103, seed=1)
            results.append((log_probs, *torch.autograd.grad(log_probs, leaves.values(), grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, *pair in zip(("log_probs", *leaves), results[0], other, strict=True):
            assert_bit_equal(name, *pair)


def test_what_is_large_is_streamed_and_the_same() -> None:
    """Beyond 32 MiB rows go past the caches, and the copied words over them."""
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    call = draw_call(True, B=264, T=1, V=32768 - 16, S=8)
    few = {name: tensor[-2:] for name, tensor in call.items()}
    results = []
    for part in (call, few):
        leaves = leaves_of(part)
        log_probs = copy_distribution(**part, extended_size=32768, backend="cpu")
        gradients = torch.autograd.grad(log_probs, leaves.values(), torch.ones_like(log_probs))
        results.append([tensor[-2:] for tensor in (log_probs, *gradients)])
    for name, *pair in zip(("log_probs", *leaves), *results, strict=True):
        assert_bit_equal(name, *pair)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    call = draw_call(True)
    leaves = leaves_of(call)
    log_probs = copy_distribution(**call, extended_size=9, backend="cpu")
    (first, *_) = torch.autograd.grad(log_probs[..., :6].sum(), leaves.values(), create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), leaves["logits"])


META = torch.device("meta")
CHANGES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": 3}, TypeError, "logits must be a tensor, got int"),
    ({"logits": torch.zeros(2, 3, 6).long()}, TypeError, "logits must have dtype float32, float16"),
    ({"logits": torch.zeros(6)}, ValueError, "logits must have shape [B, ..., V] with V >= 1"),
    ({"logits": torch.zeros(2, 3, 0)}, ValueError, "V >= 1, got [2, 3, 0]"),
    ({"copy": None}, TypeError, "copy must be a tensor, got NoneType"),
    ({"copy": torch.zeros(2, 3, 5).half()}, TypeError, "copy must have dtype float32, got float16"),
    ({"copy": torch.zeros(2, 3, 5, device=META)}, ValueError, "copy must be on the device of logi"),
    (
        {"copy": torch.zeros(2, 5)},
        ValueError,
        "copy must have shape [B, ..., S] with B, ... = [2, 3] (from logits), got [2, 5]",
    ),
    (
        {"copy": torch.zeros(2, 4, 5)},
        ValueError,
        "copy must have shape [B, ..., S] with B, ... = [2, 3] (from logits), got [2, 4, 5]",
    ),
    ({"source_tokens": [1]}, TypeError, "source_tokens must be a tensor, got list"),
    ({"source_tokens": torch.zeros(2, 1, 5)}, TypeError, "source_tokens must have dtype int64"),
    (
        {"source_tokens": torch.zeros(2, 1, 5, device=META).long()},
        ValueError,
        "source_tokens must be on the device of logits, cpu, got meta",
    ),
    (
        {"source_tokens": torch.zeros(2, 5).long()},
        ValueError,
        "source_tokens must have the shape of copy, [2, 3, 5], or 1 in place of leading sizes, got "
        "[2, 5]",
    ),
    ({"source_tokens": torch.zeros(2, 2, 5).long()}, ValueError, "leading sizes, got [2, 2, 5]"),
    ({"source_tokens": torch.zeros(2, 1, 1).long()}, ValueError, "leading sizes, got [2, 1, 1]"),
    ({"gate": 0.5}, TypeError, "gate must be a tensor, got float"),
    ({"gate": torch.zeros(2, 3).half()}, TypeError, "gate must have dtype float32, got float16"),
    (
        {"gate": torch.zeros(2, 3, 1)},
        ValueError,
        "gate must have shape [B, ...] = [2, 3] (from logits), got [2, 3, 1]",
    ),
    ({"gate": torch.zeros(2, 3, device=META)}, ValueError, "gate must be on the device of logits"),
    ({"source_lengths": 5}, TypeError, "source_lengths must be a tensor, got int"),
    ({"source_lengths": torch.ones(2)}, TypeError, "source_lengths must have dtype int32 or int64"),
    (
        {"source_lengths": torch.ones(2, device=META).long()},
        ValueError,
        "source_lengths must be on the device of logits, cpu, got meta",
    ),
    (
        {"source_lengths": torch.ones(3).long()},
        ValueError,
        "source_lengths must have shape [B] with B = 2 (from logits), got [3]",
    ),
    ({"backend": "tpu"}, ValueError, "unknown backend 'tpu', expected one of"),
]


def name_of(value: object) -> str | None:
    return re.sub(r"\W+", "_", value)[-40:] if isinstance(value, str) else None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *CHANGES,
        ({"extended_size": 6.0}, TypeError, "extended_size must be an int, got float"),
        (
            {"extended_size": 5},
            ValueError,
            "extended_size must be at least V = 6 (from logits), got 5",
        ),
    ],
    ids=name_of,
)
def test_errors_of_the_distribution(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    call = {**draw_call(True), "extended_size": 9, **change}
    with pytest.raises(error, match=r"^copy_distribution: .*" + re.escape(message)):
        copy_distribution(**call)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *CHANGES,
        ({"targets": 3}, TypeError, "targets must be a tensor, got int"),
        ({"targets": torch.zeros(2, 3)}, TypeError, "targets must have dtype int64, got float32"),
        (
            {"targets": torch.zeros(3, 2).long()},
            ValueError,
            "targets must have shape [B, ...] = [2, 3] (from logits), got [3, 2]",
        ),
        (
            {"targets": torch.zeros(2, 3, device=META).long()},
            ValueError,
            "targets must be on the device of logits, cpu, got meta",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    ],
    ids=name_of,
)
def test_errors_of_the_nll(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {**draw_call(True), "targets": torch.zeros(2, 3).long(), **change}
    with pytest.raises(error, match=r"^copy_nll: .*" + re.escape(message)):
        copy_nll(**call)


def test_a_named_backend_says_why_it_cannot() -> None:
    if "cpu" not in BACKENDS:
        pytest.skip(f"{OP}: the C++ extension is not available here")
    call = draw_call(False)
    call |= {name: call[name].double() for name in ("logits", "copy")}
    with pytest.raises(NotImplementedError) as caught:
        copy_distribution(**call, extended_size=9, backend="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == "copy_distribution: backend 'cpu' cannot run this call:"
    assert lines[1] == "  logits [2, 3, 6] float64 cpu"
    assert "float64" in lines[2]
    assert lines[-1].startswith("  available here: ")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not available here")
def test_the_private_call_checks_what_the_public_one_promises() -> None:
    call = draw_call(True)
    with pytest.raises(RuntimeError, match="copy_distribution: extended_size below"):
        torch.ops.fused_attn_C.copy_distribution_forward(
            call["logits"], call["copy"], call["source_tokens"], call["gate"], None, None, 5, 0
        )
