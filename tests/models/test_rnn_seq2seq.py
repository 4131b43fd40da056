"""Laws of the recurrent model in training: a naive reference, padding, losses, sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.models import DecoderOutputs, RNNSeq2Seq, RNNSeq2SeqConfig

from .test_transformer import close

COPY = {"target_vocab_size": 23, "extra_tokens": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"attention": "none", "reverse_source": True, "bidirectional": False},
    "cho": {"attention": "none", "cell": "gru", "context": "every_step", "bridge": "linear"},
    "additive": {"bridge": "mean", "num_decoder_layers": 1},
    "feeding": {"attention": "general", "input_feeding": True, "context": "every_step"},
    "location": {"attention": "location", "cell": "tanh", "coverage": True, "attention_heads": 2},
    "scaled_dot_heads": {"attention": "scaled_dot", "attention_heads": 4, "input_feeding": True},
    "monotonic": {"monotonic": True, "input_feeding": True},
    "tied": {"attention": "dot", "tie_embeddings": "all", "target_vocab_size": 23},
    "pointer_generator": {"output": "pointer_generator", "coverage": True, **COPY},
    "copynet": {"output": "copynet", "input_feeding": True, "attention": "dot", **COPY},
    "copynet_alone": {"output": "copynet", "attention": "none", **COPY},
    "pointer": {"output": "pointer", "attention": "none", "target_vocab_size": 3},
    "pointer_feeding": {"output": "pointer", "input_feeding": True, "target_vocab_size": 3},
}


def make(**changes: Any) -> RNNSeq2Seq:
    torch.manual_seed(7)
    fields: dict[str, Any] = {
        "source_vocab_size": 23,
        "target_vocab_size": 19,
        "embedding_size": 16,
        "hidden_size": 16,
        "attention_size": 12,
        "location_filters": 3,
        "location_width": 5,
        "max_length": 40,
        **changes,
    }
    model = RNNSeq2Seq(RNNSeq2SeqConfig(**fields)).eval()
    # At initialisation biases are 0, which hides mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> RNNSeq2Seq:
    return make(**VARIANTS[request.param])


def sources(model: RNNSeq2Seq, *lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Words, some of them of the extended vocabulary where there is one."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    size = max(config.source_vocab_size, config.source_vocab_size + config.extra_tokens)
    tokens = torch.randint(4, size, (len(lengths), max(lengths)), generator=generator)
    return tokens, torch.tensor(lengths)


def targets(model: RNNSeq2Seq, shape: tuple[int, ...], seed: int = 1, positions: int = 2) -> Tensor:
    """Words, or the first positions of a source."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if config.output == "pointer":
        return torch.randint(3, 3 + positions, shape, generator=generator)
    return torch.randint(3, config.extended_size, shape, generator=generator)


def gradients(model: RNNSeq2Seq) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# --- the numbers --------------------------------------------------------------------------------


def naive(model: RNNSeq2Seq, source: Tensor, target: Tensor) -> Tensor:
    """Logits of one sentence ``[S]``, ``[T]``: two bidirectional LSTM layers, additive attention.

    Only ``torch.nn`` cells and the equations.
    """
    weights = dict(model.named_parameters())

    def cell(prefix: str, suffix: str) -> nn.LSTMCell:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        found = {name: weights[f"{prefix}.{name}_{suffix}"] for name in names}
        module = nn.LSTMCell(found["weight_ih"].size(1), found["weight_hh"].size(1))
        for name, parameter in found.items():
            del module._parameters[name]
            setattr(module, name, parameter)
        return module

    def run(module: nn.LSTMCell, inputs: list[Tensor]) -> tuple[list[Tensor], Any]:
        state = None
        outputs = []
        for x in inputs:
            state = module(x, state)
            outputs.append(state[0])
        return outputs, state

    x = list(weights["source_embedding.weight"][source])
    begin = []
    for layer in range(2):
        forward, last = run(cell("encoder.recurrence", f"l{layer}"), x)
        backward, first = run(cell("encoder.recurrence", f"l{layer}_reverse"), x[::-1])
        x = [torch.cat(pair) for pair in zip(forward, backward[::-1], strict=True)]
        begin.append(tuple(torch.cat(pair) for pair in zip(last, first, strict=True)))
    memory = torch.stack(x)
    attention = "decoder.attention."
    keys = memory @ weights[attention + "key_projection.weight"].T
    states = begin
    logits = []
    for word in target:
        y = weights["target_embedding.weight"][word]
        for layer in range(2):
            states[layer] = cell("decoder.recurrence", f"l{layer}")(y, states[layer])
            y = states[layer][0]
        query = F.linear(
            y,
            weights[attention + "query_projection.weight"],
            weights[attention + "query_projection.bias"],
        )
        scores = (query + keys).tanh() @ weights[attention + "score_weight"][0]
        context = scores.softmax(0) @ memory
        mixed = torch.cat([context, y]) @ weights["decoder.combination.weight"].T
        logits.append(weights["output_projection.weight"] @ mixed.tanh())
    return torch.stack(logits)


