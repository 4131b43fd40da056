"""Subword vocabularies: SentencePiece models trained from text, stored as bytes.

Every vocabulary has the same special ids, so that a model, a batch and a decoder agree without
passing them around: padding 0, beginning of sentence 1, end of sentence 2, unknown 3.

Reference: Kudo and Richardson, 2018. https://arxiv.org/abs/1808.06226
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

from .errors import CheckpointError, DataError, missing_library

PAD = 0
BOS = 1
EOS = 2
UNK = 3

ModelType = Literal["bpe", "unigram", "char", "word"]

_SPACE = "\u2581"  # SentencePiece's mark


class Vocabulary:
    """A SentencePiece model: sentences to token ids and back.

    Args:
        model: The serialised SentencePiece model, as in a ``.model`` file.
        name: What to call it in an error message, usually its path.

    Raises:
        MissingLibraryError: SentencePiece is not installed.
        CheckpointError: The bytes are not a SentencePiece model, or its special ids are not
            padding 0, beginning 1, end 2 and unknown 3.
    """

    def __init__(self, model: bytes, *, name: str = "vocabulary") -> None:
        sentencepiece = _sentencepiece()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise CheckpointError(f"{name}: not a SentencePiece model") from error
        ids = tuple(
            getattr(self._processor, f"{kind}_id")() for kind in ("pad", "bos", "eos", "unk")
        )
        if ids != (PAD, BOS, EOS, UNK):
            raise CheckpointError(
                f"{name}: special ids (padding, beginning, end, unknown) must be "
                f"{(PAD, BOS, EOS, UNK)}, got {ids}"
            )
        self.model = model

    @classmethod
    def train(
        cls,
        sentences: Iterable[str],
        size: int,
        *,
        model_type: ModelType = "bpe",
        character_coverage: float = 1.0,
        leading_space: bool = True,
    ) -> Vocabulary:
        """Learn a vocabulary from text.

        The text is not normalised (SentencePiece's ``identity`` rule), so that decoding gives
        back what was written: full-width punctuation, quotation marks and ligatures survive.
        Runs of spaces do become one space. The result depends on the sentences alone.

        Args:
            sentences: The training text, one sentence each.
            size: Number of ids, special ids included. With ``model_type="char"`` it is an upper
                limit.
            model_type: Byte-pair encoding, unigram language model, characters or words.
            character_coverage: Fraction of the characters of the text that get an id; the rest
                become the unknown token. 1 for alphabets, 0.9995 for a large Chinese corpus.
            leading_space: Treat the first word of a sentence like any other, as preceded by a
                space. False for languages written without spaces.

        Raises:
            MissingLibraryError: SentencePiece is not installed.
            DataError: The text cannot give a vocabulary of that size.
        """
        sentencepiece = _sentencepiece()
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=size,
                model_type=model_type,
                character_coverage=character_coverage,
                add_dummy_prefix=leading_space,
                normalization_rule_name="identity",
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNK,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2] or str(error)
            raise DataError(
                f"cannot learn a {model_type} vocabulary of {size} ids from this text: {reason}"
            ) from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary from a SentencePiece model file.

        Raises:
            CheckpointError: The file cannot be read or is not such a model.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
        return cls(model, name=str(path))

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each sentence, without special ids."""
        return self._processor.encode(list(sentences), out_type=int)

    def decode(self, sentences: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each sequence of token ids; special ids leave no trace."""
        return [self._processor.decode([int(token) for token in ids]) for ids in sentences]

    def split(self, sentences: Sequence[str]) -> list[list[int | str]]:
        """Return the tokens of each sentence, without special ids; what is unknown as text.

        Unknown text is split before spaces, which it keeps as SentencePiece marks them: of a
        vocabulary of words, each unknown word is a piece.
        """
        found: list[list[int | str]] = [[*ids] for ids in self.encode(sentences)]
        for number, ids in enumerate(found):
            if UNK not in ids:
                continue
            found[number] = []
            texts = self._processor.encode(sentences[number], out_type=str)
            for token, text in zip(ids, texts, strict=True):
                if token == UNK:
                    found[number] += re.findall(f"{_SPACE}*[^{_SPACE}]+", text)
                else:
                    found[number].append(token)
        return found

    def join(self, sentences: Sequence[Sequence[int | str]]) -> list[str]:
        """Return the text of what ``split`` gives; special ids leave no trace."""
        found = []
        for pieces in sentences:
            texts = [p if isinstance(p, str) else self._processor.id_to_piece(p) for p in pieces]
            # Marks of spaces stay in pieces that SentencePiece does not know.
            text = self._processor.decode(texts).replace(_SPACE, " ")
            found.append(text.lstrip(" ") if pieces and isinstance(pieces[0], str) else text)
        return found

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the subword behind each id, with SentencePiece's mark for a space."""
        return [self._processor.id_to_piece(int(token)) for token in ids]


def _sentencepiece() -> ModuleType:
    try:
        import sentencepiece
    except ImportError as error:
        raise missing_library("sentencepiece", "a subword vocabulary", "text") from error
    return sentencepiece
