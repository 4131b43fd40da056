from __future__ import annotations

import numpy as np
import pytest
import torch

from fused_attn.generation import BeamSearch, beam_search
from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig
from fused_attn.training.checkpoint import Vocabularies
from fused_attn.training.config import TrainingConfig
from fused_attn.training.data import TokenBatches
from fused_attn.training.errors import CheckpointError, DataError
from fused_attn.training.features import (
    FeatureDataset,
    FeatureSequences,
    read_feature_text,
    read_features,
)
from fused_attn.training.kinds import model_fields
from fused_attn.training.loop import Trainer
from fused_attn.training.text import BOS, EOS, Vocabulary
from fused_attn.training.translator import Translation, Translator


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


def test_training_on_frames_resumes_with_the_same_bits(tmp_path) -> None:
    def run(directory, steps: int, data: FeatureDataset) -> Trainer:
        torch.manual_seed(0)
        model = RNNSeq2Seq(
            RNNSeq2SeqConfig(
                target_vocab_size=9,
                source_features=3,
                embedding_size=8,
                hidden_size=8,
                num_encoder_layers=1,
                num_decoder_layers=1,
                attention="location",
            )
        )
        config = TrainingConfig(max_steps=steps, max_tokens=20, warmup_steps=2, guided_attention=1)
        return Trainer(
            model,
            data,
            config,
            model_config=model_fields(model),
            directory=directory,
            report=lambda line: None,
        )

    source = sequences(*[4, 7, 6] * 3)
    data = FeatureDataset(source, [[4, 5, 6], [7], [8, 4]] * 3)
    whole = run(tmp_path / "whole", 4, data)
    whole.train()
    run(tmp_path / "parts", 2, data).train()
    resumed = run(tmp_path / "parts", 4, data)
    checkpoint = tmp_path / "parts" / "checkpoints" / "step-00000002"
    resumed.resume(checkpoint)
    resumed.train()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    other = FeatureDataset(FeatureSequences(source.frames * 2, source.lengths), [[4]] * 9)
    with pytest.raises(CheckpointError, match=r"training data is '\w+' there and '\w+' here"):
        run(tmp_path / "parts", 4, other).resume(checkpoint)


def test_sentences_for_frames_are_checked(tmp_path) -> None:
    sequences(2, 0, 3).save(tmp_path / "a.npz")
    (tmp_path / "text").write_text("abc\nde\n\n")
    with pytest.raises(DataError, match=r"a\.npz: source 2 has no frame; correct the file"):
        read_feature_text(tmp_path / "a.npz", tmp_path / "text")
    text = read_feature_text(tmp_path / "a.npz", tmp_path / "text", bad_pairs="skip")
    assert (text.target, text.lines, text.skipped_empty) == (["abc"], [1], 2)
    assert text.source.lengths.tolist() == [2]
    letters = Vocabulary.train(["abcde"], 20, model_type="char", leading_space=False)
    with pytest.raises(DataError, match=r"text:1: the sentence has 3 tokens, over the limit of 2"):
        FeatureDataset.encode(text, letters, max_length=2)
    with pytest.raises(DataError, match=r"text: no pair is left to use"):
        FeatureDataset.encode(text, letters, max_length=2, bad_pairs="skip")
    dataset = FeatureDataset.encode(text, letters)
    assert dataset.batch(np.array([0])).target_output.tolist() == [
        [*letters.encode(["abc"])[0], EOS]
    ]
    (tmp_path / "text").write_text("")
    FeatureSequences(np.zeros((0, 3)), np.zeros(0, int)).save(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"text: the file has no line"):
        read_feature_text(tmp_path / "a.npz", tmp_path / "text")


def test_frames_are_translated_in_order_and_those_that_cannot_be_are_named() -> None:
    letters = Vocabulary.train(["abcde"], 20, model_type="char", leading_space=False)
    torch.manual_seed(0)
    config = RNNSeq2SeqConfig(
        target_vocab_size=len(letters),
        source_features=3,
        time_reduction=2,
        embedding_size=8,
        hidden_size=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        max_length=12,
    )
    model = RNNSeq2Seq(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    translator = Translator(model, Vocabularies(letters, letters), batch_size=2)
    assert translator.source_features == 3
    strategy = BeamSearch(beam_size=2)
    sources = [*sequences(5, 2, 9, 3, 12, 7)]
    alone = []
    for frames in sources:
        [[best]] = beam_search(model, torch.from_numpy(frames)[None], beam_size=2)
        alone += letters.decode([best.tokens])
    assert len(set(alone)) > 2
    assert translator.translate(sources, strategy=strategy) == alone
    bad = [np.zeros((0, 3), np.float32), np.zeros((13, 3)), np.zeros((2, 4)), np.zeros(3)]
    found = list(translator.translate_each([*bad, *sources], strategy=strategy))
    assert [each.text for each in found[4:]] == alone
    assert found[0] == Translation()
    assert [each.error for each in found[1:4]] == [
        "the source has 13 frames, over the model's limit of 12",
        "the source must have shape [S, F] with F = 3, got [2, 4]",
        "the source must have shape [S, F] with F = 3, got [3]",
    ]
