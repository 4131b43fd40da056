"""Training: text to batches, the objective, the loop, and checkpoints that resume exactly."""

from .checkpoint import (
    Vocabularies,
    average_weights,
    load_config,
    load_weights,
    save_checkpoint,
)
from .config import TrainingConfig
from .data import Batch, ParallelDataset, ParallelText, TokenBatches, read_lines, read_parallel
from .errors import CheckpointError, DataError, InputError, MissingLibraryError
from .loop import Trainer, TrainingError, Validation, mean_loss
from .loss import translation_loss
from .metrics import Bleu, corpus_bleu, exact_match
from .optimizer import InverseSquareRoot, build_optimizer
from .text import Vocabulary

__all__ = [
    "Batch",
    "Bleu",
    "CheckpointError",
    "DataError",
    "InputError",
    "InverseSquareRoot",
    "MissingLibraryError",
    "ParallelDataset",
    "ParallelText",
    "TokenBatches",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "Validation",
    "Vocabularies",
    "Vocabulary",
    "average_weights",
    "build_optimizer",
    "corpus_bleu",
    "exact_match",
    "load_config",
    "load_weights",
    "mean_loss",
    "read_lines",
    "read_parallel",
    "save_checkpoint",
    "translation_loss",
]
