"""What a model is made of, as plain data that survives a round trip through JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "glu", "reglu", "geglu", "swiglu"]
Norm = Literal["layer_norm", "rms_norm", "power_norm", "batch_norm"]
Positions = Literal["sinusoidal", "learned"]
TiedEmbeddings = Literal["none", "output", "all"]

_NAME = "TransformerConfig"


class ModelConfig:
    """What the configurations of all models, frozen dataclasses, share."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return dataclasses.asdict(cast(Any, self))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: A field is unknown or missing, or has a wrong value.
            TypeError: A field is of a wrong type.
        """
        known = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: fields must be known, got {', '.join(unknown)}")
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in fields
        ]
        if missing:
            raise ValueError(f"{cls.__name__}: fields must include {', '.join(missing)}, got none")
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """The shape of an encoder-decoder Transformer; the defaults are Transformer-base's.

    Raises:
        TypeError: A field is of a wrong type.
        ValueError: A field is out of range or contradicts another.

    Reference: Vaswani et al., 2017. https://arxiv.org/abs/1706.03762
    """

    source_vocab_size: int
    target_vocab_size: int
    d_model: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    """Of embeddings, of each sublayer's output and inside the feed-forward network."""
    attention_dropout: float = 0.0
    """Of the attention weights."""
    activation: Activation = "relu"
    """The last four are gated: they double the first linear layer's outputs."""
    norm: Norm = "layer_norm"
    norm_first: bool = False
    """Normalise each sublayer's input (and the stacks' outputs) instead of its sum."""
    positions: Positions = "sinusoidal"
    max_length: int = 1024
    """Most tokens in a source or target, ``bos`` and ``eos`` included."""
    tie_embeddings: TiedEmbeddings = "none"
    """``output``: the target embedding is the output projection; ``all``: the source embedding
    is too."""
    layer_norm_eps: float = 1e-5
    pad_token: int = 0
    bos_token: int = 1
    eos_token: int = 2

    def __post_init__(self) -> None:
        for name in (
            "source_vocab_size",
            "target_vocab_size",
            "d_model",
            "num_heads",
            "num_encoder_layers",
            "num_decoder_layers",
            "dim_feedforward",
            "max_length",
        ):
            self._check_integer(name)
            if getattr(self, name) < 1:
                raise ValueError(f"{_NAME}: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            self._check_number(name)
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{_NAME}: {name} must be in [0, 1), got {getattr(self, name)}")
        self._check_number("layer_norm_eps")
        if not self.layer_norm_eps > 0.0:
            raise ValueError(f"{_NAME}: layer_norm_eps must be positive, got {self.layer_norm_eps}")
        if not isinstance(self.norm_first, bool):
            raise TypeError(f"{_NAME}: norm_first must be a bool, got {self.norm_first!r}")
        for name, choices in (
            ("activation", get_args(Activation)),
            ("norm", get_args(Norm)),
            ("positions", get_args(Positions)),
            ("tie_embeddings", get_args(TiedEmbeddings)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{_NAME}: {name} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.d_model % self.num_heads != 0:
            raise ValueError(
                f"{_NAME}: d_model must be a multiple of num_heads = {self.num_heads}, got "
                f"{self.d_model}"
            )
        if self.positions == "sinusoidal" and self.d_model % 2 != 0:
            raise ValueError(
                f"{_NAME}: d_model must be even with sinusoidal positions, got {self.d_model}"
            )
        if self.tie_embeddings == "all" and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"{_NAME}: target_vocab_size must equal source_vocab_size = "
                f"{self.source_vocab_size} with tie_embeddings 'all', got "
                f"{self.target_vocab_size}"
            )
        for name in ("pad_token", "bos_token", "eos_token"):
            self._check_integer(name)
            token = getattr(self, name)
            if not 0 <= token < self.target_vocab_size:
                raise ValueError(
                    f"{_NAME}: {name} must be in 0..{self.target_vocab_size - 1} (the target "
                    f"vocabulary), got {token}"
                )
        if self.pad_token >= self.source_vocab_size:
            raise ValueError(
                f"{_NAME}: pad_token must be in 0..{self.source_vocab_size - 1} (the source "
                f"vocabulary), got {self.pad_token}"
            )
        if self.pad_token == self.eos_token:
            raise ValueError(
                f"{_NAME}: pad_token must differ from eos_token, got {self.pad_token} for both"
            )

    def _check_integer(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{_NAME}: {name} must be an int, got {value!r}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{_NAME}: {name} must be a number, got {value!r}")
