"""Options of ``fused-attn train`` that say what the model is, and the model that they make."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fused_attn.models import (
    RNN_PRESETS,
    RNNSeq2Seq,
    RNNSeq2SeqConfig,
    Transformer,
    TransformerConfig,
)
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


@dataclass(frozen=True)
class _Option:
    """An option of one kind of model, or of both with defaults of their own."""

    name: str
    target: str
    """The configuration's field; none for what is no part of it."""
    defaults: dict[Kind, Any]
    """By the kinds that have it."""
    meaning: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of argparse."""

    @property
    def argument(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")

    def help(self) -> str:
        defaults = list(dict.fromkeys(self.defaults.values()))
        if None in defaults or defaults == [False]:
            return self.meaning
        said = f"default: {defaults[0]}"
        if len(defaults) > 1:
            said = "default: " + ", ".join(f"{v} ({k})" for k, v in self.defaults.items())
        return f"{self.meaning}; {said}" if self.meaning else said


_COUNT = {"type": positive(int), "metavar": "N"}
_PART = {"type": float, "metavar": "P"}
_WEIGHT = {"type": float, "metavar": "X"}
_FLAG = {"action": argparse.BooleanOptionalAction}


def _choice(kind: Any) -> dict[str, Any]:
    return {"choices": get_args(kind)}


_OPTIONS = (
    _Option("--encoder-layers", "num_encoder_layers", {"transformer": 3, "rnn": 2}, "", _COUNT),
    _Option("--decoder-layers", "num_decoder_layers", {"transformer": 3, "rnn": 2}, "", _COUNT),
    _Option("--dropout", "dropout", {"transformer": 0.1, "rnn": 0.2}, "", _PART),
    _Option("--d-model", "d_model", {"transformer": 256}, "", _COUNT),
    _Option("--heads", "num_heads", {"transformer": 4}, "", _COUNT),
    _Option("--feedforward", "dim_feedforward", {"transformer": 1024}, "", _COUNT),
    _Option(
        "--attention-dropout",
        "attention_dropout",
        {"transformer": 0.0},
        "of attention weights",
        _PART,
    ),
    _Option("--activation", "activation", {"transformer": "relu"}, "", _choice(Activation)),
    _Option("--norm", "norm", {"transformer": "layer_norm"}, "", _choice(Norm)),
    _Option("--positions", "positions", {"transformer": "sinusoidal"}, "", _choice(Positions)),
    _Option("--norm-first", "norm_first", {"transformer": False}, "pre-norm layers", _FLAG),
    _Option(
        "--preset",
        "",
        {"rnn": None},
        "defaults of the options below as in a model of the literature",
        {"choices": tuple(name for name in RNN_PRESETS if name != "vinyals2015")},
    ),
    _Option("--cell", "cell", {"rnn": "lstm"}, "", _choice(Cell)),
    _Option(
        "--embedding",
        "embedding_size",
        {"rnn": 256},
        "width of embeddings; where it is --hidden they are tied to the output",
        _COUNT,
    ),
    _Option(
        "--hidden",
        "hidden_size",
        {"rnn": 256},
        "width of the decoder and of what it attends to",
        _COUNT,
    ),
    _Option(
        "--unidirectional", "", {"rnn": False}, "an encoder that reads in one direction", _FLAG
    ),
    _Option(
        "--reverse-source", "reverse_source", {"rnn": False}, "read sources from their end", _FLAG
    ),
    _Option(
        "--bridge",
        "bridge",
        {"rnn": None},
        "what the decoder begins with: the encoder's last states, or a learned map of their mean "
        "or of the top one; default: last, with as many layers on both sides, else linear",
        _choice(Bridge),
    ),
    _Option(
        "--context",
        "context",
        {"rnn": "initial"},
        "every_step: the source as one vector is part of each input",
        _choice(Context),
    ),
    _Option("--attention", "attention", {"rnn": "additive"}, "", _choice(Attention)),
    _Option("--attention-heads", "attention_heads", {"rnn": 1}, "", _COUNT),
    _Option("--coverage", "coverage", {"rnn": False}, "attention sees where it has looked", _FLAG),
    _Option("--monotonic", "monotonic", {"rnn": False}, "attention goes forwards alone", _FLAG),
    _Option(
        "--input-feeding",
        "input_feeding",
        {"rnn": False},
        "what attention found is part of the next input",
        _FLAG,
    ),
    _Option(
        "--output",
        "output",
        {"rnn": "generate"},
        "how words of the source are copied; a pointer network writes nothing else",
        _choice(Output),
    ),
    _Option(
        "--extra-tokens",
        "extra_tokens",
        {"rnn": None},
        "words outside the vocabulary that a source may give to copy; default: "
        f"{_EXTRA_TOKENS} where words are copied",
        {"type": int, "metavar": "N"},
    ),
    _Option(
        "--front-end",
        "front_end",
        {"rnn": "linear"},
        "between frames and the encoder",
        _choice(FrontEnd),
    ),
    _Option(
        "--time-reduction", "time_reduction", {"rnn": 1}, "frames that become a position", _COUNT
    ),
    _Option("--initialization", "initialization", {"rnn": "xavier"}, "", _choice(Initialization)),
    _Option(
        "--guided-attention",
        "",
        {"rnn": 0.0},
        "weight of a loss on attention far from the diagonal",
        _WEIGHT,
    ),
    _Option(
        "--coverage-loss", "", {"rnn": 0.0}, "weight of a loss on looking again at a place", _WEIGHT
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
            option.name, default=None, help=option.help(), **option.settings
        )


def settle_model_arguments(arguments: argparse.Namespace) -> None:
    """Give the options of the chosen model that were not given their default.

    Raises:
        InputError: An option of the other model was given.
    """
    kind = arguments.model
    preset = RNN_PRESETS.get(arguments.preset, {})
    if "bidirectional" in preset and arguments.unidirectional is None:
        arguments.unidirectional = not preset["bidirectional"]
    for option in _OPTIONS:
        given = getattr(arguments, option.argument) is not None
        if kind not in option.defaults:
            if given:
                [other] = option.defaults
                name = option_name(option.argument)
                raise InputError(f"{name} needs --model {other}, got {kind}")
        elif not given:
            default = preset.get(option.target, option.defaults[kind])
            setattr(arguments, option.argument, default)
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


def make_model(
    arguments: argparse.Namespace,
    vocabularies: Vocabularies,
    *,
    source_features: int = 0,
    max_length: int,
) -> Transformer | RNNSeq2Seq:
    """Return the model asked for.

    Args:
        arguments: Settled.
        vocabularies: Of the two sides.
        source_features: F where the sources are frames.
        max_length: Most positions of a sequence.

    Raises:
        InputError: The options contradict each other.
    """
    fields = {
        option.target: getattr(arguments, option.argument)
        for option in _OPTIONS
        if option.target and arguments.model in option.defaults
    }
    fields["source_vocab_size"] = len(vocabularies.source)
    fields["target_vocab_size"] = len(vocabularies.target)
    fields["max_length"] = max_length
    is_joint = vocabularies.source is vocabularies.target
    fields["tie_embeddings"] = "all" if is_joint else "output"
    try:
        if arguments.model == "transformer":
            return Transformer(TransformerConfig(**fields))
        fields["bidirectional"] = not arguments.unidirectional
        if source_features:
            fields |= {"source_vocab_size": 0, "source_features": source_features}
            fields["tie_embeddings"] = "output"
        if arguments.output == "pointer":
            fields["target_vocab_size"] = POINTER_VOCABULARY
        if arguments.output == "pointer" or arguments.embedding != arguments.hidden:
            fields["tie_embeddings"] = "none"
        return RNNSeq2Seq(RNNSeq2SeqConfig(**fields))
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
