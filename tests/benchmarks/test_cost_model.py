"""The counts of each op's cases, beside an arithmetic of one small case that is written out here.

e^x and its like count E operations (`ELEMENTARY`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.roofs import from_row, to_row
from fused_attn.ops._cases import ELEMENTARY as E
from fused_attn.ops._cases import Case, Roof
from fused_attn.ops.add_layer_norm.cases import AddLayerNormCase
from fused_attn.ops.additive_attention.cases import AdditiveAttentionCase
from fused_attn.ops.attention.cases import AttentionCase
from fused_attn.ops.beam_search.cases import BeamSearchCase
from fused_attn.ops.bias_activation_dropout.cases import BiasActivationDropoutCase
from fused_attn.ops.copy_distribution.cases import CopyDistributionCase
from fused_attn.ops.decode_attention.cases import DecodeAttentionCase
from fused_attn.ops.recurrent_cell.cases import RecurrentCellCase
from fused_attn.validation import OPS, op_cases


def counts(case: Case, itemsize: int = 4) -> list[tuple[int, int, int]]:
    """Operations, those outside of products, and bytes: forward, and backward."""
    return [
        (case.flops(b), case.vector_flops(b), case.bytes_moved(itemsize, b)) for b in (False, True)
    ]


def attention(**fields: Any) -> AttentionCase:
    sizes = {"B": 2, "H": 4, "T": 3, "S": 5, "D": 8, "Dv": 6} | fields
    return AttentionCase(name="", kind="typical", **sizes)


def test_attention() -> None:
    pairs = 2 * 4 * 3 * 5
    q, k, v, out, lse = 24 * 8, 40 * 8, 40 * 6, 24 * 6, 24
    assert counts(attention()) == [
        # q k^T and p v; e^x of each logit; q, k and v read, the output and the lse written.
        (pairs * 2 * (8 + 6), pairs * E, 4 * (q + k + v + out + lse)),
        # q k^T, do v^T, p^T do, ds k, ds^T q; p again, and ds = p (dp - delta). q, k, v, the output
        # and its cotangent, the lse and its own are read, three gradients written.
        (
            pairs * 2 * (8 + 6 + 6 + 8 + 8),
            pairs * (E + 2),
            4 * (q + k + v + 2 * out + 2 * lse + q + k + v),
        ),
    ]


def test_attention_of_grouped_heads() -> None:
    whole, grouped = counts(attention()), counts(attention(key_heads=2))
    fewer = 4 * (40 - 20) * (8 + 6)  # keys and values of two heads less
    assert grouped[0] == (*whole[0][:2], whole[0][2] - fewer)
    assert grouped[1] == (*whole[1][:2], whole[1][2] - 2 * fewer)


def test_attention_with_causality() -> None:
    # Queries 0, 1, 2 see 1, 2, 3 keys; keys 3 and 4 are seen by none and not read.
    seen = 2 * 4 * (1 + 2 + 3)
    unread = 4 * 2 * 4 * 2 * (8 + 6)
    forward, backward = counts(attention(is_causal=True))
    plain_forward, plain_backward = counts(attention())
    assert forward == (seen * 28, seen * E, plain_forward[2] - unread)
    assert backward == (seen * 72, seen * (E + 2), plain_backward[2] - unread)


def test_attention_in_a_window() -> None:
    # Query t sees keys t - 1 to t: 1, 2, 2 of them, keys 0 to 2.
    seen = 2 * 4 * 5
    forward, _ = counts(attention(window=(1, 0)))
    assert forward == (seen * 28, seen * E, counts(attention())[0][2] - 4 * 2 * 4 * 2 * 14)


def test_attention_with_lengths_reads_less_and_writes_everything() -> None:
    lengths = {"query_lengths": (3, 1), "key_lengths": (5, 2)}
    seen = 4 * (15 + 2)
    unread = 4 * 4 * (2 * 8 + 3 * (8 + 6))  # of sentence 1
    forward, backward = counts(attention(**lengths))
    assert forward == (seen * 28, seen * E, counts(attention())[0][2] - unread)
    # Nor are the cotangent and the output behind the length.
    assert backward[2] == counts(attention())[1][2] - unread - 4 * 4 * 2 * 2 * 6


def test_attention_of_a_packed_batch_has_no_padding() -> None:
    case = attention(query_lengths=(3, 1), key_lengths=(5, 2), packed=True)
    q, k, v, out, lse = 16 * 8, 28 * 8, 28 * 6, 16 * 6, 16
    assert counts(case)[0] == (4 * 17 * 28, 4 * 17 * E, 4 * (q + k + v + out + lse))
    assert counts(case)[1][2] == 4 * (2 * (q + k + v + out + lse))


def test_attention_with_a_bias_and_a_mask() -> None:
    plain = counts(attention())
    # In bf16, with a bias in fp32: 4 bytes each, backward once more for its gradient.
    biased = counts(attention(bias_shape=(4, 3, 5), bias_fp32=True), itemsize=2)
    assert biased[0][2] - counts(attention(), 2)[0][2] == 4 * 60
    assert biased[1][2] - counts(attention(), 2)[1][2] == 2 * 4 * 60
    # A byte an element, for all heads once.
    masked = counts(attention(mask_shape=(2, 1, 3, 5)))
    assert [m[2] - p[2] for m, p in zip(masked, plain, strict=True)] == [30, 30]


def test_decode_attention() -> None:
    case = DecodeAttentionCase(name="", kind="typical", B=2, K=3, H=4, Hk=2, S=5, D=8, Dv=6)
    queries, pairs = 2 * 3 * 4, 2 * 3 * 4 * 5
    # Three beams of a source read its keys once; queries, outputs, the lse.
    moved = 4 * (2 * 2 * 5 * (8 + 6) + queries * (8 + 6) + queries)
    assert counts(case)[0] == (pairs * 28, pairs * E, moved)


def test_decode_attention_sees_less_in_a_window() -> None:
    sizes: dict[str, Any] = {"B": 1, "H": 1, "T": 2, "S": 9, "D": 4, "window": 2}
    case = DecodeAttentionCase(name="", kind="typical", key_lengths=(7,), **sizes)
    # Queries at positions 5 and 6 see keys 3 to 5 and 4 to 6.
    assert counts(case)[0] == (6 * 16, 6 * E, 4 * (4 * 8 + 2 * 8 + 2))
    # With lengths before which there is no position the first query sees nothing.
    case = dataclasses.replace(case, key_lengths=(1,))
    assert counts(case)[0] == (16, E, 4 * (8 + 2 * 8 + 2))


def test_decode_attention_reads_what_an_ancestry_leads_to() -> None:
    sizes: dict[str, Any] = {"B": 1, "K": 2, "H": 1, "S": 3, "D": 4}
    case = DecodeAttentionCase(name="", kind="typical", has_ancestry=True, **sizes)
    history = case.inputs(torch.float32, torch.device("cpu"), torch.Generator())["ancestry"]
    cells = sum(len(history[0, :, s].unique()) for s in range(3))
    # Between one row for both beams and one for each; six entries of int32.
    assert 3 <= cells <= 6
    assert counts(case)[0] == (6 * 16, 6 * E, 4 * (cells * 8 + 2 * 8 + 2 + 6))


def test_beam_search() -> None:
    case = BeamSearchCase(name="", kind="typical", B=2, K=3, V=50)
    # e^x of each logit, added up; one read of them.
    assert counts(case, 2)[0] == (300 * (E + 1), 300 * (E + 1), 300 * 2)
    listed = dataclasses.replace(case, listed_share=0.1)
    assert counts(listed, 2)[0] == (30 * (E + 1), 30 * (E + 1), 30 * 2)


def add_layer_norm(**fields: Any) -> AddLayerNormCase:
    return AddLayerNormCase(name="", kind="typical", leading=(2, 3), width=10, **fields)


@pytest.mark.parametrize(
    ("fields", "operations", "tensors"),
    [
        # x + r; mean 1, deviation 1, its square 2; times rstd, times weight, plus bias.
        # Backward: x + r and a multiply-add; g w; its sum 1, that of its product with x̂ 2; two
        # multiply-adds; sums over rows of g x̂ and g. x, r and g are read, one gradient written.
        ({}, (8, 3 + 1 + 3 + 4 + 3), (3, 4)),
        # Without a mean: square 2, rstd, weight; backward a product less, a sum less.
        (
            {"norm": "rms_norm", "bias": False, "residual": False},
            (4, 1 + 1 + 2 + 3 + 2),
            (2, 3),
        ),
        # Scaled by dropout, plus its bias; the gradient of x is another than r's.
        ({"dropout_p": 0.1, "x_bias": True}, (10, 5 + 1 + 3 + 4 + 3 + 1 + 1), (3, 5)),
        # The sum is written, and read instead of what it is made from; its cotangent is added.
        ({"return_sum": True}, (8, 2 + 1 + 3 + 4 + 3 + 1), (4, 4)),
    ],
)
def test_add_layer_norm(
    fields: dict[str, Any], operations: tuple[int, int], tensors: tuple[int, int]
) -> None:
    found = counts(add_layer_norm(**fields), 2)
    assert found == [(60 * n, 60 * n, 60 * t * 2) for n, t in zip(operations, tensors, strict=True)]


@pytest.mark.parametrize(
    ("fields", "operations", "tensors"),
    [
        # x + b, max, times 1 / (1 - p); backward x + b, a selection, that product, b's sum.
        ({"activation": "relu", "dropout_p": 0.1}, (3, 4), (2, 3)),
        # A function; backward x + b, its derivative, a product, the sum.
        ({"activation": "gelu"}, (1 + E, 1 + E + 1 + 1), (2, 3)),
        # a(x + b) (y + c); backward both sums again, sigmoid and 1 + 3 for value and derivative of
        # silu, three products, two sums. Two halves are read, and two written.
        ({"activation": "silu", "gated": True}, (3 + E, 2 + E + 4 + 3 + 2), (3, 5)),
        # x + b + r; backward the gradients are the cotangent, which is read for that of b.
        ({"activation": None, "residual": True}, (2, 1), (3, 1)),
        # Nothing but a sum: no gradient needs work.
        ({"activation": None, "residual": True, "bias": False}, (1, 0), (3, 0)),
    ],
)
def test_bias_activation_dropout(
    fields: dict[str, Any], operations: tuple[int, int], tensors: tuple[int, int]
) -> None:
    case = BiasActivationDropoutCase(name="", kind="typical", leading=(2, 3), width=10, **fields)
    assert counts(case, 2) == [
        (60 * n, 60 * n, 60 * t * 2) for n, t in zip(operations, tensors, strict=True)
    ]


def additive_attention(**fields: Any) -> AdditiveAttentionCase:
    sizes = {"B": 2, "T": 30, "S": 40, "E": 10, "D": 6} | fields
    return AdditiveAttentionCase(name="", kind="typical", **sizes)


def test_additive_attention() -> None:
    columns, rows = 2 * 30 * 40 * 10, 2 * (30 + 40) * 10
    queries, keys, values, weights, context = 600, 800, 480, 2400, 360
    inputs = queries + keys + values
    forward, backward = counts(additive_attention())
    # 1 + e^2q e^2k, and w r + w' r' over a common denominator; e^x of the rows; the context.
    assert forward[1] == columns * (2 + 4) + rows * E
    assert forward[0] == forward[1] + 2 * weights * 6
    assert forward[2] == 4 * (inputs + weights + context)
    # 1 + e^2q e^2k, r by three products, r - r², (g, + and +), a multiply-add; e^x of the rows; the
    # gradients of weights and values. Weights and both cotangents are read.
    assert backward[1] == columns * (2 + 3 + 2 + 3 + 2) + rows * E
    assert backward[0] == backward[1] + 4 * weights * 6
    assert backward[2] == 4 * (2 * inputs + 2 * weights + context)


def test_additive_attention_of_one_query_takes_tangents_of_sums() -> None:
    assert counts(additive_attention(T=1))[0][1] == 2 * 40 * 10 * (1 + E + 2)


def test_additive_attention_with_lengths() -> None:
    whole, part = (
        counts(additive_attention(**fields)) for fields in ({}, {"key_lengths": (40, 10)})
    )
    # 30 keys less are read, and their gradients are written all the same.
    assert [w[2] - p[2] for w, p in zip(whole, part, strict=True)] == [4 * 30 * (10 + 6)] * 2
    pairs = 30 * (40 + 10)
    assert part[0][1] == pairs * 10 * 6 + (2 * 30 + 40 + 10) * 10 * E


def test_additive_attention_with_features() -> None:
    forward, backward = counts(additive_attention(F=3))
    pairs = 2400
    # The sum with the features' product is no product of two rows; tanh' = 1 - tanh² takes 2.
    assert forward[1] == pairs * 10 * (1 + E + 2)
    assert backward[1] == pairs * 10 * (1 + E + 2 + 1 + 2 + 2)
    assert forward[0] - forward[1] == pairs * 2 * (6 + 3 * 10)
    assert backward[0] - backward[1] == pairs * 2 * (2 * 6 + 3 * 3 * 10)
    assert forward[2] - counts(additive_attention())[0][2] == 4 * pairs * 3
    assert backward[2] - counts(additive_attention())[1][2] == 2 * 4 * pairs * 3


def copy(**fields: Any) -> CopyDistributionCase:
    sizes: dict[str, Any] = {"leading": (2, 5), "vocabulary": 30, "positions": 7, "extra": 4}
    return CopyDistributionCase(name="", kind="typical", **(sizes | fields))


def test_copy_distribution() -> None:
    tokens = 2 * 7 * 8
    # Of five rows two have no word to score: their logits are not read, but get gradients.
    loss = 6 * 30 * (E + 1)
    assert counts(copy()) == [
        (loss, loss, 4 * 6 * 37 + tokens),
        (loss, loss, 4 * (6 + 10) * 37 + tokens),
    ]
    # Scores have exponentials as well.
    assert counts(copy(gate=False))[0][0] == 6 * 37 * (E + 1)
    # log p of every word is a sum; backward sum and multiply-add. Weights are added to words.
    words = counts(copy(all_words=True))
    assert words[0][0] == 10 * (30 * (E + 2) + 7)
    assert words[1][0] == 10 * (30 * (E + 3) + 7)
    assert words[0][2] == 4 * 10 * (37 + 34) + tokens
    assert words[1][2] == 4 * 10 * (2 * 37 + 34) + tokens


def test_copy_distribution_counts_the_rows_that_its_inputs_have() -> None:
    case = copy(extra=0)
    targets = case.inputs(torch.float32, torch.device("cpu"), torch.Generator())["targets"]
    with_word = int(((targets >= 0) & (targets < 30)).sum())
    assert counts(case)[0][0] == with_word * 30 * (E + 1)


@pytest.mark.parametrize(
    ("kind", "operations", "tensors"),
    [
        # Two tensors of G gates, old and new states; backward the same, cotangents in place of new
        # states, and gradients of gates (a GRU's in two tensors) and of the state.
        ("lstm", (4 + 4 * E + 3 + E + 1, 4 + 4 * E + 3 + E + 5 + 4 * 4 + 1), (11, 16)),
        ("gru", (2 + 2 + 3 * E + 3, 4 + 3 * E + 5 + 5 + 4 + 1), (8, 15)),
        ("tanh", (1 + E, 1 + E + 3), (3, 4)),
        ("relu", (2, 2), (3, 4)),
    ],
)
def test_recurrent_cell(kind: Any, operations: tuple[int, int], tensors: tuple[int, int]) -> None:
    case = RecurrentCellCase(name="", kind="typical", cell_kind=kind, leading=(6,), hidden_size=10)
    assert counts(case, 2) == [
        (60 * n, 60 * n, 60 * t * 2) for n, t in zip(operations, tensors, strict=True)
    ]


def test_states_in_fp32_are_larger() -> None:
    sizes: dict[str, Any] = {"cell_kind": "lstm", "leading": (6,), "hidden_size": 10}
    case = RecurrentCellCase(name="", kind="typical", fp32_state=True, **sizes)
    # Cells, old and new; backward the old one, the cotangent of the new and the gradient.
    assert counts(case, 2)[0][2] == 60 * (9 * 2 + 2 * 4)
    assert counts(case, 2)[1][2] == 60 * (13 * 2 + 3 * 4)


@pytest.mark.parametrize("op", OPS)
def test_no_benchmark_is_without_a_floor(op: str) -> None:
    for case in op_cases(op):
        if case.kind == "benchmark":
            assert case.bytes_moved(4) > 0
            assert case.flops() > 0
            assert case.vector_flops() > 0


def test_the_longest_of_the_three_parts_is_the_floor() -> None:
    case = BeamSearchCase(name="", kind="typical", B=1, K=1, V=1000)
    copies = ((1000, 1e-6), (4000, 4e-6))
    products = {torch.float32: 1e12}
    # 4000 bytes at 1 GB/s; 13000 operations at 1 TFLOP/s, and at 1 GFLOP/s.
    floor = case.floor_seconds(Roof(copies, products), torch.float32, "forward")
    assert floor == pytest.approx(4e-6)
    slow = Roof(copies, products, vector=1e9)
    assert case.floor_seconds(slow, torch.float32, "forward") == pytest.approx(13e-6)
    # Products are not slowed by it.
    assert attention().floor_parts(slow, torch.float32, "forward")[1] == pytest.approx(
        max(120 * 28 / 1e12, 120 * E / 1e9)
    )


def test_a_roof_survives_its_row() -> None:
    for vector in (None, 3e13):
        roof = Roof(((1000, 1e-6),), {torch.bfloat16: 1e15}, vector)
        assert from_row(to_row(roof)) == roof
