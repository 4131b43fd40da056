from __future__ import annotations

import builtins
import io

import pytest
import sentencepiece

from fused_attn.training.errors import CheckpointError, DataError, MissingLibraryError
from fused_attn.training.text import Vocabulary

SENTENCES = ["Two “books”, please.", "二〇二一年三月，三日。", "twenty-one cats"] * 20


def test_round_trip_keeps_the_text_as_it_is() -> None:
    vocabulary = Vocabulary.train(SENTENCES, 80)
    assert len(vocabulary) == 80
    assert vocabulary.decode(vocabulary.encode(SENTENCES)) == SENTENCES


def test_special_ids_are_reserved_and_leave_no_trace() -> None:
    vocabulary = Vocabulary.train(SENTENCES, 80)
    (ids,) = vocabulary.encode(["twenty-one cats"])
    assert min(ids) > 3
    assert vocabulary.decode([[1, *ids, 2, 0, 0]]) == ["twenty-one cats"]
    assert vocabulary.encode(["ж"])[0][-1] == 3


def test_character_model_treats_the_size_as_a_limit() -> None:
    vocabulary = Vocabulary.train(["三月三日。"], 100, model_type="char", leading_space=False)
    assert len(vocabulary) == 4 + 4
    assert vocabulary.pieces(vocabulary.encode(["三月三日。"])[0]) == list("三月三日。")


def test_training_is_repeatable() -> None:
    assert Vocabulary.train(SENTENCES, 70) == Vocabulary.train(SENTENCES, 70)
    assert Vocabulary.train(SENTENCES, 70) != Vocabulary.train(SENTENCES, 71)


def test_a_size_the_text_cannot_give_is_an_error() -> None:
    with pytest.raises(DataError, match=r"bpe vocabulary of 5000 ids .* size too high"):
        Vocabulary.train(SENTENCES, 5000)


def test_a_file_that_is_no_model_is_named(tmp_path) -> None:
    path = tmp_path / "source.spm"
    with pytest.raises(CheckpointError, match=r"source\.spm: cannot read: No such file"):
        Vocabulary.load(path)
    path.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"source\.spm: not a SentencePiece model"):
        Vocabulary.load(path)


def test_foreign_special_ids_are_refused() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=32, minloglevel=2
    )
    with pytest.raises(CheckpointError, match=r"special ids .* must be \(0, 1, 2, 3\)"):
        Vocabulary(model.getvalue())


def test_an_absent_library_names_the_command_that_installs_it(monkeypatch) -> None:
    real_import = builtins.__import__

    def without_sentencepiece(name, *arguments, **keywords):
        if name == "sentencepiece":
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_sentencepiece)
    with pytest.raises(MissingLibraryError, match=r"pip install 'fused_attn\[text\]'"):
        Vocabulary.train(SENTENCES, 80)
