"""Parallel text: reading it with errors that name the line, and batching it by length.

A batch holds sentences of similar length and at most ``max_tokens`` positions *including
padding*. The order is a function of the seed and the epoch alone, so training resumes at an exact
position.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .codec import Codec, PlainCodec, UnwritableTarget
from .errors import DataError
from .text import BOS, EOS, PAD, Vocabulary

BadPairs = Literal["error", "skip"]

_GZIP_MAGIC = b"\x1f\x8b"
_ADVICE = "correct the file, or skip such pairs (bad pairs: skip)"


def read_lines(path: str | Path, *, strict: bool = True) -> list[str]:
    """Read a UTF-8 text file, plain or gzip-compressed, without line ends.

    Lines end at ``\\n`` or ``\\r\\n`` and nowhere else (not at Unicode's other separators, which
    occur inside sentences). Compression is recognised by content. ``-`` is standard input.

    Args:
        path: The file.
        strict: Refuse bytes that are not UTF-8; else they stay, as ``surrogateescape`` has them.

    Raises:
        DataError: The file cannot be read or decompressed, or holds bytes that are not UTF-8; in
            that case the message names the line.
    """
    name = "<stdin>" if str(path) == "-" else str(path)
    with _naming_what_is_wrong(name):
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    try:
        text = data.decode("utf-8", "strict" if strict else "surrogateescape")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise DataError(
            f"{name}:{line}: not UTF-8: byte 0x{data[error.start]:02x} at position {column} of "
            "the line"
        ) from error
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def iterate_lines(stream: BufferedReader, name: str) -> Iterator[str]:
    """Read lines as they arrive, as ``read_lines`` with ``strict=False`` reads a file.

    Args:
        stream: Where from.
        name: What to call it in an error message.

    Raises:
        DataError: It cannot be read or decompressed.
    """
    mark = "\ufeff"
    with _naming_what_is_wrong(name):
        lines: Iterable[bytes] = stream
        if stream.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC):
            lines = gzip.GzipFile(fileobj=stream)
        for line in lines:
            text = line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
            yield text.removeprefix(mark)
            mark = ""


@contextlib.contextmanager
def _naming_what_is_wrong(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{name}: cannot read: {error.strerror or error}") from error


@dataclass(frozen=True)
class ParallelText:
    """Sentence pairs and where each came from.

    Attributes:
        source: Source sentences.
        target: Their translations.
        source_name: File of the source sentences, for messages.
        target_name: File of the translations, for messages.
        lines: Line number of each pair, from 1.
        skipped_empty: Pairs left out because a side was empty.
    """

    source: list[str]
    target: list[str]
    source_name: str
    target_name: str
    lines: list[int]
    skipped_empty: int = 0

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[str, str]], *, name: str = "pairs") -> ParallelText:
        """Wrap pairs that did not come from files."""
        return cls(
            [source for source, _ in pairs],
            [target for _, target in pairs],
            name,
            name,
            list(range(1, len(pairs) + 1)),
        )


def read_parallel(
    source_path: str | Path, target_path: str | Path, *, bad_pairs: BadPairs = "error"
) -> ParallelText:
    """Read two files whose lines are translations of each other.

    Args:
        source_path: One sentence a line, UTF-8, plain or gzip-compressed.
        target_path: The translations, line by line.
        bad_pairs: What to do when one side of a pair is empty: ``"error"`` or ``"skip"``.

    Raises:
        DataError: A file cannot be read, is not UTF-8 or has no line; the files differ in length;
            or a line is empty. The message names file and line.
    """
    source = read_lines(source_path)
    target = read_lines(target_path)
    if len(source) != len(target):
        shorter, longer = source_path, target_path
        if len(source) > len(target):
            shorter, longer = longer, shorter
        first_missing = min(len(source), len(target)) + 1
        raise DataError(
            f"{shorter}:{first_missing}: the file ends, but {longer} goes on: {source_path} has "
            f"{len(source)} lines and {target_path} {len(target)}; they must be translations line "
            "by line"
        )
    if not source:
        raise DataError(f"{source_path}: the file has no line")
    kept: list[int] = []
    for index, (source_line, target_line) in enumerate(zip(source, target, strict=True)):
        if source_line.strip() and target_line.strip():
            kept.append(index)
        elif bad_pairs == "error":
            path = target_path if source_line.strip() else source_path
            raise DataError(f"{path}:{index + 1}: the line is empty; {_ADVICE}")
    return ParallelText(
        [source[index] for index in kept],
        [target[index] for index in kept],
        str(source_path),
        str(target_path),
        [index + 1 for index in kept],
        len(source) - len(kept),
    )


class TokenSequences:
    """Token sequences of different length, end to end in one array.

    Args:
        sequences: The token ids of each sequence.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths = np.fromiter((len(ids) for ids in sequences), np.int64, len(sequences))
        self._ends = np.cumsum(self.lengths)
        self._starts = self._ends - self.lengths
        total = int(self.lengths.sum())
        self._tokens = np.fromiter((token for ids in sequences for token in ids), np.int32, total)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._tokens[self._starts[index] : self._ends[index]]

    def padded(self, indices: np.ndarray, *, first: int | None, last: int | None) -> np.ndarray:
        """Return the chosen sequences ``[B, L]``, int64, padded behind.

        Args:
            indices: ``[B]``, the sequences to take.
            first: An id to put before every sequence, or None.
            last: An id to put behind every sequence, or None.
        """
        offset = int(first is not None)
        lengths = self.lengths[indices]
        width = int(lengths.max(initial=0)) + offset + int(last is not None)
        out = np.full((len(indices), width), PAD, np.int64)
        for row, index in enumerate(indices):
            out[row, offset : offset + lengths[row]] = self[index]
        if first is not None:
            out[:, 0] = first
        if last is not None:
            out[np.arange(len(indices)), lengths + offset] = last
        return out

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed the content to a hash."""
        digest.update(self.lengths.tobytes())
        digest.update(self._tokens.tobytes())


@dataclass(frozen=True)
class Batch:
    """Sentence pairs as tensors, padded behind with id 0.

    Attributes:
        source: ``[B, S]`` int64, every sentence ended by the end-of-sentence id; or frames
            ``[B, S, F]`` fp32.
        source_lengths: ``[B]`` int64.
        target_input: ``[B, T]`` int64, what the decoder reads: beginning-of-sentence id first.
        target_output: ``[B, T]`` int64, what it shall say: end-of-sentence id last.
        target_lengths: ``[B]`` int64, of input and output alike.
        target_rows: ``[N]`` int64, the positions of ``target_output.flatten()`` that are not
            padding.
        target_tokens: N, as a plain number.
    """

    source: Tensor
    source_lengths: Tensor
    target_input: Tensor
    target_output: Tensor
    target_lengths: Tensor
    target_rows: Tensor
    target_tokens: int

    @property
    def is_unpadded(self) -> bool:
        """Whether every target position is a word."""
        return self.target_tokens == self.target_output.numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        if self.source.device == device:
            return self
        return Batch(
            self.source.to(device, non_blocking=True),
            self.source_lengths.to(device, non_blocking=True),
            self.target_input.to(device, non_blocking=True),
            self.target_output.to(device, non_blocking=True),
            self.target_lengths.to(device, non_blocking=True),
            self.target_rows.to(device, non_blocking=True),
            self.target_tokens,
        )


class Dataset(Protocol):
    """What training needs of data."""

    @property
    def source_lengths(self) -> np.ndarray:
        """``[N]``: positions of each source in a batch."""
        ...

    @property
    def target_lengths(self) -> np.ndarray:
        """``[N]``: positions of each target in a batch."""
        ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Return a hash of the content, to recognise the same data when training resumes."""
        ...

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the pairs with these indices as one padded batch."""
        ...


def make_batch(
    source: np.ndarray, source_lengths: np.ndarray, target: TokenSequences, indices: np.ndarray
) -> Batch:
    """Return a batch of padded sources, and of targets that get their special ids.

    Args:
        source: ``[B, S]`` or ``[B, S, F]``.
        source_lengths: ``[B]``.
        target: Token ids of all targets, without special ids.
        indices: ``[B]``: those to take.
    """
    target_output = target.padded(indices, first=None, last=EOS)
    target_lengths = target.lengths[indices] + 1
    taken = np.arange(target_output.shape[1]) < target_lengths[:, None]
    return Batch(
        torch.from_numpy(source),
        torch.from_numpy(source_lengths),
        torch.from_numpy(target.padded(indices, first=BOS, last=None)),
        torch.from_numpy(target_output),
        torch.from_numpy(target_lengths),
        torch.from_numpy(np.flatnonzero(taken)),
        int(target_lengths.sum()),
    )


class ParallelDataset:
    """Sentence pairs as token ids.

    Args:
        source: Token ids of the source sentences, without special ids.
        target: Token ids of the translations, without special ids.
        skipped_long: Pairs that were left out because a side was too long.
    """

    def __init__(
        self,
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        *,
        skipped_long: int = 0,
    ) -> None:
        if len(source) != len(target):
            raise ValueError(
                f"ParallelDataset: target must have as many sequences as source, {len(source)}, "
                f"got {len(target)}"
            )
        self.source = TokenSequences(source)
        self.target = TokenSequences(target)
        self.skipped_long = skipped_long

    @classmethod
    def encode(
        cls,
        text: ParallelText,
        source_vocabulary: Vocabulary,
        target_vocabulary: Vocabulary,
        *,
        max_length: int = 256,
        bad_pairs: BadPairs = "error",
    ) -> ParallelDataset:
        """Split sentence pairs into tokens.

        Args:
            text: The sentences.
            source_vocabulary: Splits the source side.
            target_vocabulary: Splits the target side.
            max_length: Most tokens a sentence may have.
            bad_pairs: What to do with a longer one: ``"error"`` or ``"skip"`` its pair.

        Raises:
            DataError: A sentence is too long (the message names file and line), or no pair is
                left.
        """
        codec = PlainCodec(source_vocabulary, target_vocabulary)
        return cls.encode_by(codec, text, max_length=max_length, bad_pairs=bad_pairs)

    @classmethod
    def encode_by(
        cls,
        codec: Codec,
        text: ParallelText,
        *,
        max_length: int = 256,
        bad_pairs: BadPairs = "error",
    ) -> ParallelDataset:
        """Turn sentence pairs into the tokens of a model that may copy.

        Args:
            codec: Makes them; see ``make_codec``.
            text: The sentences.
            max_length: See ``encode``.
            bad_pairs: See ``encode``.

        Raises:
            DataError: As ``encode``, or a target that a pointer network cannot write.
        """
        sources = codec.read(text.source)
        source = [each.ids for each in sources]
        try:
            target = codec.encode(text.target, sources)
        except UnwritableTarget as error:
            raise DataError(f"{text.target_name}:{text.lines[error.index]}: {error}") from error
        kept: list[int] = []
        for index in range(len(text)):
            if max(len(source[index]), len(target[index])) <= max_length:
                kept.append(index)
            elif bad_pairs == "error":
                name, ids = text.source_name, source[index]
                if len(ids) <= max_length:
                    name, ids = text.target_name, target[index]
                raise DataError(
                    f"{name}:{text.lines[index]}: the sentence has {len(ids)} tokens, over the "
                    f"limit of {max_length} (max length); {_ADVICE}, or raise the limit"
                )
        if not kept:
            raise DataError(
                f"{text.source_name}: no pair is left to use: {text.skipped_empty} had an empty "
                f"line and {len(text)} a sentence over {max_length} tokens"
            )
        return cls(
            [source[index] for index in kept],
            [target[index] for index in kept],
            skipped_long=len(text) - len(kept),
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def source_lengths(self) -> np.ndarray:
        """``[N]``, special id included."""
        return self.source.lengths + 1

    @property
    def target_lengths(self) -> np.ndarray:
        """``[N]``, special id included."""
        return self.target.lengths + 1

    def fingerprint(self) -> str:
        """Return a hash of the token ids, to recognise the same data when training resumes."""
        digest = hashlib.sha256()
        self.source.update_digest(digest)
        self.target.update_digest(digest)
        return digest.hexdigest()[:16]

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the pairs with these indices as one padded batch."""
        source = self.source.padded(indices, first=None, last=EOS)
        return make_batch(source, self.source_lengths[indices], self.target, indices)


