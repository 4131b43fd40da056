"""The model configuration: defaults, JSON round trip, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fused_attn.models import TransformerConfig


def test_defaults_are_transformer_base() -> None:
    config = TransformerConfig(source_vocab_size=100, target_vocab_size=90)
    assert (config.d_model, config.num_heads, config.dim_feedforward) == (512, 8, 2048)
    assert (config.num_encoder_layers, config.num_decoder_layers) == (6, 6)


def test_json_round_trip() -> None:
    config = TransformerConfig(
        source_vocab_size=100,
        target_vocab_size=100,
        d_model=64,
        norm="rms_norm",
        norm_first=True,
        positions="learned",
        tie_embeddings="all",
        attention_dropout=0.2,
    )
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_frozen() -> None:
    config = TransformerConfig(source_vocab_size=100, target_vocab_size=90)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"d_model": 0}, ValueError, "d_model must be at least 1, got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
        ({"max_length": True}, TypeError, "max_length must be an int, got True"),
        ({"d_model": 36}, ValueError, "d_model must be a multiple of num_heads = 8, got 36"),
        ({"d_model": 7, "num_heads": 1}, ValueError, "d_model must be even"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": "0"}, TypeError, "attention_dropout must be a number, got '0'"),
        ({"layer_norm_eps": 0.0}, ValueError, "layer_norm_eps must be positive, got 0.0"),
        ({"norm_first": 1}, TypeError, "norm_first must be a bool, got 1"),
        ({"activation": "tanh"}, ValueError, "activation must be one of relu, gelu, gelu_tanh"),
        (
            {"norm": "group_norm"},
            ValueError,
            "norm must be one of layer_norm, rms_norm, power_norm",
        ),
        ({"positions": "rotary"}, ValueError, "positions must be one of sinusoidal, learned"),
        ({"tie_embeddings": "both"}, ValueError, "tie_embeddings must be one of none, output"),
        ({"tie_embeddings": "all"}, ValueError, "target_vocab_size must equal source_vocab_size"),
        ({"eos_token": 90}, ValueError, r"eos_token must be in 0..89 \(the target vocabulary\)"),
        ({"source_vocab_size": 3, "pad_token": 5}, ValueError, "pad_token must be in 0..2"),
        ({"pad_token": 2}, ValueError, "pad_token must differ from eos_token, got 2 for both"),
    ],
)
def test_refusals(changes: dict[str, object], error: type[Exception], match: str) -> None:
    fields = {"source_vocab_size": 100, "target_vocab_size": 90, **changes}
    with pytest.raises(error, match="TransformerConfig: .*" + match):
        TransformerConfig(**fields)  # type: ignore[arg-type]


def test_from_dict_refuses_unknown_and_missing_fields() -> None:
    with pytest.raises(ValueError, match="fields must be known, got d_modle, width"):
        TransformerConfig.from_dict({"d_modle": 4, "width": 4})
    with pytest.raises(ValueError, match="fields must include target_vocab_size"):
        TransformerConfig.from_dict({"source_vocab_size": 4})
