"""What a recurrent sequence-to-sequence model is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .config import ModelConfig, TiedEmbeddings
from .rnn_presets import RNN_PRESETS

Cell = Literal["lstm", "gru", "tanh"]
FrontEnd = Literal["linear", "convolution"]
Bridge = Literal["last", "mean", "linear"]
Context = Literal["initial", "every_step"]
Attention = Literal["none", "additive", "dot", "general", "scaled_dot", "location"]
Output = Literal["generate", "pointer_generator", "copynet", "pointer"]
Initialization = Literal["xavier", "he", "uniform"]

_NAME = "RNNSeq2SeqConfig"

POINTER_VOCABULARY = 3
"""Tokens of a pointer network that are no positions: padding, beginning and end."""

_ADDITIVE = ("additive", "location")
_COPIES_WORDS = ("pointer_generator", "copynet")


@dataclass(frozen=True, kw_only=True)
class RNNSeq2SeqConfig(ModelConfig):
    """The shape of a recurrent encoder-decoder.

    A copying model's vocabulary is extended by ``extra_tokens``: token ids from
    ``target_vocab_size`` on are words that only the source at hand has, in sources and targets
    alike. A pointer network's vocabulary is ``pad``, ``bos`` and ``eos``; its token 3 + s is
    position s of the source.

    Raises:
        TypeError: A field is of a wrong type.
        ValueError: A field is out of range or contradicts another.
    """

    source_vocab_size: int = 0
    """0 where the source is of features."""
    target_vocab_size: int
    source_features: int = 0
    """F > 0: sources are frames ``[B, S, F]``, floating point, and no tokens."""
    front_end: FrontEnd = "linear"
    """Between frames and the encoder: one linear map of each ``time_reduction`` frames, or two
    convolutions over time, rectified."""
    time_reduction: int = 1
    """r: the encoder sees ``ceil(S / r)`` positions."""
    cell: Cell = "lstm"
    embedding_size: int = 512
    hidden_size: int = 512
    """Of the decoder and of the encoder's output: a bidirectional encoder has half of it in each
    direction."""
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    bidirectional: bool = True
    reverse_source: bool = False
    """Read each source from its end. Memory and alignments keep the source's own order."""
    dropout: float = 0.2
    """Of embeddings, between layers, and of what is projected onto the vocabulary."""
    bridge: Bridge = "last"
    """How the decoder begins: with the encoder's last states, layer by layer; with a learned map
    of its mean output; or with a learned map of its top layer's last state."""
    context: Context = "initial"
    """``every_step``: what the bridge begins with is also part of the decoder's every input."""
    attention: Attention = "additive"
    attention_size: int = 0
    """Width of additive attention; 0: ``hidden_size``."""
    attention_heads: int = 1
    location_filters: int = 10
    location_width: int = 31
    coverage: bool = False
    """The sum of earlier weights is part of the attention's scores."""
    monotonic: bool = False
    input_feeding: bool = False
    """The attentional state of a step is part of the next step's input."""
    output: Output = "generate"
    extra_tokens: int = 0
    tie_embeddings: TiedEmbeddings = "none"
    """``output``: the target embedding is the output projection; ``all``: the source embedding
    is too."""
    initialization: Initialization = "xavier"
    max_length: int = 1024
    """Most tokens in a source or target, ``bos`` and ``eos`` included; most frames."""
    pad_token: int = 0
    bos_token: int = 1
    eos_token: int = 2
    unknown_token: int = 3
    """How a word outside the vocabulary is embedded, where there are ``extra_tokens``."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_source()
        self._check_attention()
        self._check_output()
        self._check_special_tokens()

    @property
    def extended_size(self) -> int:
        """Tokens that a target may have: the vocabulary and what can be copied."""
        if self.output == "pointer":
            return POINTER_VOCABULARY + self.max_length
        return self.target_vocab_size + self.extra_tokens

    @property
    def copies(self) -> bool:
        """Whether words or positions of the source can be output."""
        return self.output != "generate"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> RNNSeq2SeqConfig:
        """A model of the literature, as near as these fields come to it.

        Args:
            name: One of ``RNN_PRESETS``.
            overrides: Fields, the vocabularies' sizes among them.

        Raises:
            ValueError: There is no such preset; or as the constructor.
            TypeError: As the constructor.
        """
        if name not in RNN_PRESETS:
            raise ValueError(
                f"{_NAME}: preset must be one of {', '.join(RNN_PRESETS)}, got {name!r}"
            )
        return cls(**{**RNN_PRESETS[name], **overrides})

    # --- checks -----------------------------------------------------------------------------

    def _check_ranges(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{_NAME}: {name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{_NAME}: {name} must be at least {least}, got {value}")
        for name in ("bidirectional", "reverse_source", "coverage", "monotonic", "input_feeding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{_NAME}: {name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.dropout, int | float) or isinstance(self.dropout, bool):
            raise TypeError(f"{_NAME}: dropout must be a number, got {self.dropout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{_NAME}: dropout must be in [0, 1), got {self.dropout}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{_NAME}: {name} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.bidirectional and self.hidden_size % 2 != 0:
            raise ValueError(
                f"{_NAME}: hidden_size must be even with a bidirectional encoder, got "
                f"{self.hidden_size}"
            )
        if self.bridge == "last" and self.num_encoder_layers != self.num_decoder_layers:
            raise ValueError(
                f"{_NAME}: num_decoder_layers must equal num_encoder_layers = "
                f"{self.num_encoder_layers} with bridge 'last', got {self.num_decoder_layers}"
            )

    def _check_source(self) -> None:
        if self.source_features == 0:
            if self.source_vocab_size < 1:
                raise ValueError(
                    f"{_NAME}: source_vocab_size must be at least 1 without source_features, got "
                    f"{self.source_vocab_size}"
                )
            if self.time_reduction != 1:
                raise ValueError(
                    f"{_NAME}: time_reduction must be 1 without source_features, got "
                    f"{self.time_reduction}"
                )
        elif self.tie_embeddings == "all":
            raise ValueError(
                f"{_NAME}: tie_embeddings must be none or output with source_features, got 'all'"
            )
        elif self.output in _COPIES_WORDS:
            raise ValueError(
                f"{_NAME}: output must be generate or pointer with source_features, got "
                f"{self.output!r}"
            )
        if self.tie_embeddings == "all" and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"{_NAME}: target_vocab_size must equal source_vocab_size = "
                f"{self.source_vocab_size} with tie_embeddings 'all', got "
                f"{self.target_vocab_size}"
            )
        if self.tie_embeddings != "none" and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"{_NAME}: embedding_size must equal hidden_size = {self.hidden_size} with tied "
                f"embeddings, got {self.embedding_size}"
            )

    def _check_attention(self) -> None:
        if self.attention == "none":
            for name in ("coverage", "monotonic", "input_feeding"):
                if getattr(self, name):
                    raise ValueError(
                        f"{_NAME}: {name} must be False with attention 'none', got True"
                    )
        if self.coverage and self.attention not in _ADDITIVE:
            raise ValueError(
                f"{_NAME}: attention must be one of {', '.join(_ADDITIVE)} with coverage, got "
                f"{self.attention!r}"
            )
        if self.location_width % 2 != 1:
            raise ValueError(f"{_NAME}: location_width must be odd, got {self.location_width}")
        for name, size in (
            ("hidden_size", self.hidden_size),
            ("attention_size", self.attention_size or self.hidden_size),
        ):
            if size % self.attention_heads != 0:
                raise ValueError(
                    f"{_NAME}: {name} must be a multiple of attention_heads = "
                    f"{self.attention_heads}, got {size}"
                )

    def _check_output(self) -> None:
        if self.output in _COPIES_WORDS and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"{_NAME}: target_vocab_size must equal source_vocab_size = "
                f"{self.source_vocab_size} with output {self.output!r}, got "
                f"{self.target_vocab_size}"
            )
        if self.output == "pointer_generator" and self.attention == "none":
            raise ValueError(
                f"{_NAME}: attention must not be none with output 'pointer_generator', whose "
                "copies are its weights"
            )
        if self.extra_tokens > 0 and self.output not in _COPIES_WORDS:
            raise ValueError(
                f"{_NAME}: extra_tokens must be 0 with output {self.output!r}, got "
                f"{self.extra_tokens}"
            )
        if self.output == "pointer":
            if self.target_vocab_size != POINTER_VOCABULARY:
                raise ValueError(
                    f"{_NAME}: target_vocab_size must be {POINTER_VOCABULARY} with output "
                    f"'pointer', got {self.target_vocab_size}"
                )
            if self.tie_embeddings != "none":
                raise ValueError(
                    f"{_NAME}: tie_embeddings must be none with output 'pointer', got "
                    f"{self.tie_embeddings!r}"
                )

    def _check_special_tokens(self) -> None:
        names = ["pad_token", "bos_token", "eos_token"]
        if self.extra_tokens > 0:
            names.append("unknown_token")
        for name in names:
            token = getattr(self, name)
            if token >= self.target_vocab_size:
                raise ValueError(
                    f"{_NAME}: {name} must be in 0..{self.target_vocab_size - 1} (the target "
                    f"vocabulary), got {token}"
                )
        if self.source_features == 0 and self.pad_token >= self.source_vocab_size:
            raise ValueError(
                f"{_NAME}: pad_token must be in 0..{self.source_vocab_size - 1} (the source "
                f"vocabulary), got {self.pad_token}"
            )
        if self.pad_token == self.eos_token:
            raise ValueError(
                f"{_NAME}: pad_token must differ from eos_token, got {self.pad_token} for both"
            )


_LEAST = {
    "source_vocab_size": 0,
    "target_vocab_size": 1,
    "source_features": 0,
    "time_reduction": 1,
    "embedding_size": 1,
    "hidden_size": 1,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "attention_size": 0,
    "attention_heads": 1,
    "location_filters": 1,
    "location_width": 1,
    "extra_tokens": 0,
    "max_length": 1,
    "pad_token": 0,
    "bos_token": 0,
    "eos_token": 0,
    "unknown_token": 0,
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "front_end": get_args(FrontEnd),
    "cell": get_args(Cell),
    "bridge": get_args(Bridge),
    "context": get_args(Context),
    "attention": get_args(Attention),
    "output": get_args(Output),
    "tie_embeddings": get_args(TiedEmbeddings),
    "initialization": get_args(Initialization),
}