class TokenBatches:
    """Divides a dataset into batches of similar length, anew each epoch.

    A batch of n pairs costs n × (longest sequence of either side, special id included) tokens,
    padding counted, and at most ``max_tokens``; a pair that alone costs more is a batch by
    itself. Pairs are shuffled, cut into pools, sorted by length within a pool and cut into
    batches, whose order is shuffled again. Pairs of equal length meet in different batches each
    epoch.

    Args:
        dataset: The pairs.
        max_tokens: Most tokens a batch, the longer side with padding.
        seed: With the epoch it determines everything.
        pool_size: Pairs sorted together. A pool as large as the data wastes least padding.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        max_tokens: int,
        seed: int,
        pool_size: int = 100_000,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"TokenBatches: max_tokens must be at least 1, got {max_tokens}")
        self._source_lengths = dataset.source_lengths
        self._target_lengths = dataset.target_lengths
        self._max_tokens = max_tokens
        self._seed = seed
        self._pool_size = pool_size

    def epoch(self, number: int) -> list[np.ndarray]:
        """Return the batches of an epoch, each an array of indices into the dataset."""
        random = np.random.Generator(np.random.Philox(key=[self._seed, number]))
        order = random.permutation(len(self._source_lengths))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), self._pool_size):
            batches.extend(self._cut(order[start : start + self._pool_size]))
        return [batches[index] for index in random.permutation(len(batches))]

    def in_order(self) -> list[np.ndarray]:
        """Return batches in order of length, the same each time, for evaluation."""
        return list(self._cut(np.arange(len(self._source_lengths))))

    def _cut(self, pool: np.ndarray) -> Iterator[np.ndarray]:
        longest = np.maximum(self._source_lengths, self._target_lengths)[pool]
        # lexsort is stable, so that the shuffle decides among pairs of equal lengths. The longer
        # side leads: it is what max_tokens limits.
        order = np.lexsort((self._target_lengths[pool], self._source_lengths[pool], longest))
        pool, longest = pool[order], longest[order]
        start = 0
        for stop in range(1, len(pool) + 1):
            # Sorted: the next pair is the longest of the batch it would join.
            if stop == len(pool) or (stop - start + 1) * longest[stop] > self._max_tokens:
                yield pool[start:stop]
                start = stop
