"""``python -m benchmarks.experiments.by_length``: BLEU of translations by the length of the source.

Reads what ``fused-attn evaluate --output`` wrote, of one model or several.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from fused_attn.training import corpus_bleu, read_lines

from . import _common


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--src", required=True, metavar="FILE", help="source sentences")
    parser.add_argument("--ref", required=True, metavar="FILE", help="reference translations")
    parser.add_argument(
        "--hypotheses", required=True, action="append", metavar="FILE", help="may be repeated"
    )
    parser.add_argument("--groups", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--tokenize", default="13a", help="sacreBLEU's; default: 13a")
    arguments = parser.parse_args(argv)
    sources, references = read_lines(arguments.src), read_lines(arguments.ref)
    files = {name: read_lines(name) for name in arguments.hypotheses}
    for name, lines in {arguments.ref: references, **files}.items():
        if len(lines) != len(sources):
            parser.error(
                f"{name}: must have {len(sources)} lines, as the sources, got {len(lines)}"
            )
    lengths = np.array([len(source.split()) for source in sources])
    rows = []
    for group in np.array_split(lengths.argsort(kind="stable"), arguments.groups):
        scores = [
            corpus_bleu(
                [lines[i] for i in group],
                [references[i] for i in group],
                tokenization=arguments.tokenize,
            ).score
            for lines in files.values()
        ]
        shortest, longest = lengths[group[0]], lengths[group[-1]]
        rows.append(
            (f"{shortest}–{longest}", str(len(group)), *(f"{score:.1f}" for score in scores))
        )
    _common.print_table(("words", "sentences", *files), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
