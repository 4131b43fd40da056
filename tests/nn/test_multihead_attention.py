"""MultiheadAttention against torch.nn's, and what it does beyond."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn.nn import MultiheadAttention

from .twins import check_twins, make_twins

B, H, T, S, E = 3, 4, 5, 7, 24

MASKS = (
    "none",
    "bool_2d",
    "bool_3d",
    "float_2d",
    "float_3d",
    "bool_padding",
    "float_padding",
    "bool_2d+bool_padding",
    "bool_3d+bool_padding",
    "float_2d+bool_padding",
    "float_3d+float_padding",
    "bool_2d+float_padding",
    "causal",
    "causal+bool_padding",
)


def make_masks(kind: str, batch: int, queries: int, keys: int, batched: bool) -> dict[str, Any]:
    """torch.nn's mask arguments; every query sees key 0, for torch.nn gives NaN otherwise."""
    generator = torch.Generator().manual_seed(3)
    masks: dict[str, Any] = {}
    parts = kind.split("+")
    for part in parts:
        kind_of_value, _, where = part.partition("_")
        if part == "none":
            continue
        if part == "causal":
            masks["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(1)
            masks["is_causal"] = True
            continue
        if where == "padding":
            shape: tuple[int, ...] = (batch, keys) if batched else (keys,)
            name = "key_padding_mask"
        else:
            shape = (queries, keys) if where == "2d" else (batch * H, queries, keys)
            name = "attn_mask"
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., 0] = False
        values = torch.randn(shape, generator=generator).masked_fill(hidden, -math.inf)
        masks[name] = hidden if kind_of_value == "bool" else values
    return masks


