"""Training: text to batches, the objective, the loop, and checkpoints that resume exactly."""

from .checkpoint import (
    Vocabularies,
    average_weights,
    load_config,
    load_weights,
    save_checkpoint,
)
from .codec import Codec, make_codec
from .config import TrainingConfig
from .data import (
    Batch,
    Dataset,
    ParallelDataset,
    ParallelText,
    TokenBatches,
    read_lines,
    read_parallel,
)
from .errors import CheckpointError, DataError, InputError, MissingLibraryError
from .features import (
    FeatureDataset,
    FeatureSequences,
    FeatureText,
    read_feature_text,
    read_features,
)
from .kinds import build_model, model_fields
from .loop import Trainer, TrainingError, Validation, mean_loss
from .loss import (
    Losses,
    attention_coverage_loss,
    guided_attention_loss,
    training_losses,
    translation_loss,
)
from .metrics import Bleu, corpus_bleu, error_rate, exact_match
from .optimizer import InverseSquareRoot, build_optimizer
from .sampling import SamplingSchedule, mix_predictions
from .text import Vocabulary

__all__ = [
    "Batch",
    "Bleu",
    "CheckpointError",
    "Codec",
    "DataError",
    "Dataset",
    "FeatureDataset",
    "FeatureSequences",
    "FeatureText",
    "InputError",
    "InverseSquareRoot",
    "Losses",
    "MissingLibraryError",
    "ParallelDataset",
    "ParallelText",
    "SamplingSchedule",
    "TokenBatches",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "Validation",
    "Vocabularies",
    "Vocabulary",
    "attention_coverage_loss",
    "average_weights",
    "build_model",
    "build_optimizer",
    "corpus_bleu",
    "error_rate",
    "exact_match",
    "guided_attention_loss",
    "load_config",
    "load_weights",
    "make_codec",
    "mean_loss",
    "mix_predictions",
    "model_fields",
    "read_feature_text",
    "read_features",
    "read_lines",
    "read_parallel",
    "save_checkpoint",
    "training_losses",
    "translation_loss",
]
