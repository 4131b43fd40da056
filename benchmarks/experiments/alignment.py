"""``python -m benchmarks.experiments.alignment``: where a trained model looks, as a picture.

Sentences are translated with beam search; each token of a translation is a row, each position of
its source a column. What the model copies from outside its vocabulary is marked by a star.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_attn.generation import BeamSearch, generate
from fused_attn.models import RNNSeq2SeqConfig
from fused_attn.training import InputError, make_codec, read_features
from fused_attn.training.codec import Source
from fused_attn.training.text import EOS
from fused_attn.training.translator import Translator, load_translator


class Heat(NamedTuple):
    """What is drawn."""

    weights: Tensor
    """``[T, S]``."""
    rows: list[str]
    columns: list[str] | None
    """None for frames."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="a training run's --out")
    parser.add_argument(
        "--sentence", action="append", default=[], metavar="TEXT", help="may be repeated"
    )
    parser.add_argument("--frames", metavar="FILE", help=".npz, for a model that reads frames")
    parser.add_argument(
        "--index", type=int, action="append", metavar="N", help="which of --frames; default: 0"
    )
    parser.add_argument("--beam", type=int, default=4, metavar="K", help="default: 4")
    parser.add_argument(
        "--output",
        default="alignment.png",
        metavar="FILE",
        help=".png or .svg; default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    translator = load_translator(arguments.model)
    sources: list[str | np.ndarray] = list(arguments.sentence)
    if arguments.frames is not None:
        recordings = read_features(arguments.frames)
        sources += [recordings[index] for index in arguments.index or [0]]
    if not sources:
        parser.error("give --sentence or --frames")
    heats = [attend(translator, source, arguments.beam) for source in sources]
    draw(heats, Path(arguments.output))
    for heat in heats:
        print(" ".join(heat.rows))
    print(arguments.output)
    return 0


def attend(translator: Translator, line: str | np.ndarray, beam_size: int) -> Heat:
    """Translate a source and return where the model looked.

    Raises:
        InputError: There is no translation.
    """
    codec = make_codec(translator.vocabularies, translator.model.config)
    columns: list[str] | None = None
    if isinstance(line, str):
        [read] = codec.read([line])
        source = torch.tensor([*read.ids, EOS])
        [pieces] = translator.vocabularies.source.split([line])
        columns = [*(_spell(translator, piece) for piece in pieces), "(end)"]
    else:
        read, source = Source([]), torch.from_numpy(line).float()
    model: Any = translator.model
    [result] = generate(
        model, source[None], strategy=BeamSearch(beam_size=beam_size), alignments=True
    )
    if result.error is not None:
        raise InputError(result.error)
    best = result.best
    V = model.config.target_vocab_size
    copies = isinstance(model.config, RNNSeq2SeqConfig) and model.config.extra_tokens > 0
    rows = []
    for token in best.tokens:
        [text] = codec.decode([[token]], read)
        rows.append(f"{text} *" if copies and token >= V else text or "␣")
    assert best.alignment is not None
    return Heat(best.alignment, [*rows, "(end)"][: len(best.alignment)], columns)


def draw(heats: Sequence[Heat], path: Path) -> None:
    """Draw maps side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [(_width(heat), 1.8 + 0.3 * len(heat.rows)) for heat in heats]
    figure, row = pyplot.subplots(
        1,
        len(heats),
        figsize=(sum(width for width, _ in sizes), max(height for _, height in sizes)),
        width_ratios=[width for width, _ in sizes],
        layout="constrained",
        squeeze=False,
    )
    image = None
    largest = max(float(heat.weights.max()) for heat in heats)
    for axes, heat in zip(row[0], heats, strict=True):
        weights = heat.weights.numpy()
        image = axes.imshow(weights, cmap="magma", vmin=0.0, vmax=largest, aspect="auto")
        if heat.columns is None:
            axes.set_xlabel("source: positions that the encoder made of its frames")
        else:
            axes.set_xticks(
                range(len(heat.columns)),
                heat.columns,
                rotation=60,
                ha="right",
                rotation_mode="anchor",
            )
            axes.set_xlabel("source")
        axes.set_yticks(range(len(heat.rows)), heat.rows)
        axes.set_ylabel("translation")
    assert image is not None
    figure.colorbar(image, ax=row[0], label="attention weight", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _width(heat: Heat) -> float:
    if heat.columns is None:
        return 2.0 + 0.08 * heat.weights.size(1)
    return 2.0 + 0.4 * len(heat.columns)


def _spell(translator: Translator, piece: int | str) -> str:
    if isinstance(piece, int):
        [piece] = translator.vocabularies.source.pieces([piece])
    return piece.replace("\u2581", " ").strip() or "␣"


if __name__ == "__main__":
    sys.exit(main())
