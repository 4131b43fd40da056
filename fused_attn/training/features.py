"""Sources that are frames instead of words: what a microphone or another sensor gives.

In a file they are one array: ``features``, ``[N, F]`` fp32, the frames of all sources one after
the other, and ``lengths``, ``[B]``, how many of them each source has (``numpy.savez``).
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data import BadPairs, Batch, TokenSequences, make_batch, read_lines
from .errors import DataError
from .text import Vocabulary


class FeatureSequences:
    """Frames of several sources, end to end in one array.

    Args:
        frames: ``[N, F]`` floating point; kept in fp32.
        lengths: ``[B]`` integers that sum to N: the frames of each source.

    Raises:
        ValueError: The shapes disagree, or a length is negative.
    """

    def __init__(self, frames: np.ndarray, lengths: np.ndarray) -> None:
        if frames.ndim != 2 or frames.dtype.kind != "f":
            raise ValueError(
                "FeatureSequences: frames must be floating point of shape [N, F], got "
                f"{frames.dtype} of {list(frames.shape)}"
            )
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 0).any():
            raise ValueError(
                "FeatureSequences: lengths must be integers of shape [B], none negative, got "
                f"{lengths.dtype} of {list(lengths.shape)}"
            )
        if lengths.sum() != len(frames):
            raise ValueError(
                f"FeatureSequences: lengths must sum to N = {len(frames)} (from frames), got "
                f"{lengths.sum()}"
            )
        self.frames = np.ascontiguousarray(frames, dtype=np.float32)
        self.lengths = lengths.astype(np.int64)
        self._ends = np.cumsum(self.lengths)

    @classmethod
    def from_list(cls, sequences: Sequence[np.ndarray]) -> FeatureSequences:
        """Join sources ``[S, F]``, at least one."""
        return cls(np.concatenate(sequences), np.array([len(frames) for frames in sequences]))

    def take(self, indices: Sequence[int]) -> FeatureSequences:
        """Return some of the sources."""
        frames = [self.frames[:0], *(self[index] for index in indices)]
        return FeatureSequences(np.concatenate(frames), self.lengths[np.asarray(indices, int)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the frames ``[S, F]`` of a source."""
        end = self._ends[index]
        return self.frames[end - self.lengths[index] : end]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def size(self) -> int:
        """F."""
        return int(self.frames.shape[1])

    def padded(self, indices: np.ndarray) -> np.ndarray:
        """Return the chosen sources ``[B, S, F]``, with zeros behind."""
        width = int(self.lengths[indices].max(initial=0))
        out = np.zeros((len(indices), width, self.size), np.float32)
        for row, index in enumerate(indices):
            frames = self[index]
            out[row, : len(frames)] = frames
        return out

    def save(self, path: str | Path) -> None:
        """Write a file that ``read_features`` reads."""
        np.savez(path, features=self.frames, lengths=self.lengths)


