"""``fused-attn train``: from two text files to a model that translates."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch

from fused_attn.generation import BeamSearch, Greedy
from fused_attn.models import RNNSeq2Seq, Transformer
from fused_attn.training.checkpoint import (
    CHECKPOINTS,
    Vocabularies,
    list_checkpoints,
    load_vocabularies,
)
from fused_attn.training.codec import make_codec
from fused_attn.training.config import TrainingConfig
from fused_attn.training.data import ParallelDataset, ParallelText, read_parallel
from fused_attn.training.errors import CheckpointError, InputError
from fused_attn.training.features import FeatureDataset, FeatureText, read_feature_text
from fused_attn.training.kinds import model_fields
from fused_attn.training.loop import Trainer, TrainingError, Validation
from fused_attn.training.sampling import Sampling
from fused_attn.training.text import Vocabulary
from fused_attn.training.translator import Line, Translator

from ._models import add_model_arguments, copies, make_model, settle_model_arguments
from ._text import add_device_arguments, positive, reads_frames, select_device

_DEFAULT_EPOCHS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.description = (
        "Train a Transformer or a recurrent model on parallel text, or a recurrent model on frames "
        "and text. DIR gets checkpoints, a log, and at the end 'model', which translate and "
        "evaluate find when given DIR."
    )
    _add_data_arguments(parser.add_argument_group("data"))
    _add_vocabulary_arguments(parser.add_argument_group("vocabulary"))
    add_model_arguments(parser)
    _add_training_arguments(parser.add_argument_group("training"))
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when training ended as it should, 1 when the loss became no number."""
    settle_model_arguments(arguments)
    config = _training_config(arguments)
    latest = _check_output(arguments)
    device = select_device(arguments)
    text = _read_pairs(arguments, arguments.src, arguments.tgt)
    held_out = _read_validation(arguments)
    if latest is not None:
        vocabularies = load_vocabularies(latest)
    else:
        vocabularies = _learn_vocabularies(arguments, text)
    torch.manual_seed(arguments.seed)
    model = _make_model(arguments, text, vocabularies).to(device)
    dataset = _encode(arguments, text, vocabularies, model)
    unit = "frames" if isinstance(dataset, FeatureDataset) else "source"
    _report(
        f"{len(dataset)} pairs ({text.skipped_empty} with an empty line and "
        f"{dataset.skipped_long} over {arguments.max_length} tokens skipped), "
        f"{int(dataset.source.lengths.sum())} {unit} and {int(dataset.target.lengths.sum())} "
        f"target tokens, vocabularies of {len(vocabularies.source)} and "
        f"{len(vocabularies.target)}"
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _report(f"{parameters:,} parameters on {device}, {torch.get_num_threads()} threads")
    trainer = Trainer(
        model,
        dataset,
        config,
        model_config=model_fields(model),
        vocabularies=vocabularies,
        directory=arguments.out,
        validation=_validation(arguments, held_out, model, vocabularies),
        progress=sys.stderr.isatty(),
    )
    if latest is not None:
        trainer.resume(latest)
        _report(f"resumed from {latest}")
    try:
        trainer.train()
    except TrainingError as error:
        print(f"fused-attn train: {error}", file=sys.stderr)
        return 1
    return 0


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--src",
        required=True,
        metavar="FILE",
        help="source sentences, UTF-8, plain or .gz; or an .npz file with the arrays features "
        "[N, F] and lengths, frames of all sources",
    )
    group.add_argument(
        "--tgt", required=True, metavar="FILE", help="their translations, line by line"
    )
    group.add_argument("--valid-src", metavar="FILE", help="held-out source sentences")
    group.add_argument("--valid-tgt", metavar="FILE", help="their translations")
    group.add_argument("--out", required=True, metavar="DIR", help="where everything is written")
    group.add_argument(
        "--resume", action="store_true", help="go on from the latest checkpoint in DIR"
    )
    group.add_argument(
        "--max-length",
        type=positive(int),
        default=256,
        metavar="N",
        help="most tokens in a sentence; default: 256",
    )
    group.add_argument(
        "--bad-pairs",
        choices=("error", "skip"),
        default="error",
        help="what to do about an empty line or a sentence over the limit; default: error",
    )


def _add_vocabulary_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--vocab-size", type=positive(int), default=8000, metavar="N", help="default: 8000"
    )
    group.add_argument(
        "--vocab-type",
        choices=("bpe", "unigram", "char", "word"),
        default="bpe",
        help="default: bpe",
    )
    group.add_argument(
        "--separate-vocab",
        action="store_true",
        help="one vocabulary a language, for languages of different scripts; default: one for both",
    )
    group.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        metavar="X",
        help="part of the characters that get an id; default: 1",
    )


