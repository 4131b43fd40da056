"""``python -m benchmarks.gpu``: everything that needs a GPU, in ten minutes and without a network.

For a machine that is at hand only for minutes. The stages run in order, whatever becomes of each:

1. ``build``: the extension for this GPU's architecture, and the compiler's report on each kernel.
2. ``validate``: every op, backend and case against the fp64 oracle, in as many processes as there
   are cores; the benchmark cases too, whose peers are compiled here, side by side.
3. ``operators``: times of every op beside its peers, one process, alone on the GPU.
4. ``models``: `benchmarks.models`.
5. ``profile``: `benchmarks.profile`.
6. ``tests``: pytest, those that need a GPU, but for what ``validate`` has done.
7. ``sanitizer``, beside ``tests``: compute-sanitizer's memcheck and racecheck on a case of each op,
   where it is installed.

A stage's share of the time is in `stages.SECONDS`; what one leaves over, the next ones have. They
sum to 570 seconds, so that a command of ten minutes ends by itself and its results are kept. The
build and the first look at correctness come first, since nothing else means much without them; what
can be cut off at any point without losing what it has found, ``operators`` and ``tests``, may be.
Compiling takes most of the time: the extension some eight minutes of a core, Triton's kernels and
the peers of ``torch.compile`` more. So that is done on all cores, in ``validate``, and the caches
on disk serve ``operators``, which must be alone, and ``tests``. ``tests`` and ``sanitizer`` are
last: they find mistakes of rarer kinds, and have minutes in a second command (``--resume``).

Results are rows of `benchmarks.results`, written as they come: a crash or a hanging kernel is a row
with its error and costs that case, or that stage. All else that is printed is in one log beside.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fused_attn.validation import OPS

from .. import results
from ..results import Row
from .processes import Log, end_all
from .session import Session
from .stages import STAGES, TOTAL_SECONDS, run_stages
from .summary import summary


def _stages(text: Sequence[str]) -> list[str]:
    """Names separated by commas or spaces, in the order of the stages.

    Raises:
        ValueError: There is no stage of that name.
    """
    names = [name for part in text for name in part.split(",") if name]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise ValueError(f"--stages: expected some of {', '.join(STAGES)}, got {', '.join(text)}")
    return [name for name in STAGES if name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when all of them passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stages", nargs="+", default=list(STAGES), help=",".join(STAGES))
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse without a GPU"
    )
    parser.add_argument(
        "--out", type=Path, help="folder; default: $OUT, or benchmarks/results/<device>/"
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all (570)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="ordinary cases in one dtype, two benchmarks of each op",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on where results end: those of FILE, or the file that would be written",
    )
    parser.add_argument("--retry-failed", action="store_true", help="--resume: failures once more")
    arguments = parser.parse_args(argv)
    try:
        names = _stages(arguments.stages)
    except ValueError as error:
        parser.error(str(error))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        print(f"no CUDA GPU here ({why}); --device cpu rehearses the run", file=sys.stderr)
        return 2
    # The children are in sessions of their own and would outlive a plain termination.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    machine = results.describe(arguments.device)
    folder = arguments.out or Path(os.environ.get("OUT") or results.FOLDER / machine["folder"])
    path = folder / results.file_name(machine)
    known: list[Row] = []
    if arguments.resume is not None:
        before = Path(arguments.resume or path)
        if arguments.resume or path.exists():
            try:
                earlier = results.read(before)
            except (OSError, ValueError) as error:
                parser.error(f"--resume: {error}")
            if earlier.machine["commit"] != machine["commit"]:
                parser.error(f"--resume: {before} is of commit {earlier.machine['commit']}")
            known = earlier.rows
            if before.resolve() != path.resolve():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(before, path)
    log = Log(path.with_suffix(".log"))
    print(f"{machine['name']}, torch {machine['torch']}, triton {machine['triton']}: {path}")
    with results.Writer(path, machine) as writer:
        session = Session(arguments, writer, log, known)
        try:
            failures = run_stages(session, names, arguments.seconds)
        finally:
            end_all()
            log.close()
    print("\n" + "\n".join(summary(session)))
    took = time.monotonic() - started
    print(f"{len(names) - failures} stages passed, {failures} not, {took:.0f} s: {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
