"""What the commands on text share: options, devices, checks and output files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

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
    """Add the options of a search."""
    parser.add_argument("--beam", type=positive(int), default=4, metavar="K", help="default: 4")
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="divide a log-probability by length to this power; default: 1",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive(int),
        default=4096,
        metavar="N",
        help="source tokens decoded at once, padding counted; default: 4096",
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


def positive(number: type) -> Callable[[str], int | float]:
    """Return an argparse type for numbers above zero."""

    def parse(text: str) -> int | float:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = number.__name__
    return parse


def check_source_lengths(translator: Translator, sentences: Sequence[str], name: str) -> None:
    """Check that the model can read every sentence.

    Raises:
        InputError: One is longer than the model's positions; the message names file and line.
    """
    longest = translator.model.config.max_length - 1
    for line, tokens in enumerate(translator.encode(sentences), start=1):
        if len(tokens) > longest:
            raise InputError(
                f"{name}:{line}: the sentence has {len(tokens)} tokens, over the model's limit of "
                f"{longest}"
            )


def write_lines(path: str, lines: Sequence[str]) -> None:
    """Write lines to a file, whole or not at all, or to standard output for ``-``.

    Raises:
        InputError: The file cannot be written.
    """
    text = "".join(line + "\n" for line in lines)
    if path == "-":
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write: {error.strerror}") from error
