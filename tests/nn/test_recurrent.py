"""``RecurrentLayers`` beside ``torch.nn``'s layers on packed sequences."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.nn import RecurrentLayers
from fused_attn.nn._onednn_linear import _OneDNNLinear, onednn_linear
from fused_attn.nn.packed import packing_unavailable_reason

KINDS = ("lstm", "gru", "tanh", "relu")
B, T, INPUT, H = 5, 7, 6, 9
LENGTHS = torch.tensor([3, 7, 0, 5, 1])


def pair(kind: Any, num_layers: int = 2, **options: Any) -> tuple[Any, RecurrentLayers]:
    """Torch's module and ours with the same parameters."""
    torch.manual_seed(3)
    ours = RecurrentLayers(kind, INPUT, H, num_layers, **options)
    arguments = {"batch_first": True, "num_layers": num_layers, **options}
    theirs: Any
    if kind == "lstm":
        theirs = nn.LSTM(INPUT, H, **arguments)
    elif kind == "gru":
        theirs = nn.GRU(INPUT, H, **arguments)
    else:
        theirs = nn.RNN(INPUT, H, nonlinearity=kind, **arguments)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states(kind: str, layers: int, rows: int = B) -> tuple[Tensor, ...]:
    return tuple(draw(layers, rows, H, seed=s) for s in ((1, 2) if kind == "lstm" else (1,)))


