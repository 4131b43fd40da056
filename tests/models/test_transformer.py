"""Laws of the Transformer model: padding, ties, incremental decoding, compilation."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.generation import beam_search, greedy_search
from fused_attn.models import Transformer, TransformerConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "post_norm": {},
    "pre_norm": {"norm_first": True, "activation": "gelu"},
    "learned_positions": {"positions": "learned", "tie_embeddings": "output"},
    "all_tied": {"tie_embeddings": "all", "target_vocab_size": 23},
    "rms_norm_swiglu": {"norm": "rms_norm", "norm_first": True, "activation": "swiglu"},
    "power_norm": {"norm": "power_norm"},
    "batch_norm": {"norm": "batch_norm", "norm_first": True},
}


def make(max_length: int = 80, **changes: Any) -> Transformer:
    torch.manual_seed(7)
    fields = {
        "source_vocab_size": 23,
        "target_vocab_size": 19,
        "d_model": 32,
        "num_heads": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 3,
        "dim_feedforward": 48,
        "max_length": max_length,
        **changes,
    }
    config = TransformerConfig(**fields)
    model = Transformer(config).eval()
    # At initialisation biases are 0 and norms are trivial, which hides mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if config.norm in ("power_norm", "batch_norm"):  # statistics that fit the parameters
            model.train()
            for _ in range(30):
                model(torch.randint(3, 19, (16, 9)), torch.randint(3, 19, (16, 9)))
    return model.eval()


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make(**VARIANTS[request.param])


def sources(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 19, (len(lengths), max(lengths)), generator=generator)
    return tokens, torch.tensor(lengths)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to a reordering of sums: 64 roundings at the scale of the largest value."""
    eps = torch.finfo(expected.dtype).eps
    error = (actual - expected).abs().max().item()
    assert error <= 64 * eps * max(1.0, expected.abs().max().item())


def test_shapes_and_split(model: Transformer) -> None:
    source, lengths = sources(5, 2, 7)
    target, target_lengths = sources(4, 6, 1, seed=1)
    logits = model(source, target, lengths, target_lengths)
    V = model.config.target_vocab_size
    assert logits.shape == (3, 6, V)
    hidden = model.decode(source, target, lengths, target_lengths)
    assert hidden.shape == (3, 6, 32)
    is_token = torch.arange(6) < target_lengths[:, None]
    close(model.project(hidden[is_token]), logits[is_token])


def test_padding_changes_nothing(model: Transformer) -> None:
    source, lengths = sources(5, 2, 7)
    target, target_lengths = sources(4, 6, 1, seed=1)
    logits = model(source, target, lengths, target_lengths)
    without_target_lengths = model(source, target, lengths)
    for i, (S, T) in enumerate(zip(lengths.tolist(), target_lengths.tolist(), strict=True)):
        alone = model(source[i : i + 1, :S], target[i : i + 1, :T])[0]
        close(logits[i, :T], alone)
        close(without_target_lengths[i, :T], alone)


def test_padding_gives_no_gradient(model: Transformer) -> None:
    source, lengths = sources(2, 4)
    target, target_lengths = sources(3, 2, seed=1)
    is_token = torch.arange(3) < target_lengths[:, None]

    def gradients(source: Tensor, target: Tensor) -> list[Tensor]:
        model.zero_grad()
        hidden = model.decode(source, target, lengths, target_lengths)
        model.project(hidden[is_token]).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    clean = gradients(source, target)
    other_source, other_target = source.clone(), target.clone()
    other_source[0, 2:], other_target[1, 2:] = 11, 12
    assert len(clean) == len(list(model.parameters()))
    for actual, expected in zip(gradients(other_source, other_target), clean, strict=True):
        assert torch.equal(actual, expected)


def test_the_future_is_not_seen(model: Transformer) -> None:
    source, lengths = sources(5, 3)
    target, _ = sources(6, 6, seed=1)
    changed = target.clone()
    changed[:, 4:] = 3
    close(model(source, changed, lengths)[:, :4], model(source, target, lengths)[:, :4])


def test_steps_equal_the_full_forward(model: Transformer) -> None:
    # Beyond the cache's first capacity, with beams that change places and a source that leaves.
    source, lengths = sources(1, 6, 4)
    B, K, T = 3, 2, 70
    generator = torch.Generator().manual_seed(5)
    state = model.start(source, lengths, K)
    targets = torch.zeros(B, K, 0, dtype=torch.int64)
    for t in range(T):
        tokens = torch.randint(0, 19, (len(targets), K), generator=generator)
        logits, state = model.step(tokens, state)
        targets = torch.cat([targets, tokens[:, :, None]], dim=2)
        if t % 9 == 0 or t == T - 1:
            for k in range(K):
                close(logits[:, k], model(source, targets[:, k], lengths)[:, -1])
        sentences = None
        if t == 40:
            sentences = torch.tensor([0, 2])
            source, lengths, targets = source[sentences], lengths[sentences], targets[sentences]
        parents = torch.randint(0, K, (len(targets), K), generator=generator)
        targets = targets.gather(1, parents[:, :, None].expand(-1, -1, t + 1))
        state = model.reorder(state, parents, sentences)