def _add_training_arguments(group: argparse._ArgumentGroup) -> None:
    defaults = TrainingConfig(max_steps=1)
    group.add_argument("--steps", type=positive(int), metavar="N", help="most updates")
    group.add_argument(
        "--epochs",
        type=positive(int),
        metavar="N",
        help=f"most passes over the data; default, without another limit: {_DEFAULT_EPOCHS}",
    )
    group.add_argument(
        "--max-minutes", type=positive(float), metavar="M", help="stop after this time"
    )
    group.add_argument(
        "--patience",
        type=positive(int),
        metavar="N",
        help="stop after this many validations without a better score",
    )
    for option, kind, default, meaning in (
        ("--max-tokens", int, defaults.max_tokens, "tokens a batch, padding counted"),
        ("--accumulate", int, defaults.accumulate, "batches an update"),
        ("--lr", float, defaults.learning_rate, "peak learning rate"),
        ("--warmup", int, defaults.warmup_steps, "updates until the peak"),
        (
            "--cooldown",
            int,
            defaults.cooldown_steps,
            "last updates, of --steps, that end at rate 0",
        ),
        ("--clip-norm", float, defaults.clip_norm, "longest gradient; 0 does not clip"),
        ("--weight-decay", float, defaults.weight_decay, "of matrices"),
        ("--keep", int, defaults.keep_checkpoints, "latest checkpoints to keep"),
        ("--average", int, defaults.average, "latest checkpoints to average at the end"),
        ("--seed", int, defaults.seed, "of everything random"),
        ("--log-every", int, defaults.log_every, "updates between lines of the log"),
    ):
        group.add_argument(
            option, type=kind, default=default, metavar="X", help=f"{meaning}; default: {default}"
        )
    group.add_argument(
        "--checkpoint-every",
        type=positive(int),
        metavar="N",
        help="updates between checkpoints and validations; default: one an epoch",
    )
    group.add_argument(
        "--label-smoothing",
        type=float,
        metavar="X",
        help=f"0 to 1; default: {defaults.label_smoothing}, of a model that copies 0",
    )
    group.add_argument(
        "--sampling",
        choices=get_args(Sampling),
        default=defaults.sampling,
        help="how it becomes likelier that the decoder reads its own word instead of the "
        f"target's; default: {defaults.sampling}",
    )
    for option, kind, default, meaning in (
        ("--sampling-decay", float, defaults.sampling_decay, "updates in which, roughly"),
        ("--sampling-start", int, defaults.sampling_start, "updates without, at first"),
        ("--sampling-limit", float, defaults.sampling_limit, "highest probability"),
    ):
        group.add_argument(
            option, type=kind, default=default, metavar="X", help=f"{meaning}; default: {default:g}"
        )
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16 where it is safe")
    group.add_argument(
        "--valid-beam",
        type=int,
        default=1,
        metavar="K",
        help="beams of the translation scored in validation; 0 leaves BLEU out; default: 1",
    )
    group.add_argument(
        "--tokenize",
        choices=("13a", "zh", "char", "intl", "none"),
        default="13a",
        help="sacreBLEU's tokenisation in validation; zh for Chinese; default: 13a",
    )


