from __future__ import annotations

import numpy as np
import pytest
import torch

from fused_attn.training.data import TokenBatches
from fused_attn.training.errors import DataError
from fused_attn.training.features import FeatureDataset, FeatureSequences, read_features
from fused_attn.training.text import BOS, EOS


def sequences(*lengths: int) -> FeatureSequences:
    random = np.random.default_rng(0)
    return FeatureSequences.from_list([random.normal(size=(length, 3)) for length in lengths])


def test_a_batch_is_padded_with_zeros() -> None:
    source = sequences(4, 2, 3)
    batch = FeatureDataset(source, [[5], [6, 7], [8]]).batch(np.array([1, 2]))
    assert batch.source.shape == (2, 3, 3)
    assert batch.source.dtype == torch.float32
    assert batch.source_lengths.tolist() == [2, 3]
    assert np.array_equal(batch.source[0, :2], source.frames[4:6])
    assert np.array_equal(batch.source[1], source.frames[6:])
    assert not batch.source[0, 2].any()
    assert batch.target_input.tolist() == [[BOS, 6, 7], [BOS, 8, 0]]
    assert batch.target_output.tolist() == [[6, 7, EOS], [8, EOS, 0]]
    assert batch.target_tokens == 5


def test_batches_are_limited_by_frames() -> None:
    dataset = FeatureDataset(sequences(*range(1, 40)), [[5]] * 39)
    for indices in TokenBatches(dataset, max_tokens=50, seed=1).epoch(0):
        assert len(indices) * dataset.source_lengths[indices].max() <= 50


def test_a_file_round_trip(tmp_path) -> None:
    source = sequences(4, 0, 3)
    source.save(tmp_path / "a.npz")
    read = read_features(tmp_path / "a.npz")
    assert np.array_equal(read.frames, source.frames)
    assert read.lengths.tolist() == [4, 0, 3]
    assert (len(read), read.size) == (3, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.zeros((2, 3))}, r"bad\.npz: has no array 'lengths'"),
        ({"features": np.zeros(2), "lengths": np.array([2])}, r"must be floating point of shape"),
        ({"features": np.zeros((2, 3)), "lengths": np.array([3])}, r"must sum to N = 2 .* got 3"),
        ({"features": np.zeros((2, 3)), "lengths": np.array([3, -1])}, r"none negative"),
        ({"features": np.zeros((2, 3)), "lengths": np.array([2.0])}, r"must be integers"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, arrays, message) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / "bad.npz")


def test_what_is_no_such_file(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.npz: cannot read: No such file"):
        read_features(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("PK is how a zip file begins, but not this one")
    with pytest.raises(DataError, match=r"text\.npz: "):
        read_features(tmp_path / "text.npz")


def test_fingerprints_differ_with_what_is_in_it() -> None:
    source = sequences(2, 3)
    other = FeatureSequences(source.frames, np.array([3, 2]))
    changed = FeatureSequences(source.frames + np.float32(1e-6), source.lengths)
    found = {
        FeatureDataset(frames, target).fingerprint()
        for frames, target in (
            (source, [[4], [5]]),
            (other, [[4], [5]]),
            (changed, [[4], [5]]),
            (source, [[4], [6]]),
        )
    }
    assert len(found) == 4
    with pytest.raises(ValueError, match="as many sequences as source, 2, got 1"):
        FeatureDataset(source, [[4]])
