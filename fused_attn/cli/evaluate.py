"""``fused-attn evaluate``: how good a model's translations are."""

from __future__ import annotations

import argparse
import sys
import time

from fused_attn.training.data import read_parallel
from fused_attn.training.metrics import corpus_bleu, exact_match
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
        "Translate a test set and score it against references: BLEU by sacreBLEU, cased, with its "
        "signature, and the part of the sentences translated exactly as in the reference."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a checkpoint, or a training run's --out"
    )
    parser.add_argument(
        "--src", required=True, metavar="FILE", help="source sentences, UTF-8, plain or .gz"
    )
    parser.add_argument(
        "--ref", required=True, metavar="FILE", help="reference translations, line by line"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the translations here")
    parser.add_argument(
        "--tokenize",
        default="13a",
        choices=("13a", "zh", "char", "intl", "none"),
        help="sacreBLEU's tokenisation; zh for Chinese; default: 13a",
    )
    add_decoding_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Translate and score; 0 whatever the score."""
    text = read_parallel(arguments.src, arguments.ref)
    device = select_device(arguments)
    translator = load_translator(arguments.model, device=device, max_tokens=arguments.max_tokens)
    check_source_lengths(translator, text.source, arguments.src)
    started = time.perf_counter()
    translations = translator.translate(
        text.source,
        beam_size=arguments.beam,
        length_penalty=arguments.length_penalty,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    if arguments.output is not None:
        write_lines(arguments.output, translations)
    bleu = corpus_bleu(translations, text.target, tokenization=arguments.tokenize)
    exact = exact_match(translations, text.target)
    print(bleu)
    print(bleu.details)
    print(f"exact match = {100 * exact:.1f} % of {len(text)} sentences")
    print(
        f"translated in {seconds:.1f} s, {len(text) / seconds:.1f} sentences/s, beam "
        f"{arguments.beam}, {device}",
        file=sys.stderr,
    )
    return 0
