from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_attn.training.data import (
    ParallelDataset,
    ParallelText,
    TokenBatches,
    read_lines,
    read_parallel,
)
from fused_attn.training.errors import DataError
from fused_attn.training.text import BOS, EOS, PAD, Vocabulary


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_lines_end_at_newlines_alone(tmp_path) -> None:
    text = "\ufeffone\r\ntwo\u2028still two\x0bstill\nthree"
    assert read_lines(write(tmp_path / "a", text.encode())) == [
        "one",
        "two\u2028still two\x0bstill",
        "three",
    ]


def test_gzip_is_recognised_by_content(tmp_path) -> None:
    path = write(tmp_path / "named.txt", gzip.compress(b"eins\nzwei\n"))
    assert read_lines(path) == ["eins", "zwei"]


def test_damaged_gzip(tmp_path) -> None:
    whole = gzip.compress(b"eins\nzwei\n" * 100)
    for name, content in (("cut", whole[:-12]), ("broken", whole[:20] + b"\xff" * 20)):
        with pytest.raises(DataError, match=rf"{name}: damaged gzip file"):
            read_lines(write(tmp_path / name, content))


def test_bytes_that_are_not_utf8_are_located(tmp_path) -> None:
    path = write(tmp_path / "latin", b"gut\nsch\xf6n\nbesser\n")
    with pytest.raises(DataError, match=r"latin:2: not UTF-8: byte 0xf6 at position 4 of the line"):
        read_lines(path)


def test_absent_file_and_directory(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nowhere: cannot read: No such file"):
        read_lines(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read: Is a directory"):
        read_lines(tmp_path)


def test_files_of_different_length(tmp_path) -> None:
    source = write(tmp_path / "train.en", b"a\nb\nc\n")
    target = write(tmp_path / "train.de", b"a\nb\n")
    message = r"train\.de:3: the file ends, but .*train\.en goes on: .*en has 3 lines and .*de 2"
    with pytest.raises(DataError, match=message):
        read_parallel(source, target)
    with pytest.raises(DataError, match=r"train\.de:3: the file ends, .*de has 2 lines and .*en 3"):
        read_parallel(target, source)


def test_files_without_a_line(tmp_path) -> None:
    empty = write(tmp_path / "empty", b"")
    with pytest.raises(DataError, match=r"empty: the file has no line"):
        read_parallel(empty, empty)


def test_empty_line_is_an_error_or_skipped(tmp_path) -> None:
    source = write(tmp_path / "train.en", b"a\nb\nc\nd\n")
    target = write(tmp_path / "train.de", b"a\n \t\nc\n\n")
    with pytest.raises(DataError, match=r"train\.de:2: the line is empty"):
        read_parallel(source, target)
    with pytest.raises(DataError, match=r"train\.de:2: the line is empty"):
        read_parallel(target, source)
    text = read_parallel(source, target, bad_pairs="skip")
    assert (text.source, text.target, text.lines) == (["a", "c"], ["a", "c"], [1, 3])
    assert text.skipped_empty == 2


@pytest.fixture(scope="module")
def characters() -> Vocabulary:
    return Vocabulary.train(["abcdefgh"], 100, model_type="char", leading_space=False)


def test_sentence_over_the_limit_is_an_error_or_skipped(characters) -> None:
    text = ParallelText(["ab", "abc", "a"], ["a", "b", "abcdef"], "t.en", "t.de", [1, 4, 9])

    def encode(limit: int, bad_pairs: str) -> ParallelDataset:
        return ParallelDataset.encode(
            text, characters, characters, max_length=limit, bad_pairs=bad_pairs
        )

    with pytest.raises(DataError, match=r"t\.en:4: the sentence has 3 tokens, over the limit of 2"):
        encode(2, "error")
    with pytest.raises(DataError, match=r"t\.de:9: the sentence has 6 tokens, over the limit of 3"):
        encode(3, "error")
    assert (len(encode(2, "skip")), encode(2, "skip").skipped_long) == (1, 2)
    with pytest.raises(DataError, match=r"no pair is left to use: 0 had an empty line and 3"):
        encode(0, "skip")


def test_a_batch_is_padded_behind_with_special_ids_in_place() -> None:
    dataset = ParallelDataset([[5, 6, 7], [8]], [[9], [10, 11]])
    batch = dataset.batch(np.array([1, 0]))
    assert batch.source.tolist() == [[8, EOS, PAD, PAD], [5, 6, 7, EOS]]
    assert batch.source_lengths.tolist() == [2, 4]
    assert batch.target_input.tolist() == [[BOS, 10, 11], [BOS, 9, PAD]]
    assert batch.target_output.tolist() == [[10, 11, EOS], [9, EOS, PAD]]
    assert batch.target_lengths.tolist() == [3, 2]
    assert batch.target_output.flatten()[batch.target_rows].tolist() == [10, 11, EOS, 9, EOS]
    assert batch.target_tokens == 5
    assert batch.source.dtype == torch.int64


LENGTHS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 50), st.integers(0, 5))
def test_batches_are_a_partition_within_the_limit(lengths, max_tokens, pool_size, epoch) -> None:
    dataset = ParallelDataset([[4] * s for s, _ in lengths], [[4] * t for _, t in lengths])
    batches = TokenBatches(dataset, max_tokens=max_tokens, seed=3, pool_size=pool_size)
    for cut in (batches.epoch(epoch), batches.in_order()):
        assert sorted(np.concatenate(cut).tolist()) == list(range(len(lengths)))
        for indices in cut:
            batch = dataset.batch(indices)
            cost = len(indices) * max(batch.source.shape[1], batch.target_output.shape[1])
            assert cost <= max_tokens or len(indices) == 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    random = np.random.default_rng(0)
    sequences = [[4] * length for length in random.integers(1, 20, 300)]
    dataset = ParallelDataset(sequences, sequences)

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = TokenBatches(dataset, max_tokens=100, seed=seed)
        return [batch.tolist() for batch in batches.epoch(epoch)]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    # Not only the order of the batches differs, but what is in them.
    assert sorted(order(1, 2)) != sorted(order(1, 3))


def test_length_pools_waste_little_padding() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(5, 40, (5000, 2))
    dataset = ParallelDataset([[4] * s for s, _ in lengths], [[4] * s for s, _ in lengths])
    places = words = 0
    for indices in TokenBatches(dataset, max_tokens=2000, seed=0).epoch(0):
        batch = dataset.batch(indices)
        places += batch.target_output.numel()
        words += batch.target_tokens
    assert words / places > 0.97


def test_fingerprint_sees_content_and_boundaries() -> None:
    prints = {
        ParallelDataset(source, target).fingerprint()
        for source, target in (
            ([[4, 5]], [[6]]),
            ([[4, 6]], [[6]]),
            ([[4, 5]], [[7]]),
            ([[4], [5]], [[6], []]),
        )
    }
    assert len(prints) == 4


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"target must have as many sequences as source, 1, got 0"):
        ParallelDataset([[4]], [])
    with pytest.raises(ValueError, match=r"max_tokens must be at least 1, got 0"):
        TokenBatches(ParallelDataset([[4]], [[4]]), max_tokens=0, seed=0)