def _training_config(arguments: argparse.Namespace) -> TrainingConfig:
    limited = arguments.steps or arguments.epochs or arguments.max_minutes
    is_rnn = arguments.model == "rnn"
    smoothing = arguments.label_smoothing
    if copies(arguments):
        if smoothing:
            raise InputError(
                f"--label-smoothing must be 0 with --output {arguments.output}, got {smoothing}"
            )
        smoothing = 0.0
    elif smoothing is None:
        smoothing = TrainingConfig.label_smoothing
    try:
        return TrainingConfig(
            learning_rate=arguments.lr,
            warmup_steps=arguments.warmup,
            cooldown_steps=arguments.cooldown,
            label_smoothing=smoothing,
            max_tokens=arguments.max_tokens,
            accumulate=arguments.accumulate,
            clip_norm=arguments.clip_norm,
            weight_decay=arguments.weight_decay,
            max_steps=arguments.steps,
            max_epochs=arguments.epochs if limited else _DEFAULT_EPOCHS,
            max_minutes=arguments.max_minutes,
            checkpoint_every=arguments.checkpoint_every,
            keep_checkpoints=max(arguments.keep, arguments.average),
            average=arguments.average,
            patience=arguments.patience,
            seed=arguments.seed,
            bf16=arguments.bf16,
            log_every=arguments.log_every,
            sampling=arguments.sampling,
            sampling_decay=arguments.sampling_decay,
            sampling_start=arguments.sampling_start,
            sampling_limit=arguments.sampling_limit,
            guided_attention=arguments.guided_attention if is_rnn else 0.0,
            coverage_loss=arguments.coverage_loss if is_rnn else 0.0,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _check_output(arguments: argparse.Namespace) -> Path | None:
    """Return the checkpoint to resume from, or None to start anew."""
    checkpoints = list_checkpoints(Path(arguments.out) / CHECKPOINTS)
    if not arguments.resume:
        if checkpoints:
            raise InputError(
                f"{arguments.out}: holds a training run already ({checkpoints[-1].name}): give "
                "--resume to go on with it, or another --out"
            )
        try:
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{arguments.out}: cannot create: {error.strerror}") from error
        return None
    if not checkpoints:
        raise CheckpointError(f"{arguments.out}: holds no checkpoint to resume from")
    return checkpoints[-1]


def _read_pairs(
    arguments: argparse.Namespace, source: str, target: str
) -> ParallelText | FeatureText:
    if not reads_frames(source):
        return read_parallel(source, target, bad_pairs=arguments.bad_pairs)
    if arguments.model != "rnn":
        raise InputError(f"{source}: frames need --model rnn, got {arguments.model}")
    return read_feature_text(source, target, bad_pairs=arguments.bad_pairs)


def _read_validation(arguments: argparse.Namespace) -> ParallelText | FeatureText | None:
    if arguments.valid_src is None and arguments.valid_tgt is None:
        if arguments.patience is not None:
            raise InputError("--patience needs --valid-src and --valid-tgt")
        return None
    if arguments.valid_src is None or arguments.valid_tgt is None:
        raise InputError("--valid-src and --valid-tgt go together")
    if reads_frames(arguments.valid_src) != reads_frames(arguments.src):
        raise InputError("--src and --valid-src must both be frames (.npz), or both text")
    return _read_pairs(arguments, arguments.valid_src, arguments.valid_tgt)


def _learn_vocabularies(
    arguments: argparse.Namespace, text: ParallelText | FeatureText
) -> Vocabularies:
    def learn(sentences: list[str]) -> Vocabulary:
        return Vocabulary.train(
            sentences,
            arguments.vocab_size,
            model_type=arguments.vocab_type,
            character_coverage=arguments.character_coverage,
        )

    if isinstance(text, FeatureText):
        targets = learn(text.target)
        return Vocabularies(targets, targets)
    if arguments.separate_vocab:
        if copies(arguments):
            raise InputError(
                f"--output {arguments.output} needs one vocabulary for both sides: leave out "
                "--separate-vocab"
            )
        return Vocabularies(learn(text.source), learn(text.target))
    joint = learn(text.source + text.target)
    return Vocabularies(joint, joint)


def _encode(
    arguments: argparse.Namespace,
    text: ParallelText | FeatureText,
    vocabularies: Vocabularies,
    model: Transformer | RNNSeq2Seq,
) -> ParallelDataset | FeatureDataset:
    options = {"max_length": arguments.max_length, "bad_pairs": arguments.bad_pairs}
    if isinstance(text, FeatureText):
        return FeatureDataset.encode(text, vocabularies.target, **options)
    return ParallelDataset.encode_by(make_codec(vocabularies, model.config), text, **options)


def _make_model(
    arguments: argparse.Namespace, text: ParallelText | FeatureText, vocabularies: Vocabularies
) -> Transformer | RNNSeq2Seq:
    # A translation may be longer than anything seen in training.
    max_length = max(1024, 2 * arguments.max_length)
    features = 0
    if isinstance(text, FeatureText):
        features = text.source.size
        max_length = max(max_length, 2 * int(text.source.lengths.max()))
    return make_model(arguments, vocabularies, source_features=features, max_length=max_length)


def _validation(
    arguments: argparse.Namespace,
    held_out: ParallelText | FeatureText | None,
    model: Transformer | RNNSeq2Seq,
    vocabularies: Vocabularies,
) -> Validation | None:
    if held_out is None:
        return None
    dataset = _encode(arguments, held_out, vocabularies, model)
    if arguments.valid_beam == 0:
        return Validation(dataset)
    translator = Translator(model, vocabularies)
    beams = arguments.valid_beam
    strategy = Greedy() if beams == 1 else BeamSearch(beam_size=beams)
    sources: list[Line] = [*held_out.source]
    return Validation(
        dataset,
        sources,
        held_out.target,
        lambda sentences: translator.translate(sentences, strategy=strategy),
        arguments.tokenize,
    )


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
