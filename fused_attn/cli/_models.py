"""Options of ``fused-attn train`` that say what the model is, and the model that they make."""

from __future__ import annotations

import argparse
from typing import Any, Literal, NamedTuple, get_args

from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig, Transformer, TransformerConfig
from fused_attn.models.config import Activation, Norm, Positions
from fused_attn.models.rnn_config import (
    POINTER_VOCABULARY,
    Attention,
    Bridge,
    Cell,
    Context,
    FrontEnd,
    Initialization,
    Output,
)
from fused_attn.training.checkpoint import Vocabularies
from fused_attn.training.errors import InputError

from ._text import option_name, positive

Kind = Literal["transformer", "rnn"]

_EXTRA_TOKENS = 50


class _Option(NamedTuple):
    """An option of one kind of model, or of both with defaults of their own."""

    name: str
    defaults: dict[Kind, Any]
    """By the kinds that have it."""
    meaning: str = ""
    settings: dict[str, Any] = {}  # noqa: RUF012

    @property
    def field(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


def _whole(least: int = 1) -> dict[str, Any]:
    return {"type": positive(int) if least else int, "metavar": "N"}


def _one_of(choices: Any) -> dict[str, Any]:
    return {"choices": get_args(choices)}


_PART = {"type": float, "metavar": "P"}
_WEIGHT = {"type": float, "metavar": "X"}
# Not False, so that it can be told whether the option was given.
_FLAG = {"action": "store_const", "const": True}

_OPTIONS = (
    _Option("--encoder-layers", {"transformer": 3, "rnn": 2}, "", _whole()),
    _Option("--decoder-layers", {"transformer": 3, "rnn": 2}, "", _whole()),
    _Option("--dropout", {"transformer": 0.1, "rnn": 0.2}, "", _PART),
    _Option("--d-model", {"transformer": 256}, "", _whole()),
    _Option("--heads", {"transformer": 4}, "", _whole()),
    _Option("--feedforward", {"transformer": 1024}, "", _whole()),
    _Option("--attention-dropout", {"transformer": 0.0}, "of attention weights", _PART),
    _Option("--activation", {"transformer": "relu"}, "", _one_of(Activation)),
    _Option("--norm", {"transformer": "layer_norm"}, "", _one_of(Norm)),
    _Option("--positions", {"transformer": "sinusoidal"}, "", _one_of(Positions)),
    _Option("--norm-first", {"transformer": False}, "pre-norm layers", _FLAG),
    _Option("--cell", {"rnn": "lstm"}, "", _one_of(Cell)),
    _Option(
        "--embedding",
        {"rnn": 256},
        "width of embeddings; where it is --hidden they are tied to the output",
        _whole(),
    ),
    _Option("--hidden", {"rnn": 256}, "width of the decoder and of what it attends to", _whole()),
    _Option("--unidirectional", {"rnn": False}, "an encoder that reads forwards alone", _FLAG),
    _Option("--reverse-source", {"rnn": False}, "read each source from its end", _FLAG),
    _Option(
        "--bridge",
        {"rnn": None},
        "what the decoder begins with: the encoder's last states, or a learned map of their mean "
        "or of the top one; default: last, with as many layers on both sides, else linear",
        _one_of(Bridge),
    ),
    _Option(
        "--context",
        {"rnn": "initial"},
        "every_step: the source as one vector is part of each input",
        _one_of(Context),
    ),
    _Option("--attention", {"rnn": "additive"}, "", _one_of(Attention)),
    _Option("--attention-heads", {"rnn": 1}, "", _whole()),
    _Option("--coverage", {"rnn": False}, "attention sees where it has looked before", _FLAG),
    _Option("--monotonic", {"rnn": False}, "attention goes forwards alone", _FLAG),
    _Option(
        "--input-feeding",
        {"rnn": False},
        "what attention found is part of the next input",
        _FLAG,
    ),
    _Option(
        "--output",
        {"rnn": "generate"},
        "how words of the source are copied; a pointer network writes nothing else",
        _one_of(Output),
    ),
    _Option(
        "--extra-tokens",
        {"rnn": None},
        "words outside the vocabulary that a source may give to copy; default: "
        f"{_EXTRA_TOKENS} where words are copied",
        _whole(0),
    ),
    _Option("--front-end", {"rnn": "linear"}, "between frames and the encoder", _one_of(FrontEnd)),
    _Option("--time-reduction", {"rnn": 1}, "frames that become one position", _whole()),
    _Option("--initialization", {"rnn": "xavier"}, "", _one_of(Initialization)),
    _Option(
        "--guided-attention",
        {"rnn": 0.0},
        "weight of a loss on attention far from the diagonal",
        _WEIGHT,
    ),
    _Option(
        "--coverage-loss", {"rnn": 0.0}, "weight of a loss on looking again at a place", _WEIGHT
    ),
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; ``settle_model_arguments`` reads them."""
    parser.add_argument(
        "--model", choices=get_args(Kind), default="transformer", help="default: transformer"
    )
    groups = {
        ("transformer", "rnn"): parser.add_argument_group("model"),
        ("transformer",): parser.add_argument_group("model: transformer"),
        ("rnn",): parser.add_argument_group("model: rnn"),
    }
    for option in _OPTIONS:
        groups[tuple(option.defaults)].add_argument(
            option.name, default=None, help=_help(option), **option.settings
        )


def settle_model_arguments(arguments: argparse.Namespace) -> None:
    """Give the options of the chosen model that were not given their default.

    Raises:
        InputError: An option of another model was given.
    """
    kind = arguments.model
    for option in _OPTIONS:
        given = getattr(arguments, option.field) is not None
        if kind in option.defaults:
            if not given:
                setattr(arguments, option.field, option.defaults[kind])
        elif given:
            [other] = option.defaults
            raise InputError(f"{option_name(option.field)} needs --model {other}, got {kind}")
    if kind == "rnn":
        if arguments.bridge is None:
            is_even = arguments.encoder_layers == arguments.decoder_layers
            arguments.bridge = "last" if is_even else "linear"
        if arguments.extra_tokens is None:
            copies_words = arguments.output in ("pointer_generator", "copynet")
            arguments.extra_tokens = _EXTRA_TOKENS if copies_words else 0


def copies(arguments: argparse.Namespace) -> bool:
    """Whether the model asked for writes words of the source."""
    return arguments.model == "rnn" and arguments.output != "generate"


def make_config(
    arguments: argparse.Namespace,
    vocabularies: Vocabularies,
    *,
    source_features: int = 0,
    max_length: int,
) -> TransformerConfig | RNNSeq2SeqConfig:
    """Return the configuration asked for.

    Args:
        arguments: Settled.
        vocabularies: Of the two sides.
        source_features: F where the sources are frames.
        max_length: Most positions of a sequence.

    Raises:
        InputError: The options contradict each other.
    """
    try:
        if arguments.model == "transformer":
            return _transformer_config(arguments, vocabularies, max_length)
        return _rnn_config(arguments, vocabularies, source_features, max_length)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def make_model(config: TransformerConfig | RNNSeq2SeqConfig) -> Transformer | RNNSeq2Seq:
    """Return the model of a configuration."""
    if isinstance(config, TransformerConfig):
        return Transformer(config)
    return RNNSeq2Seq(config)


def _transformer_config(
    arguments: argparse.Namespace, vocabularies: Vocabularies, max_length: int
) -> TransformerConfig:
    return TransformerConfig(
        source_vocab_size=len(vocabularies.source),
        target_vocab_size=len(vocabularies.target),
        d_model=arguments.d_model,
        num_heads=arguments.heads,
        num_encoder_layers=arguments.encoder_layers,
        num_decoder_layers=arguments.decoder_layers,
        dim_feedforward=arguments.feedforward,
        dropout=arguments.dropout,
        attention_dropout=arguments.attention_dropout,
        activation=arguments.activation,
        norm=arguments.norm,
        norm_first=arguments.norm_first,
        positions=arguments.positions,
        max_length=max_length,
        tie_embeddings="all" if vocabularies.source is vocabularies.target else "output",
    )


def _rnn_config(
    arguments: argparse.Namespace,
    vocabularies: Vocabularies,
    source_features: int,
    max_length: int,
) -> RNNSeq2SeqConfig:
    points = arguments.output == "pointer"
    if points or arguments.embedding != arguments.hidden:
        tied: Any = "none"
    elif source_features or vocabularies.source is not vocabularies.target:
        tied = "output"
    else:
        tied = "all"
    return RNNSeq2SeqConfig(
        source_vocab_size=0 if source_features else len(vocabularies.source),
        target_vocab_size=POINTER_VOCABULARY if points else len(vocabularies.target),
        source_features=source_features,
        front_end=arguments.front_end,
        time_reduction=arguments.time_reduction,
        cell=arguments.cell,
        embedding_size=arguments.embedding,
        hidden_size=arguments.hidden,
        num_encoder_layers=arguments.encoder_layers,
        num_decoder_layers=arguments.decoder_layers,
        bidirectional=not arguments.unidirectional,
        reverse_source=arguments.reverse_source,
        dropout=arguments.dropout,
        bridge=arguments.bridge,
        context=arguments.context,
        attention=arguments.attention,
        attention_heads=arguments.attention_heads,
        coverage=arguments.coverage,
        monotonic=arguments.monotonic,
        input_feeding=arguments.input_feeding,
        output=arguments.output,
        extra_tokens=arguments.extra_tokens,
        tie_embeddings=tied,
        initialization=arguments.initialization,
        max_length=max_length,
    )


def _help(option: _Option) -> str:
    defaults = dict.fromkeys(option.defaults.values())
    if option.settings is _FLAG or None in defaults:
        return option.meaning
    if len(defaults) == 1:
        said = f"default: {next(iter(defaults))}"
    else:
        said = "default: " + ", ".join(f"{v} ({k})" for k, v in option.defaults.items())
    return f"{option.meaning}; {said}" if option.meaning else said