def test_one_set_of_source_keys_for_all_beams() -> None:
    model = make()
    source, lengths = sources(5, 3)
    state = model.start(source, lengths, 6)
    assert [keys.shape for keys in state.memory_keys] == [(2, 4, 5, 8)] * 3
    assert [values.shape for values in state.memory_values] == [(2, 4, 5, 8)] * 3


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_translation_does_not_depend_on_the_batch(model: Transformer, search: str) -> None:
    source, lengths = sources(1, 6, 4, 9, 2, 3, 7, 5)

    def decode(rows: list[int], width: int) -> list[Any]:
        texts = torch.nn.functional.pad(source, (0, 20), value=5)[rows, :width]
        if search == "greedy":
            return [[best] for best in greedy_search(model, texts, lengths[rows])]
        return beam_search(model, texts, lengths[rows], beam_size=4, num_hypotheses=2)

    together = decode(list(range(8)), 9)
    assert {len(hypotheses[0].tokens) for hypotheses in together} != {0}
    for rows, width in (([3, 0, 7, 5], 13), *(([row], int(lengths[row])) for row in range(8))):
        for row, hypotheses in zip(rows, decode(list(rows), width), strict=True):
            assert len(hypotheses) == len(together[row])
            for actual, expected in zip(hypotheses, together[row], strict=True):
                assert (actual.tokens, actual.complete) == (expected.tokens, expected.complete)
                assert actual.score == pytest.approx(expected.score, rel=1e-4)


def test_scores_are_those_of_the_full_forward(model: Transformer) -> None:
    source, lengths = sources(1, 6, 4)
    bos, eos = model.bos_token, model.eos_token
    found = beam_search(model, source, lengths, beam_size=3, length_penalty=0.5, num_hypotheses=3)
    for i, hypothesis in itertools.chain.from_iterable(
        ((i, hypothesis) for hypothesis in hypotheses) for i, hypotheses in enumerate(found)
    ):
        text = [bos, *hypothesis.tokens] + [eos] * hypothesis.complete
        S = int(lengths[i])
        logits = model(source[i : i + 1, :S], torch.tensor([text[:-1]]))
        chosen = torch.tensor(text[1:])[:, None]
        total = logits[0].log_softmax(-1).gather(1, chosen).sum().item()
        assert hypothesis.log_probability == pytest.approx(total, rel=1e-4)
        assert hypothesis.score == pytest.approx(total / len(chosen) ** 0.5, rel=1e-4)


def test_one_beam_equals_greedy(model: Transformer) -> None:
    source, lengths = sources(1, 6, 4, 8)
    beams = beam_search(model, source, lengths, beam_size=1)
    for (one,), best in zip(beams, greedy_search(model, source, lengths), strict=True):
        assert one.tokens == best.tokens
        assert one.score == pytest.approx(best.score, rel=1e-5)


def test_cross_attention_weights(model: Transformer) -> None:
    source, lengths = sources(5, 1, 7)
    target, _ = sources(4, 4, 4, seed=1)
    for layer in (-1, 0, 1):
        weights = model.cross_attention_weights(source, target, lengths, layer=layer)
        assert weights.shape == (3, 4, 7)
        close(weights.sum(-1), torch.ones(3, 4))
        assert (weights[torch.arange(7).expand(3, 4, 7) >= lengths[:, None, None]] == 0).all()


@pytest.mark.parametrize("variant", ["post_norm", "pre_norm", "learned_positions", "all_tied"])
def test_cross_attention_weights_are_those_of_torch(variant: str) -> None:
    model = make(**VARIANTS[variant])
    source, lengths = sources(5, 1, 7)
    target, _ = sources(4, 4, 4, seed=1)
    config = model.config
    memory = model.encode(source, lengths)
    behind = torch.arange(7) >= lengths[:, None]
    future = torch.ones(4, 4, dtype=torch.bool).triu(1)
    x = model.target_embedding(target) * 32**0.5 + model.target_positions(0, 4)
    for index, layer in enumerate(model.decoder.layers):
        peer = torch.nn.TransformerDecoderLayer(
            32,
            4,
            48,
            activation=config.activation,
            batch_first=True,
            norm_first=config.norm_first,
        ).eval()
        peer.load_state_dict(layer.state_dict())
        y = peer.norm1(x) if config.norm_first else x
        y = x + peer.self_attn(y, y, y, attn_mask=future, need_weights=False)[0]
        y = peer.norm2(y) if config.norm_first else peer.norm1(y)
        _, expected = peer.multihead_attn(y, memory, memory, key_padding_mask=behind)
        close(model.cross_attention_weights(source, target, lengths, layer=index), expected)
        x = peer(x, memory, tgt_mask=future, memory_key_padding_mask=behind)
    x = x if model.decoder.norm is None else model.decoder.norm(x)
    close(model.decode(source, target, lengths), x)


