"""What the commands on text share: options, devices and strategies."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, get_args

import torch

from fused_attn.generation import BeamSearch, Constraints, Greedy, Sampling
from fused_attn.generation.strategies import LengthNormalization
from fused_attn.training.errors import InputError
from fused_attn.training.translator import Translator


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where to compute."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, …; auto: a GPU if there is one"
    )
    parser.add_argument(
        "--threads", type=positive(int), metavar="N", help="CPU threads; default: all cores"
    )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a search, which ``select_strategy`` and ``select_constraints`` read."""
    parser.add_argument(
        "--batch-size",
        type=positive(int),
        metavar="N",
        help="sentences decoded at a time; default: 32, on a GPU 128",
    )
    parser.add_argument(
        "--int8", action="store_true", help="with an 8-bit copy of the model, on a CPU"
    )
    group = parser.add_argument_group("beam search")
    group.add_argument("--beam", type=positive(int), metavar="K", help="default: 4")
    group.add_argument(
        "--length-penalty",
        type=float,
        metavar="P",
        help="exponent of the length by which a log-probability is divided; default: 1",
    )
    group.add_argument(
        "--length-normalization",
        choices=get_args(LengthNormalization),
        help="by n ** P, or by ((5 + n) / 6) ** P; default: power",
    )
    group.add_argument(
        "--coverage-penalty",
        type=float,
        metavar="B",
        help="weight of what attention leaves out of the source; default: 0",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sample", action="store_true", help="draw translations at random, instead of a search"
    )
    group.add_argument(
        "--top-k", type=positive(int), metavar="K", help="from the K likeliest tokens"
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="from the likeliest that hold a probability of P"
    )
    group.add_argument("--seed", type=int, metavar="N", help="draw the same ones every time")
    group = parser.add_argument_group("both")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="divides the logits; default: 1"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 discourages tokens that the translation has already; default: 1",
    )
    group.add_argument(
        "--no-repeat-ngram",
        type=int,
        default=0,
        metavar="N",
        help="no N tokens occur twice in a row; default: 0, no such rule",
    )


def select_strategy(
    arguments: argparse.Namespace, count: int | None = None
) -> BeamSearch | Greedy | Sampling:
    """Return the strategy asked for.

    Args:
        arguments: Those of ``add_decoding_arguments``.
        count: Translations of a sentence; None: one, whose score does not matter.

    Raises:
        InputError: Options contradict each other.
        ValueError: An option is out of range.
    """
    search = _given(arguments, "beam", "length_penalty", "length_normalization", "coverage_penalty")
    sampling = _given(arguments, "top_k", "top_p", "seed")
    both = _given(arguments, "temperature")
    if arguments.sample:
        for name in search:
            raise InputError(f"{option_name(name)} is of beam search and does not go with --sample")
        return Sampling(num_samples=count or 1, **sampling, **both)
    for name in sampling:
        raise InputError(f"{option_name(name)} needs --sample")
    beam_size = search.pop("beam", BeamSearch.beam_size)
    if count is not None and count > beam_size:
        raise InputError(f"--n-best {count} needs --beam {count} or more, got {beam_size}")
    strategy = BeamSearch(beam_size=beam_size, num_hypotheses=count or 1, **search, **both)
    if beam_size == 1 and count is None and strategy.coverage_penalty == 0.0:
        return Greedy()  # finds the same
    return strategy


def describe(strategy: BeamSearch | Greedy | Sampling) -> str:
    """Return a strategy in a word or two."""
    if isinstance(strategy, Sampling):
        return "sampling"
    return f"beam {strategy.beam_size}" if isinstance(strategy, BeamSearch) else "beam 1"


def option_name(field: str) -> str:
    """Return how an option is written on the command line."""
    return "--" + field.replace("_", "-")


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def select_constraints(arguments: argparse.Namespace) -> Constraints:
    """Return what translations must obey.

    Raises:
        ValueError: An option is out of range.
    """
    return Constraints(
        repetition_penalty=arguments.repetition_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram,
    )


def select_device(arguments: argparse.Namespace) -> torch.device:
    """Return the device asked for, and set the number of threads.

    Raises:
        InputError: There is no such device here.
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used here: {reason}") from error
    return device


def reads_frames(path: str) -> bool:
    """Whether a file of sources holds frames instead of text."""
    return path.endswith(".npz")


def check_source(translator: Translator, path: str, name: str) -> None:
    """Check that a model reads what a file of sources holds.

    Args:
        translator: The model.
        path: The file.
        name: What to call it.

    Raises:
        InputError: The model reads text and the file holds frames, or the other way round.
    """
    if reads_frames(path) != bool(translator.source_features):
        kinds = ("frames (.npz)", "text")
        asked, given = kinds if translator.source_features else kinds[::-1]
        raise InputError(f"{name}: the model reads {asked}, got {given}")


def positive(number: type) -> Callable[[str], int | float]:
    """Return an argparse type for numbers above zero."""

    def parse(text: str) -> int | float:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = number.__name__
    return parse
