"""``python -m benchmarks.models``: whole models beside the libraries one would use instead.

Training steps beside ``torch.nn``, eager and compiled; greedy and beam search beside Hugging Face's
``generate`` and, on a CPU, CTranslate2; the RNN Seq2Seq and recurrent layers beside ``torch.nn``.
All sides compute the same with the same weights, which is checked before anything is timed. The
most valuable cases come first. Rows go to the results (`benchmarks.results`), and a line each to
the screen: a ratio above 1 means that ours is faster.

Times are of the host's clock from the call until the device is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from ..results import Row, Writer, describe, identity, problem, read, writer
from . import recurrent_layers, rnn, transformer_step, translation
from .comparison import NO_TIME, OURS, OURS_EAGER, ModelCase, is_ready, rows_of
from .sizes import SIZES, Size

GROUPS: dict[str, Callable[[Size, str], list[ModelCase]]] = {
    "training_step": transformer_step.cases,
    "translation": translation.cases,
    "rnn": rnn.cases,
    "recurrent_layers": recurrent_layers.cases,
}


def plan(size: Size, device: str, groups: Sequence[str], name: str = "") -> list[ModelCase]:
    """The cases of some groups whose label contains a name, most valuable first."""
    cases = [case for group in groups for case in GROUPS[group](size, device)]
    return sorted((case for case in cases if name in case.label), key=lambda case: case.rank)


def measure(
    cases: Sequence[ModelCase], device: str, rounds: int | None, seconds: float
) -> Iterator[Row]:
    """The rows of all cases; those that would begin too late to be done by ``seconds`` say so."""
    deadline = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() + case.needs_seconds >= deadline:
            yield from (case.row(name, absent=NO_TIME) for name in case.shown())
        else:
            yield from rows_of(case, device, rounds or case.rounds)


def without_known(cases: Sequence[ModelCase], path: Path) -> list[ModelCase]:
    """The cases that a file of results does not know already."""
    if not path.exists():
        return list(cases)
    known = {identity(row) for row in read(path).rows if row.get("absent") != NO_TIME}
    return [
        case
        for case in cases
        if not all(identity(case.row(name)) in known for name in case.shown())
    ]


def line(row: Row) -> str:
    """A row of a model, for the screen."""
    names = ("model", "task", "case", "dtype", "provider")
    head = " ".join(row[name] for name in names) + ": "
    if why := problem(row):
        return f"{head}{why}"
    text = f"{head}{row['p50_ms']:.1f} ms ({row['p20_ms']:.1f}–{row['p80_ms']:.1f})"
    text += f", {row['tokens_per_s']:,.0f} tokens/s"
    if "ratio" in row:
        text += ", {1:.2f} ({0:.2f}–{2:.2f}) times ours".format(*row["ratio"])
    if row.get("agreement", 1.0) < 1.0:
        text += f", {row['agreement']:.1%} of the tokens are ours"
    if "peak_bytes" in row:
        text += f", {row['peak_bytes'] / 1e6:.0f} MB"
    if "launches" in row:
        text += f", {row['launches']} launches"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Returns:
        1 where something of ours failed or a peer disagreed; else 3 where a case was not begun
        for want of time; else 0. (2 is for options that are wrong, or a GPU that is not here.)
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="--size small --rounds 3")
    parser.add_argument("--size", choices=SIZES, help="of the models (base)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--case", default="", help="only cases whose line contains this")
    parser.add_argument("--rounds", type=int, help="turns of each provider, at least 2 (5)")
    parser.add_argument("--known", type=Path, help="a .jsonl file: leave out the cases it knows")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later")
    parser.add_argument(
        "--out", type=Path, help="folder or .jsonl file; default: results/<device>/"
    )
    parser.add_argument("--json", action="store_true", help="rows to the screen, and to no file")
    arguments = parser.parse_args(argv)
    device = arguments.device
    rounds: int | None = arguments.rounds or (3 if arguments.quick else None)
    if rounds is not None and rounds < 2:
        parser.error("--rounds must be at least 2: a ratio has quartiles")
    if not is_ready(device):
        print("no CUDA GPU here", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size or ("small" if arguments.quick else "base")]
    cases = plan(size, device, arguments.only, arguments.case)
    if arguments.known:
        cases = without_known(cases, arguments.known)
    screen = sys.stdout
    into: Writer | None = None
    if not arguments.json:
        machine = describe(device)
        print(f"{machine['name']}, torch {machine['torch']}, {machine['threads']} threads")
        into = writer(device, arguments.out)
    failures = left_out = 0
    # What a peer prints is no row.
    with contextlib.redirect_stdout(sys.stderr):
        for row in measure(cases, device, rounds, arguments.seconds):
            failures += "failed" in row and (
                row["provider"] in (OURS, OURS_EAGER) or row.get("disagrees", False)
            )
            left_out += row.get("absent") == NO_TIME
            _emit(row, screen, into)
    if into is not None:
        into.close()
        print(f"{into.path}")
    return 1 if failures else 3 if left_out else 0


def _emit(row: Row, screen: IO[str], into: Writer | None) -> None:
    if into is None:
        print(json.dumps(row), file=screen, flush=True)
        return
    into.add(row)
    print(line(row), file=screen, flush=True)


if __name__ == "__main__":
    sys.exit(main())
