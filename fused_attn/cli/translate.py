"""``fused-attn translate``: sentences in, sentences out."""

from __future__ import annotations

import argparse
import sys

from fused_attn.training.data import read_lines
from fused_attn.training.translator import load_translator

from ._text import (
    add_decoding_arguments,
    add_device_arguments,
    check_source_lengths,
    select_device,
    write_lines,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.description = (
        "Translate text, one sentence a line, with a trained model. The output has one line for "
        "each line of the input, in its order; an empty line gives an empty line."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a checkpoint, or a training run's --out"
    )
    parser.add_argument(
        "--input", default="-", metavar="FILE", help="UTF-8, plain or .gz; default: standard input"
    )
    parser.add_argument("--output", default="-", metavar="FILE", help="default: standard output")
    add_decoding_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Translate; 0 when every line was."""
    device = select_device(arguments)
    translator = load_translator(arguments.model, device=device, max_tokens=arguments.max_tokens)
    sentences = read_lines(arguments.input)
    name = "<stdin>" if arguments.input == "-" else arguments.input
    check_source_lengths(translator, sentences, name)
    translations = translator.translate(
        sentences,
        beam_size=arguments.beam,
        length_penalty=arguments.length_penalty,
        progress=sys.stderr.isatty(),
    )
    write_lines(arguments.output, translations)
    return 0
