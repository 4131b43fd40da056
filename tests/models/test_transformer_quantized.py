"""Laws of the 8-bit copy of a Transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_attn.generation import beam_search, greedy_search
from fused_attn.models import Transformer, quantize
from fused_attn.nn.quantized import QuantizedLinear, quantization_unavailable_reason

from .test_transformer import VARIANTS, close, make, sources
from .test_transformer_decoding import tokens_for

pytestmark = pytest.mark.skipif(
    quantization_unavailable_reason() != "", reason=quantization_unavailable_reason() or "-"
)


def test_a_quantised_product_is_within_its_rounding() -> None:
    # Weights err by half their scale, activations by half of theirs; the sum of both bounds it.
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 40), torch.randn(7, 40), torch.randn(7)
    scale = weight.abs().amax(1) / 127
    step = (x.amax() - x.amin()) / (127 if not torch.cpu._is_vnni_supported() else 255)
    rounded = (weight / scale[:, None]).round() * scale[:, None]
    product = QuantizedLinear(weight, bias)
    bound = step * rounded.abs().sum(1) * 0.51 + 1e-4
    error = (product(x) - (x @ rounded.T + bias)).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-4  # it is no product in fp32
    assert torch.equal(product(x, "relu"), product(x).relu())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_near_those_of_fp32(variant: str) -> None:
    model = make(**VARIANTS[variant])
    copy = quantize(model)
    source, lengths = sources(5, 2, 7)
    ours, theirs = copy.start(source, lengths, 2), model.start(source, lengths, 2)
    for step in range(6):
        tokens, parents = tokens_for((3, 2), step), tokens_for((3, 2), 50 + step) % 2
        logits, ours = copy.step(tokens, ours)
        expected, theirs = model.step(tokens, theirs)
        assert not torch.equal(logits, expected)
        assert (logits - expected).abs().max() < 0.06 * expected.abs().max()
        ours, theirs = copy.reorder(ours, parents), model.reorder(theirs, parents)


def test_it_is_a_decoder_of_its_own() -> None:
    model = make(**VARIANTS["all_tied"])
    copy = quantize(model)
    source, lengths = sources(5, 2, 7)
    target, target_lengths = sources(4, 2, 3, seed=1)
    assert (copy.bos_token, copy.eos_token, copy.max_length) == (1, 2, 80)
    assert copy.eval() is copy
    assert not copy.training
    found = [beam_search(copy, source, lengths, beam_size=3), greedy_search(copy, source, lengths)]
    weights = copy.align(source, target, lengths, target_lengths)
    expected = model.align(source, target, lengths, target_lengths)
    assert (weights - expected).abs().max() < 0.05
    close(copy.align(source[:1, :5], target[:1]).sum(-1), torch.ones(1, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = [beam_search(copy, source, lengths, beam_size=3), greedy_search(copy, source, lengths)]
    assert again == found


def test_sources_are_replaced() -> None:
    model = quantize(make())
    source, lengths = sources(5, 3)
    tokens = tokens_for((2, 2), 0)
    _, state = model.step(tokens, model.start(source, lengths, 2))
    state = model.replace(state, torch.tensor([1]), model.start(source[1:], lengths[1:], 2))
    assert state.cache.known_positions() == [1, 0]
    logits, _ = model.step(tokens, state)
    expected, _ = model.step(tokens[1:], model.start(source[1:], lengths[1:], 2))
    assert (logits[1:] - expected).abs().max() < 0.1 * expected.abs().max()


def test_refusals() -> None:
    model = make()
    not_a_model: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"quantize: model must be a Transformer, got Linear"):
        quantize(not_a_model)
    with pytest.raises(ValueError, match=r"quantize: dtype must be 'int8', got 'int4'"):
        quantize(model, "int4")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"evaluation mode \(model.eval\(\)\), got training"):
        quantize(make().train())
    with pytest.raises(ValueError, match=r"parameters must be float32, got bfloat16"):
        quantize(make().to(torch.bfloat16))
    hooked = make()
    hooked.decoder.layers[0].linear1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"a Linear has hooks, or a forward of its own"):
        quantize(hooked)
    copy = quantize(model)
    for name in ("train", "state_dict", "load_state_dict", "to", "forward", "parameters"):
        with pytest.raises(AttributeError, match=rf"{name} is for the model .* only generates"):
            getattr(copy, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'sing'"):
        copy.sing  # noqa: B018
    assert isinstance(model, Transformer)
