"""Sources that are frames instead of words: what a microphone or another sensor gives.

In a file they are one array: ``features``, ``[N, F]`` fp32, the frames of all sources one after
the other, and ``lengths``, ``[B]``, how many of them each source has (``numpy.savez``).
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .data import Batch, TokenSequences, make_batch
from .errors import DataError


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

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the frames ``[S, F]`` of a source."""
        end = self._ends[index]
        return self.frames[end - self.lengths[index] : end]

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


class FeatureDataset:
    """Sources of frames with targets of tokens.

    Args:
        source: The sources.
        target: Token ids of the targets, without special ids.

    Raises:
        ValueError: There are not as many of both.
    """

    def __init__(self, source: FeatureSequences, target: Sequence[Sequence[int]]) -> None:
        if len(source) != len(target):
            raise ValueError(
                f"FeatureDataset: target must have as many sequences as source, {len(source)}, "
                f"got {len(target)}"
            )
        self.source = source
        self.target = TokenSequences(target)

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