def test_equals_a_naive_implementation() -> None:
    model = make().double()
    source, lengths = sources(model, 5, 2, 7)
    target = targets(model, (3, 6))
    probe = torch.randn(3, 6, 19, dtype=torch.float64)
    logits = model(source, target, lengths)
    (logits * probe).sum().backward()
    found = gradients(model)
    model.zero_grad()
    rows = [naive(model, source[i, :n], target[i]) for i, n in enumerate(lengths.tolist())]
    expected = torch.stack(rows)
    (expected * probe).sum().backward()
    close(logits, expected)
    assert len(found) == len(list(model.parameters()))
    for actual, wanted in zip(found, gradients(model), strict=True):
        close(actual, wanted)


def test_pointer_generator_mixes_as_its_paper_says() -> None:
    model = make(**VARIANTS["pointer_generator"])
    source, lengths = sources(model, 5, 3)
    target = targets(model, (2, 4))
    outputs = model.outputs(source, target, lengths)
    assert outputs.attention is not None
    assert outputs.gate is not None
    expected = torch.zeros(2, 4, 28)
    generates = outputs.gate.sigmoid()[:, :, None]
    expected[:, :, :23] = generates * model.project(outputs.hidden).softmax(-1)
    for b, s in (lengths[:, None] > torch.arange(5)).nonzero().tolist():
        copied = (1 - generates[b, :, 0]) * outputs.attention[b, :, s]
        expected[b, :, source[b, s]] += copied
    close(model(source, target, lengths).exp(), expected)
    close(expected.sum(-1), torch.ones(2, 4))


# --- padding ------------------------------------------------------------------------------------


def test_padding_changes_nothing(model: RNNSeq2Seq) -> None:
    source, lengths = sources(model, 5, 2, 7)
    target = targets(model, (3, 4))
    together = model(source, target, lengths)
    for i, S in enumerate(lengths.tolist()):
        alone = model(source[i : i + 1, :S], target[i : i + 1])[0]
        close(together[i].exp(), alone.exp())


def test_padding_gives_no_gradient(model: RNNSeq2Seq) -> None:
    source, lengths = sources(model, 2, 4)
    target = targets(model, (2, 3))
    rows = torch.tensor([0, 1, 3, 4, 5])

    def run(source: Tensor, target: Tensor) -> list[Tensor]:
        model.zero_grad()
        outputs = model.outputs(source, target, lengths)
        # The likelihood of a word that cannot be written has no gradient to compare.
        following = target.clamp(max=model.config.target_vocab_size - 1)
        if model.config.output == "pointer":
            following = target
        model.target_nll(outputs, source, following, lengths, rows).backward()
        return gradients(model)

    clean = run(source, target)
    other_source, other_target = source.clone(), target.clone()
    other_source[0, 2:], other_target[0, 2] = 11, 4
    for actual, expected in zip(run(other_source, other_target), clean, strict=True):
        close(actual, expected)


def test_a_source_of_length_0_is_nothing(model: RNNSeq2Seq) -> None:
    source, _ = sources(model, 4, 4)
    lengths = torch.tensor([0, 4])
    target = targets(model, (2, 3))
    model.train()
    outputs = model.outputs(source, target, lengths)
    assert all(part is None or not part.isnan().any() for part in outputs[:2])
    state = model._read(source, lengths).beginning.state
    assert not any(part[:, 0].any() for part in state)
    if outputs.attention is not None:
        assert not outputs.attention[0].any()
    following = torch.full((2, 3), 2)
    loss = model.target_nll(outputs, source, following, lengths, torch.arange(3))
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        assert not parameter.grad.isnan().any()
        if name.startswith(("encoder", "source_embedding")):
            assert not parameter.grad.any(), name


def test_reversed_sources() -> None:
    """Reading from the end is reading the reversed source; memory keeps the source's own order."""
    model, plain = make(reverse_source=True), make()
    source, lengths = sources(model, 5, 2, 7)
    target = targets(model, (3, 4))
    backwards = source.clone()
    for row, n in zip(backwards, lengths.tolist(), strict=True):
        row[:n] = row[:n].flip(0)
    found = model.outputs(source, target, lengths)
    expected = plain.outputs(backwards, target, lengths)
    close(found.hidden, expected.hidden)
    assert found.attention is not None
    assert expected.attention is not None
    for i, n in enumerate(lengths.tolist()):
        close(found.attention[i, :, :n], expected.attention[i, :, :n].flip(1))
        alone = model.outputs(source[i : i + 1, :n], target[i : i + 1])
        close(alone.hidden[0], expected.hidden[i])


