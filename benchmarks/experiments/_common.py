"""What the experiments share: limits, training with its log printed, a table of results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig
from fused_attn.training import (
    Dataset,
    Trainer,
    TrainingConfig,
    Validation,
    Vocabularies,
    model_fields,
)


def add_arguments(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """The options that all experiments have.

    Args:
        parser: Of the experiment.
        steps: Default of ``--steps``.
    """
    parser.add_argument(
        "--steps", type=int, default=steps, metavar="N", help=f"updates a model; default: {steps}"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="most minutes of training, all models together"
    )
    parser.add_argument("--hidden", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--lr", type=float, default=4e-3, metavar="X", help="default: 4e-3")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all cores")
    parser.add_argument("--out", metavar="DIR", help="keep each model in a directory in DIR")
    parser.add_argument("--device", default="cpu", help="default: cpu")


def select_forms(parser: argparse.ArgumentParser, forms: Sequence[str]) -> None:
    """An option to run some of an experiment's models."""
    parser.add_argument(
        "--form",
        action="append",
        choices=tuple(forms),
        help="one of the models; may be repeated; default: all",
    )


def train(
    name: str,
    config: RNNSeq2SeqConfig,
    vocabularies: Vocabularies,
    dataset: Dataset,
    held_out: Dataset,
    arguments: argparse.Namespace,
    *,
    models: int = 1,
    **settings: Any,
) -> tuple[RNNSeq2Seq, float]:
    """Train a model, with its log printed.

    Args:
        name: Of the model, before each line.
        config: Of the model.
        vocabularies: Likewise.
        dataset: What it learns from.
        held_out: What its loss is told of, at the end.
        arguments: Those of ``add_arguments``.
        models: How many share ``--minutes``.
        settings: Of ``TrainingConfig``.

    Returns:
        The model, in evaluation mode, and its loss.
    """
    torch.manual_seed(arguments.seed)
    model = RNNSeq2Seq(config).to(arguments.device)
    trainer = Trainer(
        model,
        dataset,
        TrainingConfig(
            learning_rate=arguments.lr,
            warmup_steps=arguments.steps // 10,
            cooldown_steps=arguments.steps // 3,
            max_steps=arguments.steps,
            max_minutes=None if arguments.minutes is None else arguments.minutes / models,
            checkpoint_every=arguments.steps,
            log_every=max(1, arguments.steps // 10),
            label_smoothing=0.0,
            seed=arguments.seed,
            **settings,
        ),
        model_config=model_fields(model),
        vocabularies=vocabularies,
        directory=None if arguments.out is None else Path(arguments.out) / name.replace(", ", "-"),
        validation=Validation(held_out),
        report=lambda line: print(f"{name:<18} {line}", flush=True),
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name:<18} {parameters:,} parameters, {torch.get_num_threads()} threads", flush=True)
    trainer.train()
    return model.eval(), -trainer.progress.best


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Results, in Markdown."""
    print()
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |")
