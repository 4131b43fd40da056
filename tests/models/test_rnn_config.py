"""The recurrent model's configuration: defaults, JSON round trip, presets, refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from fused_attn.generation import beam_search
from fused_attn.models import RNN_PRESETS, RNNSeq2Seq, RNNSeq2SeqConfig


def test_json_round_trip() -> None:
    config = RNNSeq2SeqConfig(
        source_vocab_size=100,
        target_vocab_size=100,
        cell="gru",
        attention="location",
        coverage=True,
        output="pointer_generator",
        extra_tokens=7,
        dropout=0.5,
    )
    assert RNNSeq2SeqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3  # type: ignore[misc]


def test_extended_size() -> None:
    words = {"source_vocab_size": 100, "target_vocab_size": 100}
    assert RNNSeq2SeqConfig(**words).extended_size == 100
    copying = RNNSeq2SeqConfig(**words, output="copynet", extra_tokens=7)
    assert copying.extended_size == 107
    pointing = RNNSeq2SeqConfig(
        source_vocab_size=9, target_vocab_size=3, output="pointer", max_length=20
    )
    assert pointing.extended_size == 23


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ({"num_encoder_layers": 2.0}, TypeError, "num_encoder_layers must be an int, got 2.0"),
    ({"max_length": True}, TypeError, "max_length must be an int, got True"),
    ({"eos_token": -1}, ValueError, "eos_token must be at least 0, got -1"),
    ({"coverage": 1}, TypeError, "coverage must be a bool, got 1"),
    ({"dropout": "0"}, TypeError, "dropout must be a number, got '0'"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"cell": "sru"}, ValueError, "cell must be one of lstm, gru, tanh, got 'sru'"),
    ({"front_end": "vgg"}, ValueError, "front_end must be one of linear, convolution"),
    ({"bridge": "none"}, ValueError, "bridge must be one of last, mean, linear"),
    ({"context": "never"}, ValueError, "context must be one of initial, every_step"),
    ({"attention": "mlp"}, ValueError, "attention must be one of none, additive, dot, general"),
    ({"output": "copy"}, ValueError, "output must be one of generate, pointer_generator, copynet"),
    ({"tie_embeddings": "both"}, ValueError, "tie_embeddings must be one of none, output, all"),
    ({"initialization": "zero"}, ValueError, "initialization must be one of xavier, he, uniform"),
    ({"hidden_size": 7}, ValueError, "hidden_size must be even with a bidirectional encoder"),
    ({"num_decoder_layers": 3}, ValueError, "num_decoder_layers must equal num_encoder_layers = 2"),
    ({"source_vocab_size": 0}, ValueError, "source_vocab_size must be at least 1 without"),
    ({"time_reduction": 2}, ValueError, "time_reduction must be 1 without source_features, got 2"),
    (
        {"source_features": 4, "tie_embeddings": "all"},
        ValueError,
        "tie_embeddings must be none or output with source_features, got 'all'",
    ),
    (
        {"source_features": 4, "output": "copynet"},
        ValueError,
        "output must be generate or pointer with source_features, got 'copynet'",
    ),
    ({"tie_embeddings": "all"}, ValueError, "target_vocab_size must equal source_vocab_size = 100"),
    (
        {"tie_embeddings": "output", "embedding_size": 64},
        ValueError,
        "embedding_size must equal hidden_size = 512 with tied embeddings, got 64",
    ),
    (
        {"attention": "none", "input_feeding": True},
        ValueError,
        "input_feeding must be False with attention 'none', got True",
    ),
    (
        {"attention": "none", "monotonic": True},
        ValueError,
        "monotonic must be False with attention 'none', got True",
    ),
    (
        {"attention": "dot", "coverage": True},
        ValueError,
        "attention must be one of additive, location with coverage, got 'dot'",
    ),
    ({"location_width": 4}, ValueError, "location_width must be odd, got 4"),
    (
        {"attention_heads": 3},
        ValueError,
        "hidden_size must be a multiple of attention_heads = 3, got 512",
    ),
    (
        {"attention_heads": 4, "attention_size": 6},
        ValueError,
        "attention_size must be a multiple of attention_heads = 4, got 6",
    ),
    (
        {"output": "pointer_generator"},
        ValueError,
        "target_vocab_size must equal source_vocab_size = 100 with output 'pointer_generator'",
    ),
    (
        {"output": "pointer_generator", "target_vocab_size": 100, "attention": "none"},
        ValueError,
        "attention must not be none with output 'pointer_generator'",
    ),
    ({"extra_tokens": 5}, ValueError, "extra_tokens must be 0 with output 'generate', got 5"),
    ({"output": "pointer"}, ValueError, "target_vocab_size must be 3 with output 'pointer'"),
    (
        {
            "output": "pointer",
            "target_vocab_size": 3,
            "tie_embeddings": "output",
        },
        ValueError,
        "tie_embeddings must be none with output 'pointer', got 'output'",
    ),
    ({"eos_token": 90}, ValueError, r"eos_token must be in 0..89 \(the target vocabulary\)"),
    (
        {
            "output": "copynet",
            "source_vocab_size": 90,
            "extra_tokens": 4,
            "unknown_token": 90,
        },
        ValueError,
        r"unknown_token must be in 0..89 \(the target vocabulary\), got 90",
    ),
    ({"source_vocab_size": 3, "pad_token": 5}, ValueError, "pad_token must be in 0..2"),
    ({"pad_token": 2}, ValueError, "pad_token must differ from eos_token, got 2 for both"),
]


@pytest.mark.parametrize(("changes", "error", "match"), REFUSALS)
def test_refusals(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    fields = {"source_vocab_size": 100, "target_vocab_size": 90, **changes}
    with pytest.raises(error, match="RNNSeq2SeqConfig: .*" + match):
        RNNSeq2SeqConfig(**fields)


def test_from_dict_and_preset_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="fields must be known, got hiden_size, width"):
        RNNSeq2SeqConfig.from_dict({"hiden_size": 4, "width": 4})
    with pytest.raises(ValueError, match="fields must include target_vocab_size"):
        RNNSeq2SeqConfig.from_dict({"source_vocab_size": 4})
    with pytest.raises(ValueError, match=r"preset must be one of sutskever2014, .* got 'vaswani'"):
        RNNSeq2SeqConfig.preset("vaswani")


# --- models of the literature --------------------------------------------------------------------


@pytest.mark.parametrize("name", RNN_PRESETS)
def test_a_preset_trains_and_decodes(name: str) -> None:
    torch.manual_seed(3)
    small = {"hidden_size": 16, "embedding_size": 12, "max_length": 40}
    words = {"source_vocab_size": 20, "target_vocab_size": 20}
    points = name == "vinyals2015"
    config = RNNSeq2SeqConfig.preset(name, **small, **({} if points else words))
    full = RNNSeq2SeqConfig.preset(name, **({} if points else words))
    assert full.hidden_size == RNN_PRESETS[name]["hidden_size"]
    model = RNNSeq2Seq(config)
    B, S, T = 8, 6, 5
    lengths = torch.randint(2, S + 1, (B,))
    source = torch.rand(B, S, 2) if points else torch.randint(4, 20, (B, S))
    copied = torch.randint(3, 5, (B, T)) if points else torch.randint(4, 20, (B, T))
    target = torch.cat([torch.ones(B, 1, dtype=torch.int64), copied], dim=1)
    following = torch.cat([copied, torch.full((B, 1), 2)], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        outputs = model.outputs(source, target, lengths)
        loss = model.target_nll(outputs, source, following, lengths)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    model.eval()
    found = beam_search(model, source, lengths, beam_size=3, max_length=7)
    assert len(found) == B
    assert all(row[0].log_probability > -torch.inf for row in found)