def attend(module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call with the inputs that are there; of the outputs those that are there."""
    kwargs = dict(inputs)
    query = kwargs.pop("query")
    key = kwargs.pop("key", query)
    value = kwargs.pop("value", key)
    return tuple(t for t in module(query, key, value, **kwargs) if t is not None)


def sequence(generator_seed: int, length: int, width: int, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(generator_seed)
    shape = {"batch_first": (B, length, width), "length_first": (length, B, width)}
    return torch.randn(shape.get(layout, (length, width)), generator=generator)


@pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
@pytest.mark.parametrize("weights", ["no_weights", "averaged", "per_head"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_layouts_and_weights(mask: str, weights: str, layout: str) -> None:
    theirs, ours = make_twins("MultiheadAttention", E, H, batch_first=layout == "batch_first")
    batched = layout != "unbatched"
    keys = T if "causal" in mask else S
    inputs = {
        "query": sequence(4, T, E, layout),
        "key": sequence(5, keys, E, layout),
        "need_weights": weights != "no_weights",
        "average_attn_weights": weights == "averaged",
        **make_masks(mask, B if batched else 1, T, keys, batched),
    }
    check_twins(theirs, ours, inputs, attend)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("kind", ["self", "key_is_value", "all_differ", "kdim_vdim"])
def test_projections(
    kind: str, add_bias_kv: bool, add_zero_attn: bool, bias: bool, batch_first: bool
) -> None:
    layout = "batch_first" if batch_first else "length_first"
    widths = {"kdim": 10, "vdim": 11} if kind == "kdim_vdim" else {}
    theirs, ours = make_twins(
        "MultiheadAttention",
        E,
        H,
        bias=bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        batch_first=batch_first,
        **widths,
    )
    inputs: dict[str, Any] = {"query": sequence(4, T, E, layout)}
    keys = T
    if kind != "self":
        keys = S
        inputs["key"] = sequence(5, S, widths.get("kdim", E), layout)
    if kind in ("all_differ", "kdim_vdim"):
        inputs["value"] = sequence(6, S, widths.get("vdim", E), layout)
    check_twins(
        theirs, ours, inputs | make_masks("float_3d+float_padding", B, T, keys, True), attend
    )
    check_twins(theirs, ours, inputs | {"need_weights": False}, attend)


def test_evaluation_without_gradients_equals_torchs_fast_path() -> None:
    theirs, ours = make_twins("MultiheadAttention", E, H, batch_first=True)
    inputs = {"query": sequence(4, T, E, "batch_first"), "need_weights": False}
    with torch.no_grad():
        check_twins(theirs.eval(), ours.eval(), inputs, attend)


@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("kdim", [None, 10])
def test_same_seed_draws_the_same_parameters(add_bias_kv: bool, kdim: int | None) -> None:
    drawn = []
    for module in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(0)
        drawn.append(module(E, H, add_bias_kv=add_bias_kv, kdim=kdim).state_dict())
    assert list(drawn[0]) == list(drawn[1])
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_is_torchs_class_too() -> None:
    assert isinstance(MultiheadAttention(E, H), nn.MultiheadAttention)


def test_causal_needs_no_mask() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    x = sequence(4, T, E, "batch_first")
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = module(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(module(x, x, x, is_causal=True, need_weights=False)[0], expected)


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_key_lengths_equal_a_key_padding_mask(
    batch_first: bool, is_causal: bool, extra: dict[str, bool]
) -> None:
    layout = "batch_first" if batch_first else "length_first"
    module = MultiheadAttention(E, H, batch_first=batch_first, **extra)
    x = sequence(4, T, E, layout)
    lengths = torch.tensor([T, 2, 1])
    padding = torch.arange(T) >= lengths[:, None]
    causal = torch.ones(T, T, dtype=torch.bool).triu(1) if is_causal else None
    expected = module(x, x, x, key_padding_mask=padding, attn_mask=causal)
    actual = module(x, x, x, key_lengths=lengths, is_causal=is_causal)
    torch.testing.assert_close(actual, expected)


def test_queries_behind_their_length_attend_to_nothing() -> None:
    module = MultiheadAttention(E, H, bias=False, batch_first=True)
    x = sequence(4, T, E, "batch_first")
    lengths = torch.tensor([T, 2, 0])
    output, weights = module(x, x, x, query_lengths=lengths)
    behind = torch.arange(T) >= lengths[:, None]
    assert torch.all(output[behind] == 0.0)
    assert torch.all(weights[behind] == 0.0)
    expected = module(x, x, x)[0]
    torch.testing.assert_close(output[~behind], expected[~behind])


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_parts_make_the_whole(batch_first: bool) -> None:
    layout = "batch_first" if batch_first else "length_first"
    module = MultiheadAttention(E, H, batch_first=batch_first)
    query, memory = sequence(4, T, E, layout), sequence(5, S, E, layout)
    q = module.project_query(query)
    k, v = module.project_key_value(memory, memory)
    assert q.shape == (B, H, T, E // H)
    assert k.shape == v.shape == (B, H, S, E // H)
    expected = module(query, memory, memory, need_weights=False)[0]
    torch.testing.assert_close(module.attend(q, k, v), expected)
    own = module.project(query, query, query)
    for packed, separate in zip(own, (q, *module.project_key_value(query, query)), strict=True):
        torch.testing.assert_close(packed, separate)
    separate_value = module.project_key_value(memory, memory.clone())
    torch.testing.assert_close((k, v), separate_value)


def test_projections_copy_nothing() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    x = sequence(4, T, E, "batch_first")
    q, k, v = module.project(x, x, x)
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1


def test_attend_takes_the_ops_masks() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    query, memory = sequence(4, T, E, "batch_first"), sequence(5, S, E, "batch_first")
    q = module.project_query(query)
    k, v = module.project_key_value(memory, memory)
    padding = torch.arange(S) >= torch.tensor([S, 3, 1])[:, None]
    bias = torch.randn(T, S)
    expected = module(query, memory, memory, key_padding_mask=padding, attn_mask=bias)[0]
    torch.testing.assert_close(
        module.attend(q, k, v, mask=~padding[:, None, None, :], bias=bias.double()), expected
    )
    torch.testing.assert_close(
        module.attend(q, k, v, key_lengths=torch.tensor([S, 3, 1]), bias=bias), expected
    )


def test_a_replaced_output_projection_is_called() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    x = sequence(4, T, E, "batch_first")
    module.out_proj = nn.Identity()
    q, k, v = module.project(x, x, x)
    assert module(x, x, x)[0].shape == module.attend(q, k, v).shape == (B, T, E)


def test_copies_pickles_and_changes_dtype() -> None:
    module = MultiheadAttention(E, H, batch_first=True, add_bias_kv=True)
    x = sequence(4, T, E, "batch_first")
    expected = module(x, x, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(x, x, x), expected, rtol=0, atol=0)
    low = module.to(torch.bfloat16)
    low_x = x.bfloat16()
    output, weights = low(low_x, low_x, low_x)
    assert output.dtype == weights.dtype == torch.bfloat16


def test_dropout_has_torchs_mean_and_spread() -> None:
    theirs, ours = make_twins("MultiheadAttention", E, H, dropout=0.4, batch_first=True)
    x = sequence(4, T, E, "batch_first")[:1]
    many = x.expand(4000, T, E)
    torch.manual_seed(0)
    with torch.no_grad():
        actual = ours(many, many, many, need_weights=False)[0]
        peer = theirs(many, many, many, need_weights=False)[0]
        expected = ours.eval()(x, x, x, need_weights=False)[0]
    error_of_mean = peer.std(0) / math.sqrt(len(many))
    assert torch.all((actual.mean(0) - expected[0]).abs() < 5.0 * error_of_mean)
    # The standard deviation of 4000 samples is known to about 1.2 %.
    torch.testing.assert_close(actual.std(0), peer.std(0), rtol=0.1, atol=0.0)


def test_dropout_follows_the_seed_and_the_mode() -> None:
    module = MultiheadAttention(E, H, dropout=0.4, batch_first=True)
    x = sequence(4, T, E, "batch_first")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(module(x, x, x)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    weights = module(x, x, x)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, T))  # those before dropout
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_computes_as_torchs(need_weights: bool) -> None:
    theirs, ours = make_twins(
        "MultiheadAttention", E, H, batch_first=True, add_bias_kv=True, add_zero_attn=True
    )
    inputs = {
        "query": sequence(4, T, E, "batch_first"),
        "need_weights": need_weights,
        **make_masks("float_2d", B, T, T, True),
    }

    def call(module: nn.Module, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        if arguments["query"].dtype == torch.float64:
            return attend(module, arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(module, arguments)

    actual = check_twins(theirs, ours, inputs, call)
    assert actual[0].dtype == torch.bfloat16


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_without_graph_breaks(need_weights: bool) -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = sequence(4, T, E, "batch_first").requires_grad_()
    kwargs = make_masks("bool_2d+bool_padding", B, T, T, True) | {"need_weights": need_weights}
    results = []
    for function in (module, compiled):
        outputs = [t for t in function(x, x, x, **kwargs) if t is not None]
        gradient = torch.autograd.grad(sum(t.square().sum() for t in outputs), x)[0]
        results.append([*outputs, gradient])
    torch.testing.assert_close(results[1], results[0])


CONSTRUCTOR_ERRORS = {
    "zero_width": ((0, 1), {}, "embed_dim and num_heads must be positive, got 0 and 1"),
    "not_multiple": ((24, 5), {}, "embed_dim must be a multiple of num_heads = 5, got 24"),
    "dropout": ((24, 4, 1.0), {}, r"dropout must be in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR_ERRORS)
def test_refuses_wrong_constructor_arguments(name: str) -> None:
    args, kwargs, message = CONSTRUCTOR_ERRORS[name]
    with pytest.raises(ValueError, match=f"^MultiheadAttention: {message}"):
        MultiheadAttention(*args, **kwargs)


CALL_ERRORS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "query_width": (
        ValueError,
        {"query": torch.zeros(B, T, E + 1)},
        r"query must have shape \[B, T, E\] or \[T, E\] with E = 24, got \[3, 5, 25\]",
    ),
    "query_rank": (ValueError, {"query": torch.zeros(E)}, r"query must have shape .* got \[24\]"),
    "key_width": (
        ValueError,
        {"key": torch.zeros(B, S, E + 1)},
        r"key must have shape \[B, S, kdim\] with kdim = 24, got \[3, 7, 25\]",
    ),
    "key_unbatched": (
        ValueError,
        {"key": torch.zeros(S, E)},
        r"key must have shape \[B, S, kdim\] with kdim = 24, got \[7, 24\]",
    ),
    "value_length": (
        ValueError,
        {"value": torch.zeros(B, S + 1, E)},
        r"value must have the batch and length of key, \[3, 7\], got \[3, 8\]",
    ),
    "key_batch": (
        ValueError,
        {"key": torch.zeros(B + 1, S, E), "value": torch.zeros(B + 1, S, E)},
        "key must have the batch size of query, 3, got 4",
    ),
    "attn_mask_shape": (
        ValueError,
        {"attn_mask": torch.zeros(T, T)},
        r"attn_mask must have shape \[T, S\] = \[5, 7\] or \[B \* H, T, S\] = \[12, 5, 7\], got "
        r"\[5, 5\]",
    ),
    "attn_mask_dtype": (
        TypeError,
        {"attn_mask": torch.zeros(T, S, dtype=torch.int64)},
        "attn_mask must be bool or floating point, got int64",
    ),
    "key_padding_mask_shape": (
        ValueError,
        {"key_padding_mask": torch.zeros(B, T, dtype=torch.bool)},
        r"key_padding_mask must have shape \[B, S\] = \[3, 7\], got \[3, 5\]",
    ),
    "key_padding_mask_dtype": (
        TypeError,
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.uint8)},
        "key_padding_mask must be bool or floating point, got uint8",
    ),
}


@pytest.mark.parametrize("name", CALL_ERRORS)
def test_refuses_wrong_inputs(name: str) -> None:
    error, change, message = CALL_ERRORS[name]
    inputs = {"query": torch.zeros(B, T, E), "key": torch.zeros(B, S, E)}
    inputs["value"] = torch.zeros(B, S, E)
    module = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(error, match=f"^MultiheadAttention: {message}"):
        module(**(inputs | change))


def test_refuses_nested_tensors() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    nested = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)], layout=torch.jagged)
    with pytest.raises(TypeError, match="must be dense, got a nested tensor"):
        module(nested, nested, nested)


def test_messages_follow_the_layout() -> None:
    module = MultiheadAttention(E, H)
    with pytest.raises(ValueError, match=r"query must have shape \[T, B, E\] or \[T, E\]"):
        module(torch.zeros(T, B, E + 1), torch.zeros(S, B, E), torch.zeros(S, B, E))
