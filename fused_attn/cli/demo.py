"""``fused-attn demo``: train a small Transformer here, translate, and draw its attention."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.generation import BeamSearch
from fused_attn.models import Transformer, TransformerConfig
from fused_attn.training.checkpoint import Vocabularies
from fused_attn.training.config import TrainingConfig
from fused_attn.training.data import ParallelDataset, ParallelText
from fused_attn.training.errors import InputError, missing_library
from fused_attn.training.loop import Trainer
from fused_attn.training.metrics import exact_match
from fused_attn.training.synthetic import generate_pairs, romanize
from fused_attn.training.text import BOS, EOS, Vocabulary
from fused_attn.training.translator import Translator

REQUIRED_EXACT_MATCH = 0.95

_TRAINING_PAIRS = 60_000
_TEST_PAIRS = 500
_SHOWN = 10
_VOCABULARY_SENTENCES = 10_000
_STRATEGY = BeamSearch(beam_size=4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.description = (
        "Train a small Transformer on generated English-Chinese sentences with numbers, dates and "
        "times in words, translate sentences it has not seen with beam search, compare them with "
        "the only right translation, and draw where the model looks. Exits with 1 when fewer than "
        f"{REQUIRED_EXACT_MATCH:.0%} of the sentences are exactly right."
    )
    parser.add_argument("--out", default="demo_output", metavar="DIR", help="default: demo_output")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--updates", type=int, default=1600, metavar="N", help="most updates; default: 1600"
    )
    parser.add_argument(
        "--max-minutes", type=float, default=3.5, metavar="M", help="of training; default: 3.5"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all cores")


def run(arguments: argparse.Namespace) -> int:
    """Train, translate and draw; 0 when enough translations are exactly right, else 1."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    pairs = generate_pairs(_TRAINING_PAIRS + _TEST_PAIRS, seed=arguments.seed)
    training, test = pairs[:-_TEST_PAIRS], pairs[-_TEST_PAIRS:]
    vocabularies = _learn_vocabularies(training)
    model = _build_model(vocabularies)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Training {parameters:,} parameters on {len(training):,} generated sentence pairs, none "
        f"of them among the {len(test)} test pairs …",
        flush=True,
    )
    started = time.perf_counter()
    trainer = _train(model, training, vocabularies, arguments)
    minutes = (time.perf_counter() - started) / 60
    print(
        f"{trainer.progress.step} updates in {minutes:.1f} minutes. Translating with "
        f"{_STRATEGY.beam_size} beams"
    )
    translator = Translator(model, vocabularies)
    outputs = translator.translate(
        [source for source, _ in test], strategy=_STRATEGY, progress=sys.stderr.isatty()
    )
    references = [reference for _, reference in test]
    for (source, reference), output in list(zip(test, outputs, strict=True))[:_SHOWN]:
        print(f"\n  source     {source}\n  output     {output}\n  reference  {reference}")
    exact = exact_match(outputs, references)
    print(f"\nexact match: {exact:.1%} of {len(test)} held-out sentences")
    picture = Path(arguments.out) / "attention.png"
    draw_attention(translator, _picturesque(test, outputs), picture)
    print(f"attention heat map: {picture}")
    if exact < REQUIRED_EXACT_MATCH:
        print(f"fewer than {REQUIRED_EXACT_MATCH:.0%} are exactly right", file=sys.stderr)
        return 1
    return 0


def draw_attention(translator: Translator, source: str, path: Path) -> None:
    """Draw where each character of a translation looks in its source, as a PNG.

    Chinese is labelled in pinyin: a fresh machine has no Chinese font.

    Args:
        translator: The model with its vocabularies.
        source: The sentence.
        path: The file to write.

    Raises:
        MissingLibraryError: Matplotlib is not installed.
        InputError: The file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise missing_library("matplotlib", "the attention heat map", "dev") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    heat = _attention(translator, source)
    height, width = heat.weights.shape
    figure, axes = pyplot.subplots(
        figsize=(2.0 + 0.42 * width, 1.8 + 0.36 * height), layout="constrained"
    )
    image = axes.imshow(heat.weights.numpy(), cmap="magma", vmin=0.0, aspect="auto")
    axes.set_xticks(range(width), heat.columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(height), heat.rows)
    axes.set_xlabel("source: English subwords")
    axes.set_ylabel("translation: Chinese characters, in pinyin")
    axes.set_title("Cross-attention of the last decoder layer, mean of its heads", fontsize=11)
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from error
    finally:
        pyplot.close(figure)


class _Heat(NamedTuple):
    weights: Tensor
    """``[T, S]``."""
    rows: list[str]
    columns: list[str]


def _attention(translator: Translator, source: str) -> _Heat:
    vocabularies, model = translator.vocabularies, translator.model
    (source_ids,) = vocabularies.source.encode([source])
    (target,) = translator.translate([source], strategy=_STRATEGY)
    (target_ids,) = vocabularies.target.encode([target])
    model.eval()
    weights = model.align(torch.tensor([[*source_ids, EOS]]), torch.tensor([[BOS, *target_ids]]))
    pieces = vocabularies.source.pieces(source_ids)
    columns = [piece.replace("\u2581", " ").strip() or "␣" for piece in pieces]
    rows = [romanize(piece) for piece in vocabularies.target.pieces(target_ids)]
    # The row that reads a word predicts the next: it is labelled by what it predicts.
    return _Heat(weights[0], [*rows, "(end)"], [*columns, "(end)"])


def _learn_vocabularies(pairs: list[tuple[str, str]]) -> Vocabularies:
    sample = pairs[:_VOCABULARY_SENTENCES]
    return Vocabularies(
        Vocabulary.train([source for source, _ in sample], 400),
        Vocabulary.train(
            [target for _, target in sample], 200, model_type="char", leading_space=False
        ),
    )


def _build_model(vocabularies: Vocabularies) -> Transformer:
    return Transformer(
        TransformerConfig(
            source_vocab_size=len(vocabularies.source),
            target_vocab_size=len(vocabularies.target),
            d_model=128,
            num_heads=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            dim_feedforward=256,
            # The sentences are all different: there is nothing to learn by heart.
            dropout=0.0,
            norm_first=True,
            tie_embeddings="output",
        )
    )


def _train(
    model: Transformer,
    pairs: list[tuple[str, str]],
    vocabularies: Vocabularies,
    arguments: argparse.Namespace,
) -> Trainer:
    dataset = ParallelDataset.encode(
        ParallelText.from_pairs(pairs), vocabularies.source, vocabularies.target
    )
    trainer = Trainer(
        model,
        dataset,
        TrainingConfig(
            learning_rate=2.5e-3,
            warmup_steps=150,
            label_smoothing=0.0,
            max_tokens=1024,
            # Half of the training is spent on settling: it is worth more here than large steps.
            cooldown_steps=arguments.updates // 2,
            max_steps=arguments.updates,
            max_minutes=arguments.max_minutes,
            log_every=100,
            seed=arguments.seed,
        ),
        model_config=model.config.to_dict(),
        vocabularies=vocabularies,
        directory=Path(arguments.out) / "run",
        progress=sys.stderr.isatty(),
    )
    trainer.train()
    return trainer


def _picturesque(test: list[tuple[str, str]], outputs: list[str]) -> str:
    """Return the sentence to draw: with a date and a time, rightly translated if there is one."""

    def rank(index: int) -> tuple[bool, bool, int]:
        source, reference = test[index]
        return "film" in source, outputs[index] == reference, -len(source)

    return test[max(range(len(test)), key=rank)][0]
