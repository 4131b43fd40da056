"""How large the models are that are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A Transformer, an RNN, and what they are given."""

    suffix: str
    """Of the models' names in rows, so that figures of different sizes are never compared."""
    layers: int
    """Of the Transformer's encoder and decoder each."""
    d_model: int
    heads: int
    feedforward: int
    vocabulary: int
    sentences: int
    """In a batch of training; on a GPU four times as many."""
    length: int
    """Of the longest sentence in training; on a GPU twice that."""
    tokens: int
    """Of a source to translate, and generated for it."""
    batches: tuple[int, ...]
    """Sentences translated at a time on a CPU, the most telling first."""
    gpu_batches: tuple[int, ...]
    hidden: int
    """Of the RNN's states and embeddings."""
    rnn_layers: int
    rnn_vocabulary: int
    recurrent: tuple[tuple[int, int], ...]
    """Batch and length of recurrent layers alone."""
    variants: bool
    """Also other forms of the same models: pre-norm, GRU, layers of two directions."""

    def batches_on(self, device: str) -> tuple[int, ...]:
        """Sentences translated at a time."""
        return self.gpu_batches if device == "cuda" else self.batches


BASE = Size(
    suffix="",
    layers=6,
    d_model=512,
    heads=8,
    feedforward=2048,
    vocabulary=32000,
    sentences=16,
    length=64,
    tokens=32,
    batches=(8, 1, 32),
    gpu_batches=(32, 1, 128, 8),
    hidden=512,
    rnn_layers=2,
    rnn_vocabulary=8000,
    recurrent=((64, 64), (32, 16), (64, 32)),
    variants=True,
)
"""Transformer-base (Vaswani et al., 2017), and an LSTM of the same width."""

SMALL = Size(
    suffix="_small",
    layers=2,
    d_model=512,
    heads=8,
    feedforward=2048,
    vocabulary=8000,
    sentences=8,
    length=32,
    tokens=16,
    batches=(8, 1),
    gpu_batches=(8, 1),
    hidden=512,
    rnn_layers=1,
    rnn_vocabulary=4000,
    recurrent=((32, 16),),
    variants=False,
)
"""A minute on two cores."""

TINY = Size(
    suffix="_tiny",
    layers=1,
    d_model=32,
    heads=2,
    feedforward=64,
    vocabulary=200,
    sentences=4,
    length=12,
    tokens=5,
    batches=(2,),
    gpu_batches=(2,),
    hidden=32,
    rnn_layers=1,
    rnn_vocabulary=100,
    recurrent=((3, 5),),
    variants=False,
)
"""Seconds, to see that it runs: its figures mean nothing."""

SIZES = {"base": BASE, "small": SMALL, "tiny": TINY}