def read_features(path: str | Path) -> FeatureSequences:
    """Read sources of frames from an ``.npz`` file.

    Raises:
        DataError: The file cannot be read, lacks an array, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in ("features", "lengths"):
                if name not in arrays:
                    raise DataError(f"{path}: has no array {name!r}")
            return FeatureSequences(arrays["features"], arrays["lengths"])
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not an .npz file: {error}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


@dataclass(frozen=True)
class FeatureText:
    """Sources of frames with their targets, and where each came from.

    Attributes:
        source: The sources.
        target: A sentence for each.
        source_name: File of the sources, for messages.
        target_name: File of the sentences, for messages.
        lines: Line number of each pair, from 1.
        skipped_empty: Pairs left out because a side was empty.
    """

    source: FeatureSequences
    target: list[str]
    source_name: str
    target_name: str
    lines: list[int]
    skipped_empty: int = 0

    def __len__(self) -> int:
        return len(self.target)


def read_feature_text(
    source_path: str | Path, target_path: str | Path, *, bad_pairs: BadPairs = "error"
) -> FeatureText:
    """Read sources of frames and a file with a sentence for each.

    Args:
        source_path: See ``read_features``.
        target_path: One sentence a line, UTF-8, plain or gzip-compressed.
        bad_pairs: What to do when one side of a pair is empty: ``"error"`` or ``"skip"``.

    Raises:
        DataError: A file cannot be read; they differ in number; or a side is empty. The message
            names file and line.
    """
    source = read_features(source_path)
    target = read_lines(target_path)
    if len(source) != len(target):
        raise DataError(
            f"{source_path}: has {len(source)} sources and {target_path} {len(target)} lines; "
            "there must be a line for each source"
        )
    if not target:
        raise DataError(f"{target_path}: the file has no line")
    kept: list[int] = []
    for index, line in enumerate(target):
        if line.strip() and source.lengths[index] > 0:
            kept.append(index)
        elif bad_pairs == "error":
            what = f"{source_path}: source {index + 1} has no frame"
            if not line.strip():
                what = f"{target_path}:{index + 1}: the line is empty"
            raise DataError(f"{what}; correct the file, or skip such pairs (bad pairs: skip)")
    return FeatureText(
        source.take(kept),
        [target[index] for index in kept],
        str(source_path),
        str(target_path),
        [index + 1 for index in kept],
        len(target) - len(kept),
    )


class FeatureDataset:
    """Sources of frames with targets of tokens.

    Args:
        source: The sources.
        target: Token ids of the targets, without special ids.
        skipped_long: Pairs that were left out because the target was too long.

    Raises:
        ValueError: There are not as many of both.
    """

    def __init__(
        self,
        source: FeatureSequences,
        target: Sequence[Sequence[int]],
        *,
        skipped_long: int = 0,
    ) -> None:
        if len(source) != len(target):
            raise ValueError(
                f"FeatureDataset: target must have as many sequences as source, {len(source)}, "
                f"got {len(target)}"
            )
        self.source = source
        self.target = TokenSequences(target)
        self.skipped_long = skipped_long

    @classmethod
    def encode(
        cls,
        text: FeatureText,
        vocabulary: Vocabulary,
        *,
        max_length: int = 256,
        bad_pairs: BadPairs = "error",
    ) -> FeatureDataset:
        """Split targets into tokens.

        Args:
            text: The pairs.
            vocabulary: Splits targets.
            max_length: Most tokens a target may have.
            bad_pairs: What to do with a longer one: ``"error"`` or ``"skip"`` its pair.

        Raises:
            DataError: A target is too long, or no pair is left.
        """
        target = vocabulary.encode(text.target)
        kept = [index for index, ids in enumerate(target) if len(ids) <= max_length]
        if bad_pairs == "error":
            for index, ids in enumerate(target):
                if len(ids) > max_length:
                    raise DataError(
                        f"{text.target_name}:{text.lines[index]}: the sentence has {len(ids)} "
                        f"tokens, over the limit of {max_length} (max length)"
                    )
        if not kept:
            raise DataError(f"{text.target_name}: no pair is left to use")
        return cls(
            text.source.take(kept),
            [target[index] for index in kept],
            skipped_long=len(text) - len(kept),
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def source_lengths(self) -> np.ndarray:
        """``[N]``, in frames."""
        return self.source.lengths

    @property
    def target_lengths(self) -> np.ndarray:
        """``[N]``, special id included."""
        return self.target.lengths + 1

    def fingerprint(self) -> str:
        """Return a hash of the content, to recognise the same data when training resumes."""
        digest = hashlib.sha256()
        digest.update(self.source.lengths.tobytes())
        digest.update(self.source.frames.tobytes())
        self.target.update_digest(digest)
        return digest.hexdigest()[:16]

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the pairs with these indices as one padded batch."""
        source = self.source.padded(indices)
        return make_batch(source, self.source_lengths[indices], self.target, indices)
