"""Encoder, decoder and Transformer against torch.nn's."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_attn.nn
from fused_attn.nn import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    multihead_attention,
)
from fused_attn.ops import attention

from .twins import check_twins, make_twins, share_parameters

B, H, T, S, E, HIDDEN = 3, 4, 5, 6, 16, 20

SOURCE_LENGTHS = torch.tensor([S, 2, 4])
TARGET_LENGTHS = torch.tensor([3, T, 1])


def padding(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size) >= lengths[:, None]


def causal(size: int) -> Tensor:
    return Transformer.generate_square_subsequent_mask(size)


def batch(seed: int, length: int, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = {"batch_first": (B, length, E), "length_first": (length, B, E)}
    return torch.randn(shape.get(layout, (length, E)), generator=generator)


def call(module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    return (module(**inputs),)


def encoder_masks(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    pairs = torch.rand(S, S, generator=generator) < 0.4
    pairs[:, 0] = False
    hidden = padding(SOURCE_LENGTHS, S)
    additive = torch.zeros(B, S).masked_fill(hidden, -math.inf)
    return {
        "none": {},
        "bool": {"src_mask": pairs},
        "padding": {"src_key_padding_mask": hidden},
        "float_padding": {"src_key_padding_mask": additive},
        "both": {"src_mask": pairs, "src_key_padding_mask": hidden},
        "causal": {
            "src_mask": causal(S) == -math.inf,
            "is_causal": True,
            "src_key_padding_mask": hidden,
        },
    }[kind]


def decoder_masks(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    pairs = torch.rand(B * H, T, S, generator=generator) < 0.4
    pairs[..., 0] = False
    return {
        "none": {},
        "causal": {"tgt_mask": causal(T) == -math.inf, "tgt_is_causal": True},
        "causal_float": {"tgt_mask": causal(T)},
        "all": {
            "tgt_mask": causal(T) == -math.inf,
            "memory_mask": pairs,
            "tgt_key_padding_mask": padding(TARGET_LENGTHS, T),
            "memory_key_padding_mask": padding(SOURCE_LENGTHS, S),
        },
    }[kind]


VARIANTS = [
    {"batch_first": batch_first, "norm_first": norm_first, "bias": bias, "activation": activation}
    for batch_first, norm_first, bias, activation in itertools.product(
        (True, False), (False, True), (True, False), ("relu", "gelu", F.silu)
    )
    # Every pair of values, not every combination.
    if (activation == "relu") or (batch_first != bias)
]


def label(variant: dict[str, Any]) -> str:
    """The same in every process, unlike a function's repr: pytest-xdist compares them."""
    return "-".join(f"{k}={getattr(v, '__name__', v)}" for k, v in variant.items())


@pytest.mark.parametrize("mask", ["none", "bool", "padding", "float_padding", "both", "causal"])
@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_encoder_layer(variant: dict[str, Any], mask: str) -> None:
    theirs, ours = make_twins("TransformerEncoderLayer", E, H, HIDDEN, 0.0, **variant)
    layout = "batch_first" if variant["batch_first"] else "length_first"
    check_twins(theirs, ours, {"src": batch(0, S, layout), **encoder_masks(mask)}, call)


@pytest.mark.parametrize("mask", ["none", "causal", "causal_float", "all"])
@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_decoder_layer(variant: dict[str, Any], mask: str) -> None:
    theirs, ours = make_twins("TransformerDecoderLayer", E, H, HIDDEN, 0.0, **variant)
    layout = "batch_first" if variant["batch_first"] else "length_first"
    inputs = {"tgt": batch(0, T, layout), "memory": batch(1, S, layout), **decoder_masks(mask)}
    check_twins(theirs, ours, inputs, call)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