# --- losses -------------------------------------------------------------------------------------


def test_target_nll_is_that_of_forward(model: RNNSeq2Seq) -> None:
    source, lengths = sources(model, 5, 2, 7)
    target, following = targets(model, (3, 4)), targets(model, (3, 4), seed=2)
    if model.config.copies and model.config.output != "pointer":
        following = source[:, :1].expand(-1, 4)  # what every source can write
    log_probabilities = model(source, target, lengths).log_softmax(-1)
    words = following[:, :, None]
    expected = -log_probabilities.gather(2, words)[:, :, 0].flatten()
    outputs = model.outputs(source, target, lengths)
    rows = torch.tensor([0, 3, 5, 11])
    close(model.target_nll(outputs, source, following, lengths), expected.sum())
    close(model.target_nll(outputs, source, following, lengths, rows), expected[rows].sum())


def test_label_smoothing() -> None:
    model = make()
    source, lengths = sources(model, 5, 2)
    target, following = targets(model, (2, 4)), targets(model, (2, 4), seed=2)
    outputs = model.outputs(source, target, lengths)
    loss = model.target_nll(outputs, source, following, lengths, label_smoothing=0.1)
    expected = F.cross_entropy(
        model(source, target, lengths).flatten(0, 1),
        following.flatten(),
        reduction="sum",
        label_smoothing=0.1,
    )
    close(loss, expected)
    with pytest.raises(ValueError, match="label_smoothing must be 0 with output 'copynet', got"):
        make(**VARIANTS["copynet"]).target_nll(
            outputs, source, following, lengths, label_smoothing=0.1
        )


# --- scheduled sampling ---------------------------------------------------------------------------


def test_sampling_reads_the_models_own_words(model: RNNSeq2Seq) -> None:
    source, lengths = sources(model, 5, 2, 7)
    target = targets(model, (3, 6))
    own = target.clone()
    for t in range(1, 6):  # what greedy decoding would read
        own[:, t] = model(source, own[:, :t], lengths)[:, -1].argmax(-1)
    assert (own != target).any()
    sampled = model.outputs(source, target, lengths, sampling_probability=1.0)
    plain = model.outputs(source, own, lengths)
    for actual, expected in zip(sampled, plain, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            close(
                actual.masked_fill(actual == -math.inf, 0),
                expected.masked_fill(expected == -math.inf, 0),
            )


def test_sampling_is_a_matter_of_chance() -> None:
    model = make()
    source, lengths = sources(model, *[4] * 64)
    target = targets(model, (64, 2))
    taught = model.outputs(source, target, lengths).hidden[:, 1]
    sampled = model.outputs(source, target, lengths, sampling_probability=0.25).hidden[:, 1]
    changed = int(((taught - sampled).abs().amax(-1) > 1e-4).sum())
    assert 6 <= changed <= 28  # 16 expected, standard deviation 3.5
    with pytest.raises(ValueError, match=r"sampling_probability must be in \[0, 1\], got 1.5"):
        model.outputs(source, target, lengths, sampling_probability=1.5)


def test_the_choice_of_a_word_has_no_gradient() -> None:
    model = make(input_feeding=True).train()
    source, lengths = sources(model, 5, 2)
    target = targets(model, (2, 4))
    outputs = model.outputs(source, target, lengths, sampling_probability=1.0)
    outputs.hidden.sum().backward()
    assert model.output_projection is not None
    assert all(p.grad is None for p in model.output_projection.parameters())


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", ["linear", "convolution"])
@pytest.mark.parametrize("reduction", [1, 3])
def test_features(front_end: str, reduction: int) -> None:
    model = make(source_features=4, front_end=front_end, time_reduction=reduction)
    frames, lengths = torch.randn(3, 8, 4), torch.tensor([8, 4, 1])
    poisoned = frames.clone()
    poisoned[1, 4:], poisoned[2, 1:] = torch.nan, torch.inf
    target = targets(model, (3, 4))
    outputs = model.outputs(poisoned, target, lengths)
    assert outputs.attention is not None
    assert outputs.attention.shape == (3, 4, math.ceil(8 / reduction))
    outputs.hidden.sum().backward()
    assert not any(gradient.isnan().any() for gradient in gradients(model))
    for i, S in enumerate(lengths.tolist()):
        alone = model.outputs(frames[i : i + 1, :S], target[i : i + 1])
        close(outputs.hidden[i], alone.hidden[0])
        assert alone.attention is not None
        assert alone.attention.size(2) == math.ceil(S / reduction)
        assert not outputs.attention[i, :, alone.attention.size(2) :].any()


def test_convolutions_are_those_of_torch() -> None:
    model = make(source_features=4, front_end="convolution", time_reduction=2)
    front = model.front_end
    assert front is not None
    assert front.refinement is not None
    frames = torch.randn(2, 7, 4)
    first, second = front.projection, front.refinement
    x = F.conv1d(frames.mT, first.weight.view(16, 4, 5), first.bias, stride=2, padding=2).relu()
    x = F.conv1d(x, second.weight.view(16, 16, 3), second.bias, padding=1).relu()
    found, _ = front(frames, None)
    close(found, x.mT)


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["xavier", "he", "uniform"])
def test_initialization(scheme: str) -> None:
    torch.manual_seed(0)
    config = RNNSeq2SeqConfig(
        source_vocab_size=50,
        target_vocab_size=50,
        embedding_size=40,
        hidden_size=64,
        initialization=scheme,  # type: ignore[arg-type]
    )
    model = RNNSeq2Seq(config)
    recurrence = model.decoder.recurrence
    weight: Any = recurrence.weight_ih_l0
    assert model.target_embedding.weight[0].eq(0).all()
    assert model.decoder.combination is not None
    combination = model.decoder.combination.weight
    if scheme == "uniform":
        for name, parameter in model.named_parameters():
            assert name.endswith("score_weight") or parameter.abs().max() <= 0.08
        assert weight.abs().max() > 0.079
        return
    bound = math.sqrt(6 / (40 + 64)) if scheme == "xavier" else math.sqrt(6 / 40)
    assert 0.98 * bound < weight.abs().max() <= bound
    bound = math.sqrt(6 / (128 + 64)) if scheme == "xavier" else math.sqrt(6 / 128)
    assert 0.98 * bound < combination.abs().max() <= bound
    for gate in recurrence.weight_hh_l1.chunk(4):  # type: ignore[union-attr, operator]
        torch.testing.assert_close(gate @ gate.T, torch.eye(64), atol=1e-5, rtol=0)
    total: Any = recurrence.bias_ih_l0 + recurrence.bias_hh_l0  # type: ignore[operator]
    assert torch.equal(total, torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(64))


