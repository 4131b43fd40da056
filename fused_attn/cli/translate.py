"""``fused-attn translate``: sentences in, sentences out."""

from __future__ import annotations

import argparse
import io
import os
import stat
import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from fused_attn.training.data import iterate_lines, read_lines
from fused_attn.training.features import read_features
from fused_attn.training.translator import Line, Translation, load_translator

from ._line_writer import LineWriter
from ._text import (
    add_decoding_arguments,
    add_device_arguments,
    check_source,
    positive,
    reads_frames,
    select_constraints,
    select_device,
    select_strategy,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.description = (
        "Translate text, one sentence a line, with a trained model. The output has one line for "
        "each line of the input, in its order, as soon as it is next; an empty line gives an empty "
        "line. So does one that cannot be translated, which is named on standard error; the exit "
        "status is then 1. After Ctrl-C the output has the lines that come first, and the exit "
        "status is 130."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a checkpoint, or a training run's --out"
    )
    parser.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="UTF-8, plain or .gz, or frames (.npz); default: standard input",
    )
    parser.add_argument("--output", default="-", metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--n-best",
        type=positive(int),
        metavar="N",
        help="N lines for each line of the input, best first: its number, score and text, with "
        "tabs between them; none where there is no translation",
    )
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="a progress bar on standard error; default: if that is a terminal and the output is "
        "none",
    )
    add_decoding_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Translate; 0 when every line was, else 1."""
    strategy = select_strategy(arguments, arguments.n_best)
    constraints = select_constraints(arguments)
    device = select_device(arguments)
    name = "<stdin>" if arguments.input == "-" else arguments.input
    lines = _open(arguments.input, name)
    translator = load_translator(
        arguments.model, device=device, batch_size=arguments.batch_size, int8=arguments.int8
    )
    check_source(translator, arguments.input, name)
    total = len(lines) if isinstance(lines, Sequence) else None
    translations = translator.translate_each(lines, strategy=strategy, constraints=constraints)
    status = 0
    with (
        LineWriter(arguments.output) as output,
        tqdm(
            total=total, unit=" lines", desc="translate", disable=not _shows_progress(arguments)
        ) as bar,
    ):
        try:
            for number, translation in enumerate(translations, start=1):
                if translation.error is not None:
                    status = 1
                    message = f"fused-attn translate: {name}:{number}: {translation.error}"
                    tqdm.write(message, file=sys.stderr)
                output.write(_format(number, translation, arguments.n_best))
                bar.update()
            output.finish()
        except BrokenPipeError:
            raise
        except BaseException as error:
            # What is there may have taken hours.
            if output.count > 0:
                output.finish()
            bar.close()
            was_interrupted = isinstance(error, KeyboardInterrupt)
            if was_interrupted or output.count > 0:
                what = "interrupted" if was_interrupted else "stopped"
                print(f"{what}: {_account(output.count, total, arguments.output)}", file=sys.stderr)
            if was_interrupted:
                return 130
            raise
    return status


def _open(path: str, name: str) -> Iterable[Line]:
    """The lines of a file, all of them; those of a pipe or a terminal as they arrive."""
    if reads_frames(path):
        return [*read_features(path)]
    if path != "-":
        return read_lines(path, strict=False)
    try:
        descriptor = sys.stdin.fileno()
    except io.UnsupportedOperation:
        return read_lines("-", strict=False)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return read_lines("-", strict=False)
    # Python closes its own at exit and would wait for the thread that reads it.
    return iterate_lines(open(descriptor, "rb", closefd=False), name)


def _shows_progress(arguments: argparse.Namespace) -> bool:
    if arguments.progress is not None:
        return bool(arguments.progress)
    return sys.stderr.isatty() and not (arguments.output == "-" and sys.stdout.isatty())


def _format(number: int, translation: Translation, n_best: int | None) -> str:
    if n_best is None:
        return f"{translation.text}\n"
    return "".join(
        f"{number}\t{candidate.score:.6f}\t{candidate.text}\n"
        for candidate in translation.candidates
    )


def _account(count: int, total: int | None, output: str) -> str:
    """How far it came."""
    whole = "" if total is None else f" of {total}"
    if output == "-" or count == 0:
        return f"{count}{whole} lines translated"
    return f"{count}{whole} lines translated; {output} holds the first {count}"
