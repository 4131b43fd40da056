"""A Transformer that has learned nothing, with vocabularies; its answers are quick and varied."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from fused_attn.models import Transformer, TransformerConfig
from fused_attn.training.checkpoint import Vocabularies, save_checkpoint
from fused_attn.training.text import BOS, PAD, UNK, Vocabulary

LETTERS = "abcdefghijkl"


def tiny_model(max_length: int = 64) -> tuple[Transformer, Vocabularies]:
    """Reads and writes letters; what it answers depends on each of them."""
    vocabulary = Vocabulary.train([LETTERS] * 4, 100, model_type="char", leading_space=False)
    torch.manual_seed(0)
    config = TransformerConfig(
        source_vocab_size=len(vocabulary),
        target_vocab_size=len(vocabulary),
        d_model=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=32,
        max_length=max_length,
        tie_embeddings="none",
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        # Tokens that are no letters are not said more often than by chance.
        model.output_weight[[PAD, BOS, UNK]] = 0.0
    return model, Vocabularies(vocabulary, vocabulary)


def save_tiny_model(path: Path) -> None:
    """As a checkpoint."""
    model, vocabularies = tiny_model()
    save_checkpoint(
        path,
        config=model.config.to_dict(),
        weights=model.state_dict(),
        vocabularies=vocabularies,
        step=1,
    )


def some_lines(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 12 letters, all different in their text."""
    generator = random.Random(seed)
    lines: dict[str, None] = {}
    while len(lines) < count:
        lines["".join(generator.choices(LETTERS, k=generator.randint(1, 12)))] = None
    return list(lines)
