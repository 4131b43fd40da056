"""Sentences in, sentences out: a model with its vocabularies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fused_attn.generation import BeamSearch, Constraints, Greedy, Result, Sampling, generate_each
from fused_attn.models import (
    QuantizedTransformer,
    RNNSeq2Seq,
    RNNSeq2SeqConfig,
    Transformer,
    TransformerConfig,
    quantize,
)

from ._read_ahead import Arrivals, arrivals
from .checkpoint import Vocabularies, find_model, load_config, load_vocabularies, load_weights
from .codec import Source, make_codec
from .errors import CheckpointError, InputError
from .kinds import build_model
from .text import EOS

Line = str | np.ndarray
"""A sentence, or the frames ``[S, F]`` of a model that reads frames."""

_NO_CONSTRAINTS = Constraints()

# Batches that may be read beyond the next line that comes out: enough that neighbours by length
# are alike, few enough that the next line does not wait for long.
_BATCHES_AHEAD = 8


class Candidate(NamedTuple):
    """One translation of a line."""

    text: str
    score: float
    """What the search ranks by."""


@dataclass(frozen=True)
class Translation:
    """What became of a line."""

    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    """Best first; samples in the order that they were drawn. None for an empty line."""
    error: str | None = None
    """Why there is no translation; None where there is one, or nothing to translate."""

    @property
    def text(self) -> str:
        """The first translation; empty where there is none."""
        return self.candidates[0].text if self.candidates else ""


class Translator:
    """Translates text, or frames, with a model.

    Args:
        model: The model, or an 8-bit copy of it.
        vocabularies: Those it was trained with.
        batch_size: Sentences decoded at a time. Default: 32 on a CPU, 128 on a GPU.

    Raises:
        ValueError: The model copies words, and its vocabularies differ.
    """

    def __init__(
        self,
        model: Transformer | QuantizedTransformer | RNNSeq2Seq,
        vocabularies: Vocabularies,
        *,
        batch_size: int | None = None,
    ) -> None:
        self.model = model
        self.vocabularies = vocabularies
        self._codec = make_codec(vocabularies, model.config)
        self._given_batch_size = batch_size

    @property
    def source_features(self) -> int:
        """F of a model that reads frames ``[S, F]``; 0 for one that reads sentences."""
        config = self.model.config
        return config.source_features if isinstance(config, RNNSeq2SeqConfig) else 0

    def translate(
        self,
        sentences: Sequence[Line],
        *,
        strategy: BeamSearch | Greedy | Sampling | None = None,
        constraints: Constraints = _NO_CONSTRAINTS,
        name: str = "sentences",
        progress: bool = False,
    ) -> list[str]:
        """Translate sentences, in their order; an empty sentence gives an empty one.

        They are decoded by length, the longest first, so that memory runs out at once or not at
        all.

        Args:
            sentences: The source text; arrays ``[S, F]`` for a model that reads frames.
            strategy: How translations are searched. Default: ``BeamSearch()``.
            constraints: What translations must obey.
            name: What to call the sentences in an error message, usually their file.
            progress: Show a progress bar on standard error.

        Raises:
            InputError: A sentence cannot be translated; the message names it.
        """
        found, sources = self._prepare(sentences, 0)
        sources.sort(key=_Job.length, reverse=True)
        _raise_first(found, name)
        bar = tqdm(total=len(sources), unit=" sentences", desc="translate", disable=not progress)
        with bar:
            for number, translation in self._decode(sources, strategy, constraints):
                found[number] = translation
                bar.update()
        _raise_first(found, name)
        return [found[number].text for number in range(len(sentences))]

    def translate_each(
        self,
        lines: Iterable[Line],
        *,
        strategy: BeamSearch | Greedy | Sampling | None = None,
        constraints: Constraints = _NO_CONSTRAINTS,
        read_ahead: int | None = None,
    ) -> Iterator[Translation]:
        """Translate a stream of lines, yielding each one's translation as soon as it is next.

        Lines are taken as they arrive: one that comes alone is translated at once; of many, those
        of similar length are decoded together, and their order is restored. A line that fails
        does not stop the others.

        Args:
            lines: The source text, or arrays ``[S, F]`` for a model that reads frames: a sequence,
                or anything that yields lines in its own time; that is read in another thread.
            strategy: How translations are searched. Default: ``BeamSearch()``. Samples depend on
                the seed, the line and its number alone.
            constraints: What translations must obey.
            read_ahead: How many lines from the next one on that comes out may be in work, at least
                2. Default: 8 batches.

        Yields:
            A translation for each line.

        Raises:
            ValueError: ``read_ahead`` or an option of the search is out of range.
            Exception: What reading the lines has ended with, after the translations of those that
                came before.
        """
        if read_ahead is None:
            read_ahead = _BATCHES_AHEAD * self._batch_size
        if read_ahead < 2:
            raise ValueError(f"translate_each: read_ahead must be at least 2, got {read_ahead}")
        if isinstance(strategy, Sampling) and strategy.seed is None:
            # How often the search begins anew depends on when lines arrive.
            strategy = dataclasses.replace(strategy, seed=int(torch.randint(2**62, ())))
        order = _Order()
        incoming = arrivals(lines, read_ahead // 2)
        try:
            while not incoming.have_ended:
                sources = self._sources(incoming, read_ahead // 2, order)
                for number, translation in self._decode(sources, strategy, constraints):
                    order.put({number: translation})
                    yield from order.ready()
                yield from order.ready()
            if incoming.error is not None:
                raise incoming.error
        finally:
            incoming.close()

    def _sources(self, incoming: Arrivals, most: int, order: _Order) -> Iterator[_Job]:
        """Sources of the lines that are there, of similar length one after the other.

        The first is waited for. It ends when no line is there, so that nothing in work waits for
        one to arrive; and when some of the lines before the last ``most`` are not out yet.
        """
        lines = incoming.take(most, wait=True)
        for longest_first in itertools.cycle((True, False)):
            first = incoming.count - len(lines)
            found, sources = self._prepare(lines, first)
            order.put(found)
            # Where the one window ends, the next begins.
            sources.sort(key=_Job.length, reverse=longest_first)
            yield from sources
            if order.next < first:
                return
            lines = incoming.take(most, wait=False)
            if not lines:
                return

    def _prepare(
        self, lines: Sequence[Line], first: int
    ) -> tuple[dict[int, Translation], list[_Job]]:
        """Lines from number ``first`` on: those that need no model, and the sources of the rest."""
        found: dict[int, Translation] = {}
        sources: list[_Job] = []
        read = self._read_frames if self.source_features else self._read_texts
        for number, source in enumerate(read(lines), first):
            if isinstance(source, Translation):
                found[number] = source
            else:
                sources.append(_Job(number, *source))
        return found, sources

    def _read_texts(self, lines: Sequence[Any]) -> Iterator[Translation | tuple[list[int], Source]]:
        """The tokens of each line with what they stand for, or what becomes of it without them."""
        errors = list(map(_why_no_text, lines))
        texts = ["" if error else line for line, error in zip(lines, errors, strict=True)]
        longest = self.model.max_length - 1
        for source, error in zip(self._codec.read(texts), errors, strict=True):
            size = len(source.ids)
            if error is None and size > longest:
                error = f"the sentence has {size} tokens, over the model's limit of {longest}"
            if error is not None or size == 0:
                yield Translation([], error)
            else:
                yield [*source.ids, EOS], source

    def _read_frames(self, lines: Sequence[Any]) -> Iterator[Translation | tuple[Tensor, Source]]:
        features, longest = self.source_features, self.model.max_length
        for frames in lines:
            error = None
            if frames.ndim != 2 or frames.shape[1] != features:
                shape = list(frames.shape)
                error = f"the source must have shape [S, F] with F = {features}, got {shape}"
            elif len(frames) > longest:
                error = f"the source has {len(frames)} frames, over the model's limit of {longest}"
            if error is not None or len(frames) == 0:
                yield Translation([], error)
            else:
                yield torch.from_numpy(frames).float(), Source([])

    def _decode(
        self,
        sources: Iterable[_Job],
        strategy: BeamSearch | Greedy | Sampling | None,
        constraints: Constraints,
    ) -> Iterator[tuple[int, Translation]]:
        """The number and the translation of each source, as they finish."""
        read: dict[int, Source] = {}

        def numbered() -> Iterator[tuple[int, list[int] | Tensor]]:
            for job in sources:
                read[job.number] = job.source
                yield job.number, job.positions

        model: Any = self.model
        was_training = model.training
        model.eval()
        try:
            for number, result in generate_each(
                model,
                numbered(),
                numbered=True,
                strategy=strategy,
                constraints=constraints,
                batch_size=self._batch_size,
                device=self._device,
            ):
                yield number, self._write(result, read.pop(number))
        finally:
            if was_training:
                model.train()

    def _write(self, result: Result, source: Source) -> Translation:
        texts = self._codec.decode([found.tokens for found in result.hypotheses], source)
        scores = [found.score for found in result.hypotheses]
        return Translation(list(map(Candidate, texts, scores)), result.error)

    @property
    def _device(self) -> torch.device:
        if isinstance(self.model, QuantizedTransformer):
            return torch.device("cpu")
        return next(self.model.parameters()).device

    @property
    def _batch_size(self) -> int:
        if self._given_batch_size is not None:
            return self._given_batch_size
        return 32 if self._device.type == "cpu" else 128


class _Job(NamedTuple):
    number: int
    """Of the line."""
    positions: list[int] | Tensor
    """Tokens, the end of the sentence included; or frames."""
    source: Source

    def length(self) -> int:
        return len(self.positions)


class _Order:
    """Translations that wait for those of earlier lines."""

    def __init__(self) -> None:
        self.next = 0
        """Number of the line that comes out next."""
        self._waiting: dict[int, Translation] = {}

    def put(self, found: dict[int, Translation]) -> None:
        self._waiting |= found

    def ready(self) -> Iterator[Translation]:
        while self.next in self._waiting:
            translation = self._waiting.pop(self.next)
            self.next += 1
            yield translation


def _why_no_text(line: str) -> str | None:
    """Why a line is no text; ``surrogateescape`` has put bytes that are not UTF-8 into it."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        code, position = ord(line[error.start]), len(line[: error.start].encode()) + 1
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code < 0xDD00 else f"surrogate {code:#x}"
        return f"not UTF-8: {what} at position {position} of the line"
    return None