def torchs(kind: str, state: tuple[Tensor, ...]) -> Any:
    return state if kind == "lstm" else state[0]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_on_packed_sequences(kind: str, bidirectional: bool, dtype: Any) -> None:
    """fp64 goes through torch's functions, fp32 through the fused layer where there is one."""
    theirs, ours = (module.to(dtype) for module in pair(kind, bidirectional=bidirectional))
    x = draw(B, T, INPUT).to(dtype).requires_grad_()
    state = tuple(s.to(dtype).requires_grad_() for s in states(kind, 4 if bidirectional else 2))
    output, final = ours(x, LENGTHS, state)

    kept = LENGTHS > 0
    packed = pack_padded_sequence(x[kept], LENGTHS[kept], batch_first=True, enforce_sorted=False)
    packed_output, packed_final = theirs(packed, torchs(kind, tuple(s[:, kept] for s in state)))
    expected = torch.zeros_like(output)
    expected[kept] = pad_packed_sequence(packed_output, batch_first=True, total_length=T)[0]
    packed_final = packed_final if kind == "lstm" else (packed_final,)
    close(output, expected)
    for got, want, initial in zip(final, packed_final, state, strict=True):
        close(got[:, kept], want)
        assert torch.equal(got[:, ~kept], initial[:, ~kept])

    grad = draw(*output.shape, seed=4).to(dtype)
    grad_final = draw(*final[0].shape, seed=5).to(dtype)
    total = (output * grad).sum() + sum((f * grad_final).sum() for f in final)
    other = (expected * grad).sum() + sum(
        (f * grad_final[:, kept]).sum() + (s[:, ~kept] * grad_final[:, ~kept]).sum()
        for f, s in zip(packed_final, state, strict=True)
    )
    got = torch.autograd.grad(total, [x, *state, *ours.parameters()])
    want = torch.autograd.grad(other, [x, *state, *theirs.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_without_lengths_and_biases(kind: str) -> None:
    theirs, ours = pair(kind, bidirectional=True, bias=False)
    x = draw(B, T, INPUT)
    expected, expected_final = theirs(x)
    output, final = ours(x)
    close(output, expected)
    close(torchs(kind, final), expected_final)
    with_lengths, final = ours(x, torch.full((B,), T))
    close(with_lengths, expected)
    close(torchs(kind, final), expected_final)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_load_both_ways(kind: str) -> None:
    theirs, ours = pair(kind, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.manual_seed(11)
    drawn = type(theirs)(INPUT, H) if kind in ("lstm", "gru") else nn.RNN(INPUT, H)
    torch.manual_seed(11)
    for a, b in zip(RecurrentLayers(kind, INPUT, H).parameters(), drawn.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_stands_behind_a_length_reaches_nothing(special: float) -> None:
    _, ours = pair("lstm", bidirectional=True)
    results = []
    for filler in (special, 0.5):
        x = draw(B, T, INPUT).masked_fill((torch.arange(T) >= LENGTHS[:, None])[..., None], filler)
        x.requires_grad_()
        output, final = ours(x, LENGTHS)
        grads = torch.autograd.grad(
            output.square().sum() + sum(f.sum() for f in final), [x, *ours.parameters()]
        )
        results.append((output, *final, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [[0, 0, 0], []], ids=["of zero", "of none"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nothing_to_read(kind: str, lengths: list[int]) -> None:
    _, ours = pair(kind, bidirectional=True)
    x = draw(len(lengths), T, INPUT).requires_grad_()
    state = states(kind, 4, len(lengths))
    output, final = ours(x, torch.tensor(lengths, dtype=torch.int64), state)
    assert output.shape == (len(lengths), T, 2 * H)
    assert not output.any()
    for got, initial in zip(final, state, strict=True):
        assert torch.equal(got, initial)


def test_a_row_depends_on_itself_alone() -> None:
    """Results do not depend on the other sequences of a batch, but for rounding."""
    _, ours = pair("gru", bidirectional=True)
    x = draw(B, T, INPUT)
    output, final = ours(x, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        alone, alone_final = ours(x[b : b + 1, : max(length, 1)], LENGTHS[b : b + 1])
        close(alone, output[b : b + 1, : max(length, 1)])
        close(alone_final[0], final[0][:, b : b + 1])


def test_dropout_falls_between_layers_in_training_alone() -> None:
    _, ours = pair("gru", dropout=0.5)
    x = draw(B, T, INPUT)
    torch.manual_seed(1)
    first, second = ours(x)[0], ours(x)[0]
    torch.manual_seed(1)
    assert torch.equal(ours(x)[0], first)
    assert not torch.equal(first, second)
    single = RecurrentLayers("gru", INPUT, H, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_make_the_whole(kind: str) -> None:
    theirs, ours = pair(kind)
    x = draw(B, T, INPUT)
    state = states(kind, 2)
    expected, expected_final = theirs(x, torchs(kind, state))
    together = ours.input_gates(x[..., :4]).unbind(1)
    apart = state
    for t in range(T):
        output, state = ours.step(x[:, t], state)
        close(output, expected[:, t])
        split, apart = ours.step(x[:, t, 4:], apart, together[t])
        close(split, expected[:, t])
    close(torchs(kind, state), expected_final)


@pytest.mark.parametrize("rows", [255, 300], ids=["few rows", "many rows"])
@pytest.mark.parametrize("bias", [False, True])
def test_onednns_product_is_a_linear_layers(rows: int, bias: bool) -> None:
    leaves = [draw(rows, 24), draw(40, 24, seed=1), *([draw(40, seed=2)] if bias else [])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, weight, added = (*leaves, None)[:3]
    grad = draw(40, rows, seed=3).t()
    expected = nn.functional.linear(x, weight, added)
    output = onednn_linear(x, weight, added)
    assert isinstance(output.grad_fn, _OneDNNLinear._backward_cls) == (
        rows == 300 and packing_unavailable_reason() == ""
    )
    close(output, expected)
    results = [torch.autograd.grad(y, leaves, grad) for y in (output, expected)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_copies_and_autocast() -> None:
    _, ours = pair("lstm")
    x = draw(B, T, INPUT)
    expected = ours(x, LENGTHS)[0]
    assert torch.equal(copy.deepcopy(ours)(x, LENGTHS)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x, LENGTHS)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x, LENGTHS)[0].float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RecurrentLayers("rnn", 2, 3), ValueError, "kind must be one of lstm, gru, tanh"),
        (lambda: RecurrentLayers("gru", 2, 3, dropout=1.0), ValueError, "dropout must be in"),
        (lambda: pair("gru")[1](draw(B, INPUT)), ValueError, r"x must have shape \[B, T, input"),
        (lambda: pair("gru")[1](draw(B, T, 2)), ValueError, "input_size = 6, got"),
        (
            lambda: pair("gru")[1](draw(B, T, INPUT), LENGTHS.float()),
            TypeError,
            "lengths must have dtype int32 or int64, got torch.float32",
        ),
        (
            lambda: pair("gru")[1](draw(B, T, INPUT), LENGTHS[:2]),
            ValueError,
            r"lengths must have shape \[B\] with B = 5",
        ),
        (
            lambda: pair("gru")[1](draw(B, T, INPUT), LENGTHS + 1),
            ValueError,
            r"lengths must be in \[0, T\] with T = 7",
        ),
        (
            lambda: pair("lstm")[1](draw(B, T, INPUT), None, states("gru", 2)),
            ValueError,
            "state must have 2 parts",
        ),
        (
            lambda: pair("gru", bidirectional=True)[1].step(draw(B, INPUT), states("gru", 4)),
            RuntimeError,
            "step needs layers of one direction",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^RecurrentLayers: .*{message}"):
        call()