@pytest.mark.parametrize("training", [True, False])
def test_transformer(training: bool, layout: str, norm_first: bool) -> None:
    # In evaluation, dropout must be off: with 0 it could not be seen to be.
    theirs, ours = make_twins(
        "Transformer",
        E,
        H,
        2,
        2,
        HIDDEN,
        0.0 if training else 0.3,
        batch_first=layout == "batch_first",
        norm_first=norm_first,
    )
    theirs.train(training)
    ours.train(training)
    inputs = {
        "src": batch(0, S, layout),
        "tgt": batch(1, T, layout),
        "tgt_mask": causal(T) == -math.inf,
        "memory_mask": torch.randn(T, S, generator=torch.Generator().manual_seed(3)),
    }
    if layout == "unbatched":
        hidden = padding(SOURCE_LENGTHS, S)[1]
        inputs |= {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
    else:
        hidden = padding(SOURCE_LENGTHS, S)
        inputs |= {
            "src_key_padding_mask": hidden,
            "memory_key_padding_mask": hidden,
            "tgt_key_padding_mask": padding(TARGET_LENGTHS, T),
        }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        check_twins(theirs, ours, inputs, call)


def test_encoder_equals_torchs_nested_tensor_path_at_valid_positions() -> None:
    theirs, ours = make_twins("Transformer", E, H, 2, 1, HIDDEN, batch_first=True)
    src, hidden = batch(0, S, "batch_first"), padding(SOURCE_LENGTHS, S)

    def encode(module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        return (module.encoder(inputs["src"], src_key_padding_mask=hidden)[~hidden],)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        check_twins(theirs.eval(), ours.eval(), {"src": src}, encode)


@pytest.mark.parametrize("arguments", [{}, {"norm_first": True, "bias": False}], ids=str)
def test_same_seed_draws_the_same_parameters(arguments: dict[str, Any]) -> None:
    drawn = []
    for package in (nn, fused_attn.nn):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
            module = package.Transformer(E, H, 1, 2, HIDDEN, **arguments)
        drawn.append(module.state_dict())
    assert list(drawn[0]) == list(drawn[1])
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_a_layer_draws_torchs_parameters(name: str) -> None:
    drawn = []
    for package in (nn, fused_attn.nn):
        torch.manual_seed(0)
        drawn.append(getattr(package, name)(E, H, HIDDEN).state_dict())
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layout", ["batch_first", "length_first"])
def test_lengths_equal_masks_at_valid_positions(layout: str, norm_first: bool) -> None:
    module = Transformer(
        E, H, 2, 2, HIDDEN, 0.0, batch_first=layout == "batch_first", norm_first=norm_first
    )
    src, tgt = batch(0, S, layout), batch(1, T, layout)
    hidden = padding(SOURCE_LENGTHS, S)
    expected = module(
        src,
        tgt,
        tgt_mask=causal(T),
        src_key_padding_mask=hidden,
        memory_key_padding_mask=hidden,
        tgt_key_padding_mask=padding(TARGET_LENGTHS, T),
    )
    actual = module(
        src, tgt, tgt_is_causal=True, src_lengths=SOURCE_LENGTHS, tgt_lengths=TARGET_LENGTHS
    )
    valid = ~padding(TARGET_LENGTHS, T)
    if layout == "length_first":
        valid = valid.T
    torch.testing.assert_close(actual[valid], expected[valid])
    shorter = SOURCE_LENGTHS - 1
    other = module(
        src,
        tgt,
        tgt_is_causal=True,
        src_lengths=SOURCE_LENGTHS,
        memory_lengths=shorter,
        memory_key_padding_mask=padding(shorter, S),
    )
    assert not torch.allclose(other[valid], expected[valid], atol=1e-3)


def test_every_attention_is_told_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["query_lengths"], kwargs["key_lengths"]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(multihead_attention, "attention", spy)
    module = Transformer(E, H, 1, 1, HIDDEN, batch_first=True)
    src, tgt = batch(0, S, "batch_first"), batch(1, T, "batch_first")
    module(src, tgt, src_lengths=SOURCE_LENGTHS, tgt_lengths=TARGET_LENGTHS)
    source, target = SOURCE_LENGTHS, TARGET_LENGTHS
    expected = [(source, source), (target, target), (target, source)]
    assert [(id(q), id(k)) for q, k in seen] == [(id(q), id(k)) for q, k in expected]


@pytest.mark.parametrize("norm_first", [False, True])
def test_nothing_behind_a_length_reaches_output_or_gradient(norm_first: bool) -> None:
    module = Transformer(E, H, 2, 2, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    valid = ~padding(TARGET_LENGTHS, T)
    results = []
    for filler in (0.0, math.nan, math.inf):
        src = batch(0, S, "batch_first").masked_fill(padding(SOURCE_LENGTHS, S)[..., None], filler)
        tgt = batch(1, T, "batch_first").masked_fill(~valid[..., None], filler)
        leaves = (src.requires_grad_(), tgt.requires_grad_(), *module.parameters())
        output = module(
            src, tgt, tgt_is_causal=True, src_lengths=SOURCE_LENGTHS, tgt_lengths=TARGET_LENGTHS
        )[valid]
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert torch.equal(tensor, expected)


class Cached(nn.Module):
    """A decoder stack's layers, run one position at a time with plain growing caches."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tgt: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        layers = list(self.decoder.layers)
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        memories = [layer.multihead_attn.project_key_value(memory, memory) for layer in layers]
        outputs = []
        for position in range(tgt.size(1)):
            x = tgt[:, position : position + 1]
            for i, layer in enumerate(layers):

                def self_attention(h: Tensor, i: int = i, layer: Any = layer) -> Tensor:
                    q, k, v = layer.self_attn.project(h, h, h)
                    before = past[i]
                    if before is not None:
                        k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
                    past[i] = (k, v)
                    return layer.self_attn.attend(q, k, v)

                def cross_attention(h: Tensor, i: int = i, layer: Any = layer) -> Tensor:
                    q = layer.multihead_attn.project_query(h)
                    return layer.multihead_attn.attend(q, *memories[i], key_lengths=memory_lengths)

                x = layer.connect(x, self_attention, cross_attention)
            outputs.append(x)
        return self.decoder.norm(torch.cat(outputs, dim=1))


@pytest.mark.parametrize("norm_first", [False, True])
def test_steps_with_a_cache_equal_the_whole_sequence(norm_first: bool) -> None:
    decoder = Transformer(E, H, 1, 2, HIDDEN, batch_first=True, norm_first=norm_first).decoder
    decoder.eval()
    tgt, memory = batch(0, T, "batch_first"), batch(1, S, "batch_first")
    expected = decoder(tgt, memory, tgt_is_causal=True, memory_lengths=SOURCE_LENGTHS)
    torch.testing.assert_close(Cached(decoder)(tgt, memory, SOURCE_LENGTHS), expected)


def test_layers_of_torch_fit_in_our_stacks_and_ours_in_torchs() -> None:
    src, tgt = batch(0, S, "batch_first"), batch(1, T, "batch_first")
    hidden = padding(SOURCE_LENGTHS, S)
    layers = [
        make_twins("TransformerEncoderLayer", E, H, HIDDEN, 0.0, batch_first=True),
        make_twins("TransformerDecoderLayer", E, H, HIDDEN, 0.0, batch_first=True),
    ]
    outputs = []
    for stacks in (nn, fused_attn.nn):
        for which in (0, 1):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
                module = Transformer(
                    E,
                    H,
                    batch_first=True,
                    custom_encoder=stacks.TransformerEncoder(layers[0][which], 2),
                    custom_decoder=stacks.TransformerDecoder(layers[1][which], 2),
                )
            parameter = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for p in module.parameters():
                    p.copy_(0.3 * torch.randn(p.shape, generator=parameter))
            masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
            with torch.no_grad():
                output = module.eval()(src, tgt, tgt_mask=causal(T), **masks)
            outputs.append(output)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_causal_mask_is_found_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Transformer(E, H, 1, 1, HIDDEN, batch_first=True).decoder
    seen: list[bool] = []
    layer = decoder.layers[0]
    forward = layer.forward

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["tgt_is_causal"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", spy)
    tgt, memory = batch(0, T, "batch_first"), batch(1, S, "batch_first")
    mask = causal(T) if dtype == torch.float32 else causal(T) == -math.inf
    other = mask.clone()
    other[0, 1] = 0
    square_of_heads = mask.expand(B * H, T, T)
    for given in (mask, other, square_of_heads, None):
        decoder(tgt, memory, tgt_mask=given)
    decoder(tgt, memory, tgt_mask=mask, tgt_is_causal=False)
    assert seen == [True, False, False, False, False]


def test_a_learned_mask_that_happens_to_be_causal_gets_its_gradient() -> None:
    decoder = Transformer(E, H, 1, 1, HIDDEN, 0.0, batch_first=True).decoder
    tgt, memory = batch(0, T, "batch_first"), batch(1, S, "batch_first")
    gradients = []
    for is_causal in (None, True, False):
        mask = causal(T).requires_grad_()
        output = decoder(tgt, memory, tgt_mask=mask, tgt_is_causal=is_causal)
        gradients.append(torch.autograd.grad(output.square().sum(), mask)[0])
    assert gradients[2].abs().max() > 0.0
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_generated_mask_is_torchs() -> None:
    ours = Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    assert torch.equal(ours, nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64))


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_has_torchs_mean_and_spread(norm_first: bool) -> None:
    theirs, ours = make_twins(
        "TransformerDecoderLayer", E, H, HIDDEN, 0.3, batch_first=True, norm_first=norm_first
    )
    count = 3000
    tgt = batch(0, T, "batch_first")[:1].expand(count, T, E)
    memory = batch(1, S, "batch_first")[:1].expand(count, S, E)
    torch.manual_seed(0)
    with torch.no_grad():
        actual, peer = ours(tgt, memory), theirs(tgt, memory)
    error = torch.sqrt((actual.var(0) + peer.var(0)) / count)
    assert torch.all((actual.mean(0) - peer.mean(0)).abs() < 5.0 * error)
    torch.testing.assert_close(actual.std(0), peer.std(0), rtol=0.12, atol=0.0)


@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2", "dropout3"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_each_dropout_module_counts(norm_first: bool, name: str) -> None:
    layer = TransformerDecoderLayer(E, H, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    tgt, memory = batch(0, T, "batch_first"), batch(1, S, "batch_first")
    without = layer(tgt, memory)
    getattr(layer, name).p = 0.5
    assert not torch.allclose(layer(tgt, memory), without)
    getattr(layer, name).eval()
    assert torch.equal(layer(tgt, memory), without)


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast_computes_as_torchs(norm_first: bool) -> None:
    # Smooth, for in bf16 one ReLU may open in one run and not in the other.
    variant = {"norm_first": norm_first, "activation": "gelu"}
    theirs, ours = make_twins("Transformer", E, H, 1, 1, HIDDEN, 0.0, batch_first=True, **variant)
    inputs = {
        "src": batch(0, S, "batch_first"),
        "tgt": batch(1, T, "batch_first"),
        "tgt_mask": causal(T) == -math.inf,
    }

    def autocast_call(module: nn.Module, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        if arguments["src"].dtype == torch.float64:
            return call(module, arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(**arguments)
        assert output.dtype == torch.float32
        return (output.bfloat16(),)

    check_twins(theirs, ours, inputs, autocast_call)


@pytest.mark.parametrize("norm_first", [False, True])
def test_low_precision(norm_first: bool) -> None:
    module = Transformer(E, H, 1, 1, HIDDEN, 0.1, batch_first=True, norm_first=norm_first)
    module.to(torch.bfloat16)
    src, tgt = batch(0, S, "batch_first").bfloat16(), batch(1, T, "batch_first").bfloat16()
    output = module(src, tgt, tgt_mask=causal(T).bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_copies_and_pickles() -> None:
    module = Transformer(E, H, 1, 1, HIDDEN, batch_first=True).eval()
    src, tgt = batch(0, S, "batch_first"), batch(1, T, "batch_first")
    expected = module(src, tgt)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(src, tgt), expected)


@pytest.mark.parametrize(("norm_first", "padded_by"), [(False, "lengths"), (True, "masks")])
def test_compiles_without_graph_breaks(norm_first: bool, padded_by: str) -> None:
    module = Transformer(E, H, 1, 1, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    src, tgt = batch(0, S, "batch_first"), batch(1, T, "batch_first")
    if padded_by == "lengths":
        kwargs: dict[str, Any] = {"tgt_is_causal": True, "src_lengths": SOURCE_LENGTHS}
    else:
        hidden = padding(SOURCE_LENGTHS, S)
        kwargs = {
            "tgt_mask": causal(T),
            "src_key_padding_mask": hidden,
            "memory_key_padding_mask": hidden,
        }
    results = []
    for function in (module, compiled):
        output = function(src, tgt, **kwargs)
        gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))
        results.append([output, *gradients])
    torch.testing.assert_close(results[1], results[0])


def test_compiled_dropout_runs() -> None:
    module = TransformerEncoderLayer(E, H, HIDDEN, 0.5, batch_first=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    src = batch(0, S, "batch_first")
    assert not torch.equal(compiled(src), compiled(src))


@pytest.mark.parametrize("layer", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_refuses_an_unknown_activation(layer: type[nn.Module]) -> None:
    message = f"^{layer.__name__}: activation must be 'relu', .* or a callable, got 'tanh'"
    with pytest.raises(ValueError, match=message):
        layer(E, H, activation="tanh")


def test_refuses_wrong_inputs() -> None:
    module = Transformer(E, H, 1, 1, HIDDEN, batch_first=True)
    src, tgt = torch.zeros(B, S, E), torch.zeros(B, T, E)
    message = r"^Transformer: src must have shape \[B, S, E\] or \[S, E\] with E = 16, got \[3, 6, "
    with pytest.raises(ValueError, match=message + "17"):
        module(torch.zeros(B, S, E + 1), tgt)
    with pytest.raises(ValueError, match=r"^Transformer: tgt must have shape \[B, T, E\] or"):
        module(src, torch.zeros(E))
    message = r"^Transformer: tgt must have the batch of src, \[3, 6, 16\], got \[4, 5, 16\]"
    with pytest.raises(ValueError, match=message):
        module(src, torch.zeros(B + 1, T, E))
    with pytest.raises(ValueError, match=r"^MultiheadAttention: attn_mask must have shape"):
        module(src, tgt, tgt_mask=torch.zeros(T, S))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "glu", "reglu", "geglu", "swiglu"])
def test_activations_that_torchs_layers_lack(activation: str) -> None:
    """The feed-forward network of Shazeer (2020), written out."""
    layer = TransformerEncoderLayer(E, H, HIDDEN, 0.0, activation=activation)
    functions = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "glu": torch.sigmoid,
        "reglu": F.relu,
        "geglu": F.gelu,
        "swiglu": F.silu,
    }
    hidden = layer.linear1(batch(0, S, "batch_first"))
    if activation.endswith("lu") and activation not in ("gelu_tanh", "silu"):
        gate, value = hidden[..., :HIDDEN], hidden[..., HIDDEN:]
        hidden = functions[activation](gate) * value
    else:
        hidden = functions[activation](hidden)
    expected = layer.linear2(hidden)
    torch.testing.assert_close(layer.feed_forward(batch(0, S, "batch_first")), expected)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh()]
)
def test_an_activation_may_be_a_module(activation: nn.Module) -> None:
    theirs, ours = make_twins("TransformerEncoderLayer", E, H, HIDDEN, 0.0, activation)
    check_twins(theirs, ours, {"src": batch(0, S, "length_first")}, call)


class Doubled(nn.Linear):
    """What an adapter does: another layer in the place of a linear one."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn.out_proj"])
@pytest.mark.parametrize("by", ["hook", "pre_hook", "forward", "subclass"])
def test_what_is_put_on_a_linear_layer_has_its_effect(name: str, by: str) -> None:
    """Hooks, replaced methods and modules have their effect, though we can do without the call."""
    layer = TransformerEncoderLayer(E, H, HIDDEN, 0.0, batch_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    x = batch(0, S, "batch_first")
    plain = layer(x)
    linear = layer.get_submodule(name)
    twice = copy.deepcopy(layer)
    doubled = twice.get_submodule(name)
    with torch.no_grad():
        doubled.weight.mul_(2.0)
        if by != "pre_hook":  # which doubles the input alone
            doubled.bias.mul_(2.0)
    if by == "hook":
        linear.register_forward_hook(lambda module, args, output: 2.0 * output)
    elif by == "pre_hook":
        linear.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    elif by == "forward":
        forward = linear.forward
        linear.forward = lambda input: 2.0 * forward(input)
    else:
        linear.__class__ = Doubled
    assert not torch.allclose(layer(x), plain)
    torch.testing.assert_close(layer(x), twice(x))


def test_a_hook_on_attention_sees_its_whole_output() -> None:
    layer = TransformerEncoderLayer(E, H, HIDDEN, 0.0, batch_first=True)
    nn.init.ones_(layer.self_attn.out_proj.bias)
    x = batch(0, S, "batch_first")
    seen: list[Tensor] = []
    layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    layer(x)
    torch.testing.assert_close(seen[0], layer.self_attn(x, x, x)[0])


def test_stacks_share_nothing_between_copies() -> None:
    layer = TransformerEncoderLayer(E, H, HIDDEN)
    share_parameters(copy.deepcopy(layer), layer)
    stack = TransformerEncoder(layer, 2, enable_nested_tensor=False, mask_check=False)
    first, second = stack.layers
    assert torch.equal(first.linear1.weight, second.linear1.weight)
    assert first.linear1.weight is not second.linear1.weight
    assert stack.num_layers == 2
    assert TransformerDecoder(TransformerDecoderLayer(E, H, HIDDEN), 0).num_layers == 0