def _raise_first(found: dict[int, Translation], name: str) -> None:
    for number in sorted(found):
        error = found[number].error
        if error is not None:
            raise InputError(f"{name}:{number + 1}: {error}")


def load_translator(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
    int8: bool = False,
) -> Translator:
    """Load a trained model with its vocabularies.

    Args:
        path: A checkpoint or the directory of a training run.
        device: Where to put the model.
        batch_size: See ``Translator``.
        int8: Decode with an 8-bit copy of the model, on a CPU.

    Raises:
        InputError: There can be no 8-bit copy.
        CheckpointError: There is no checkpoint, or it is damaged or of another kind of model.
    """
    checkpoint = find_model(path)
    fields, _ = load_config(checkpoint)
    try:
        model = build_model(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'config.json'}: {error}") from error
    vocabularies = load_vocabularies(checkpoint)
    _check_vocabularies(checkpoint, vocabularies, model.config)
    model.load_state_dict(load_weights(checkpoint, model.state_dict()))
    model = model.to(device).eval()
    if not int8:
        return Translator(model, vocabularies, batch_size=batch_size)
    if not isinstance(model, Transformer):
        raise InputError(f"{checkpoint}: an 8-bit copy can be made of a Transformer alone")
    try:
        return Translator(quantize(model), vocabularies, batch_size=batch_size)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error


def _check_vocabularies(
    checkpoint: Path, vocabularies: Vocabularies, config: TransformerConfig | RNNSeq2SeqConfig
) -> None:
    sizes = {"source": config.source_vocab_size, "target": config.target_vocab_size}
    if isinstance(config, RNNSeq2SeqConfig):
        if config.source_features:
            del sizes["source"]
        if config.output == "pointer":
            del sizes["target"]
    for side, size in sizes.items():
        vocabulary = getattr(vocabularies, side)
        if len(vocabulary) != size:
            raise CheckpointError(
                f"{checkpoint / side}.spm: vocabulary of another model: it has {len(vocabulary)} "
                f"ids and the model {size}"
            )