def test_learns() -> None:
    # Copying short sequences: a few steps must bring the loss well below chance.
    model = make(d_model=32, num_encoder_layers=1, num_decoder_layers=1, dropout=0.0).train()
    model.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        text = torch.randint(3, 9, (32, 4), generator=generator)
        target = torch.cat([torch.ones(32, 1, dtype=torch.int64), text], dim=1)
        logits = model(text, target[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # ln 6 = 1.79 is chance
    assert model(text, target[:, :-1]).isfinite().all()


def test_embedding_scale() -> None:
    model = Transformer(
        TransformerConfig(
            source_vocab_size=500,
            target_vocab_size=500,
            d_model=256,
            num_encoder_layers=1,
            num_decoder_layers=1,
            dropout=0.0,
        )
    )
    tokens = torch.arange(3, 500)
    weight = model.target_embedding.weight
    scaled = torch.nn.functional.embedding(tokens, weight) * 16.0
    assert scaled.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.output_weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert (weight[0] == 0).all()


def test_ties_share_parameters() -> None:
    sizes = {
        tie: sum(
            parameter.numel()
            for parameter in make(tie_embeddings=tie, target_vocab_size=23).parameters()
        )
        for tie in ("none", "output", "all")
    }
    assert sizes["none"] - sizes["output"] == 23 * 32
    assert sizes["output"] - sizes["all"] == 23 * 32
    model = make(tie_embeddings="all", target_vocab_size=23)
    assert model.output_weight is model.target_embedding.weight
    source, lengths = sources(5, 3)
    before = model.encode(source, lengths)
    with torch.no_grad():
        model.output_weight.mul_(2.0)
    assert (model.encode(source, lengths) - before).abs().max() > 0.01
    # One matrix is one entry, as file formats without sharing need it.
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_state_dict_round_trip(model: Transformer) -> None:
    other = make(**{**model.config.to_dict()})
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    source, lengths = sources(5, 3)
    target, _ = sources(4, 4, seed=1)
    assert torch.equal(other(source, target, lengths), model(source, target, lengths))
    assert torch.equal(
        copy.deepcopy(model)(source, target, lengths), model(source, target, lengths)
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_compiles(norm_first: bool) -> None:
    model = make(norm_first=norm_first, num_encoder_layers=1, num_decoder_layers=1)
    source, lengths = sources(5, 3)
    target, target_lengths = sources(4, 6, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(source, target, lengths, target_lengths)
    actual = compiled(source, target, lengths, target_lengths)
    is_token = torch.arange(6) < target_lengths[:, None]
    close(actual[is_token], expected[is_token])


def test_half_precision_generation() -> None:
    model = make().to(torch.bfloat16)
    source, lengths = sources(5, 3)
    found = beam_search(model, source, lengths, beam_size=2, max_length=40)
    assert all(hypotheses[0].score < 0 for hypotheses in found)


def test_initial_layers_differ() -> None:
    model = make()
    model.reset_parameters()
    first, second = model.encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert (first.linear1.bias == 0).all()
    assert (first.self_attn.in_proj_bias == 0).all()


def test_refusals() -> None:
    model = make(max_length=6)
    short, long = torch.full((2, 3), 5), torch.full((2, 7), 5)
    with pytest.raises(ValueError, match=r"Transformer: source must have at most 6 tokens .*got 7"):
        model(long, short)
    with pytest.raises(ValueError, match=r"Transformer: target must have at most 6 tokens .*got 7"):
        model(short, long)
    with pytest.raises(ValueError, match=r"target must have shape \[B, T\] with B = 2 .*\[1, 3\]"):
        model(short, short[:1])
    with pytest.raises(ValueError, match=r"source must have shape \[B, S\], got \[3\]"):
        model(short[0], short)
    with pytest.raises(ValueError, match=r"layer must be in -3..2, got 3"):
        model.cross_attention_weights(short, short, layer=3)
    state = model.start(short, torch.tensor([3, 3]), 1)
    for _ in range(6):
        _, state = model.step(short[:, :1], state)
    with pytest.raises(ValueError, match=r"target must have at most 6 tokens .*got 7"):
        model.step(short[:, :1], state)
    with pytest.raises(RuntimeError, match=r"evaluation mode \(model.eval\(\)\), got training"):
        greedy_search(model.train(), short)
