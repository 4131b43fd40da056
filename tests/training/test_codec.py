from __future__ import annotations

import numpy as np
import pytest
import torch

from fused_attn.models import RNNSeq2SeqConfig, TransformerConfig
from fused_attn.training.checkpoint import Vocabularies
from fused_attn.training.codec import CopyCodec, PlainCodec, PointerCodec, Source, make_codec
from fused_attn.training.data import ParallelDataset, ParallelText
from fused_attn.training.errors import DataError
from fused_attn.training.text import BOS, EOS, UNK, Vocabulary

TEXT = ["the cat sat on the mat", "a dog sat", "the dog ran"]


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return Vocabulary.train(TEXT * 3, 12, model_type="word")


def test_what_is_unknown_is_split_at_spaces(words) -> None:
    [pieces] = words.split(["the zebra  quagga sat"])
    the, sat = words.encode(["the sat"])[0]
    assert pieces == [the, "\u2581zebra", "\u2581quagga", sat]
    # SentencePiece itself makes one token of neighbours that it does not know.
    assert words.encode(["the zebra  quagga sat"]) == [[the, UNK, sat]]


@pytest.mark.parametrize(
    ("model_type", "size", "leading_space"),
    [("word", 12, True), ("bpe", 24, True), ("char", 99, True), ("char", 99, False)],
)
def test_splitting_and_joining_are_inverse(model_type, size, leading_space) -> None:
    vocabulary = Vocabulary.train(
        TEXT * 3, size, model_type=model_type, leading_space=leading_space
    )
    texts = [
        *TEXT,
        "zebra the quagga zebra",
        "the zébra sat, Zé",
        "quagga",
        "sat",
        "",
        "the dogs' ÄÖ mat",
    ]
    assert vocabulary.join(vocabulary.split(texts)) == texts
    known = vocabulary.encode(texts)
    assert vocabulary.join([[BOS, *ids, EOS] for ids in known]) == vocabulary.decode(known)


def test_extended_ids_are_numbered_by_first_appearance(words) -> None:
    codec = CopyCodec(words, 2)
    V = len(words)
    the, cat, sat = words.encode(["the cat sat"])[0]
    [one, other] = codec.read(["zebra the zebra quagga gnu sat quagga", "the gnu sat"])
    assert one.ids == [V, the, V, V + 1, UNK, sat, V + 1]
    assert other.ids == [the, V, sat]
    targets = codec.encode(["quagga cat gnu zebra okapi", "gnu cat quagga"], [one, other])
    assert targets == [[V + 1, cat, UNK, V, UNK], [V, cat, UNK]]
    assert codec.decode([[V + 1, cat, V], [the]], one) == ["quagga cat zebra", "the"]
    assert codec.decode([[V, cat]], other) == ["gnu cat"]
    # An id that this source has not given away, which a model may still say.
    assert codec.decode([[V + 1]], other) == words.decode([[UNK]])


def test_a_pointer_networks_target_is_positions(words) -> None:
    codec = PointerCodec(words)
    [source] = codec.read(["zebra the zebra quagga sat"])
    the, sat = words.encode(["the sat"])[0]
    assert source.ids == [UNK, the, UNK, UNK, sat]
    [target] = codec.encode(["quagga zebra the zebra"], [source])
    assert target == [3 + 3, 3 + 0, 3 + 1, 3 + 2]
    assert codec.decode([[BOS, *target, EOS]], source) == ["quagga zebra the zebra"]
    for text, word in (("the the", "the"), ("mat", "mat"), ("the okapi", "okapi")):
        message = rf"targets:9: .* must consist of words of its source, .* got '{word}' once"
        pairs = ParallelText(["a", "the zebra"], ["a", text], "sources", "targets", [4, 9])
        with pytest.raises(DataError, match=message):
            ParallelDataset.encode_by(codec, pairs)


def test_a_dataset_for_copying(words) -> None:
    text = ParallelText.from_pairs([("the zebra sat", "zebra sat"), ("gnu gnu", "the gnu")])
    batch = ParallelDataset.encode_by(CopyCodec(words, 5), text).batch(np.arange(2))
    V = len(words)
    the, sat = words.encode(["the sat"])[0]
    assert batch.source.tolist() == [[the, V, sat, EOS], [V, V, EOS, 0]]
    assert batch.target_output.tolist() == [[V, sat, EOS], [the, V, EOS]]
    assert batch.target_input.tolist() == [[BOS, V, sat], [BOS, the, V]]


def test_a_model_has_its_codec(words) -> None:
    other = Vocabulary.train(TEXT * 3, 10, model_type="word")
    size = {"source_vocab_size": len(words), "target_vocab_size": len(words)}
    plain = RNNSeq2SeqConfig(**size)
    copies = RNNSeq2SeqConfig(**size, output="copynet", extra_tokens=3)
    points = RNNSeq2SeqConfig(source_vocab_size=12, target_vocab_size=3, output="pointer")
    for config in (plain, TransformerConfig(**size)):
        assert isinstance(make_codec(Vocabularies(words, other), config), PlainCodec)
    both = Vocabularies(words, words)
    assert isinstance(make_codec(both, points), PointerCodec)
    codec = make_codec(both, copies)
    assert codec.read(["e f g h"])[0].ids == [12, 13, 14, UNK]
    for config in (copies, points):
        with pytest.raises(ValueError, match=r"vocabularies must be one for both sides with out"):
            make_codec(Vocabularies(words, other), config)


def test_without_copies_it_is_the_vocabularies(words) -> None:
    other = Vocabulary.train(TEXT * 3, 10, model_type="word")
    codec = PlainCodec(words, other)
    sources = codec.read(TEXT)
    assert [source.ids for source in sources] == words.encode(TEXT)
    assert codec.encode(TEXT, sources) == other.encode(TEXT)
    assert codec.decode(other.encode(TEXT), Source([])) == other.decode(other.encode(TEXT))
    pairs = ParallelText.from_pairs([(text, text) for text in TEXT])
    one = ParallelDataset.encode(pairs, words, other)
    assert one.fingerprint() == ParallelDataset.encode_by(codec, pairs).fingerprint()
    assert torch.equal(one.batch(np.arange(3)).source[0, :-1], torch.tensor(sources[0].ids))