def test_state_dict(model: RNNSeq2Seq) -> None:
    other = RNNSeq2Seq(RNNSeq2SeqConfig.from_dict(model.config.to_dict())).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    source, lengths = sources(model, 5, 2)
    target = targets(model, (2, 4))
    assert torch.equal(other(source, target, lengths), model(source, target, lengths))


def test_tied_embeddings() -> None:
    model = make(tie_embeddings="all", target_vocab_size=23)
    assert model.source_embedding is None
    assert model.output_projection is None
    assert make(tie_embeddings="output").output_projection is None
    source, lengths = sources(model, 5, 2)
    model.project(model.decode(source, targets(model, (2, 4)), lengths)).sum().backward()
    assert model.target_embedding.weight.grad is not None


def test_dropout_is_of_training_alone(model: RNNSeq2Seq) -> None:
    source, lengths = sources(model, 5, 2)
    target = targets(model, (2, 4))
    assert torch.equal(model(source, target, lengths), model(source, target, lengths))
    model.train()
    assert not torch.equal(model(source, target, lengths), model(source, target, lengths))


def test_bf16_autocast() -> None:
    model = make(input_feeding=True)
    source, lengths = sources(model, 5, 2)
    target = targets(model, (2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        outputs: DecoderOutputs = model.outputs(source, target, lengths)
        loss = model.target_nll(outputs, source, target, lengths)
    loss.backward()
    expected = model.target_nll(model.outputs(source, target, lengths), source, target, lengths)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


# --- errors ---------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = make(max_length=6)
    source, target = torch.full((2, 4), 5), torch.full((2, 3), 5)
    with pytest.raises(ValueError, match=r"source must have shape \[B, S\], got \[2, 4, 1\]"):
        model(source[:, :, None], target)
    with pytest.raises(ValueError, match=r"source must have at most 6 positions .* got 7"):
        model(torch.full((2, 7), 5), target)
    with pytest.raises(ValueError, match=r"target must have shape \[B, T\] with B = 2"):
        model(source, target[:1])
    with pytest.raises(ValueError, match=r"target must have at most 6 positions .* got 7"):
        model(source, torch.full((2, 7), 5))
    frames = make(source_features=4)
    with pytest.raises(ValueError, match=r"shape \[B, S, F\] with F = 4 .* got \[2, 4, 3\]"):
        frames(torch.zeros(2, 4, 3), target)
