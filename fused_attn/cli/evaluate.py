"""``fused-attn evaluate``: how good a model's translations are."""

from __future__ import annotations

import argparse
import sys
import time

from fused_attn.training.data import read_parallel
from fused_attn.training.features import read_feature_text
from fused_attn.training.metrics import corpus_bleu, exact_match
from fused_attn.training.translator import Line, load_translator

from ._line_writer import LineWriter
from ._text import (
    add_decoding_arguments,
    add_device_arguments,
    check_source,
    describe,
    reads_frames,
    select_constraints,
    select_device,
    select_strategy,
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
        "--src",
        required=True,
        metavar="FILE",
        help="source sentences, UTF-8, plain or .gz, or frames (.npz)",
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
    strategy = select_strategy(arguments)
    constraints = select_constraints(arguments)
    read = read_feature_text if reads_frames(arguments.src) else read_parallel
    text = read(arguments.src, arguments.ref)
    device = select_device(arguments)
    translator = load_translator(
        arguments.model, device=device, batch_size=arguments.batch_size, int8=arguments.int8
    )
    check_source(translator, arguments.src, arguments.src)
    sources: list[Line] = [*text.source]
    started = time.perf_counter()
    translations = translator.translate(
        sources,
        strategy=strategy,
        constraints=constraints,
        name=arguments.src,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    if arguments.output is not None:
        with LineWriter(arguments.output) as output:
            for translation in translations:
                output.write(f"{translation}\n")
            output.finish()
    bleu = corpus_bleu(translations, text.target, tokenization=arguments.tokenize)
    exact = exact_match(translations, text.target)
    print(bleu)
    print(bleu.details)
    print(f"exact match = {100 * exact:.1f} % of {len(text)} sentences")
    print(
        f"translated in {seconds:.1f} s, {len(text) / seconds:.1f} sentences/s, "
        f"{describe(strategy)}, {device}",
        file=sys.stderr,
    )
    return 0
