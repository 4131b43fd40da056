"""Between sentences and the token ids that a model reads and writes.

Where a model copies, token ids go beyond the vocabulary: those of a target then mean something
only together with its source. A word outside the vocabulary gets the ids V, V + 1, … in the order
in which such words first occur in its source; a pointer network writes 3 + s for position s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fused_attn.models.rnn_config import POINTER_VOCABULARY, RNNSeq2SeqConfig

from .text import UNK, Vocabulary

if TYPE_CHECKING:
    from .checkpoint import Vocabularies

_NO_PIECES: tuple[int | str, ...] = ()


class UnwritableTarget(ValueError):  # noqa: N818
    """No tokens of a model say what a target says.

    Attributes:
        index: Which one, from 0.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class Source(NamedTuple):
    """A sentence to read."""

    ids: list[int]
    """Without special ids."""
    pieces: Sequence[int | str] = _NO_PIECES
    """What tokens beyond the target's vocabulary stand for: ids in it, or text."""


class Codec(Protocol):
    """What datasets and ``Translator`` need to know of a model's token ids."""

    def read(self, sentences: Sequence[str]) -> list[Source]:
        """Return the tokens of sources."""
        ...

    def encode(self, sentences: Sequence[str], sources: Sequence[Source]) -> list[list[int]]:
        """Return the tokens of targets, without special ids, each with its source."""
        ...

    def decode(self, targets: Sequence[Sequence[int]], source: Source) -> list[str]:
        """Return the text of targets of one source; special ids leave no trace."""
        ...


class PlainCodec:
    """Tokens are those of the vocabularies.

    Args:
        source: Splits sources.
        target: Splits targets.
    """

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        self._source = source
        self._target = target

    def read(self, sentences: Sequence[str]) -> list[Source]:
        """See ``Codec``."""
        return [Source(ids) for ids in self._source.encode(sentences)]

    def encode(self, sentences: Sequence[str], sources: Sequence[Source]) -> list[list[int]]:
        """See ``Codec``."""
        return self._target.encode(sentences)

    def decode(self, targets: Sequence[Sequence[int]], source: Source) -> list[str]:
        """See ``Codec``."""
        return self._target.decode(targets)


class CopyCodec:
    """Words that only the source has are tokens V, V + 1, …, in sources and targets alike.

    The unit is what the vocabulary cannot split: a word of a vocabulary of words, a stretch of
    unknown characters of any other. Of more than ``extra_tokens`` in a sentence the first get ids;
    the others, and those of a target that its source has not, are the unknown token.

    Args:
        vocabulary: Of both sides.
        extra_tokens: Most such ids in a sentence.
    """

    def __init__(self, vocabulary: Vocabulary, extra_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._extra_tokens = extra_tokens

    def read(self, sentences: Sequence[str]) -> list[Source]:
        """See ``Codec``."""
        found = []
        for pieces in self._vocabulary.split(sentences):
            unknown = dict.fromkeys(piece for piece in pieces if isinstance(piece, str))
            words = list(unknown)[: self._extra_tokens]
            found.append(Source(self._ids(pieces, words), words))
        return found

    def encode(self, sentences: Sequence[str], sources: Sequence[Source]) -> list[list[int]]:
        """See ``Codec``."""
        targets = self._vocabulary.split(sentences)
        return [
            self._ids(pieces, source.pieces)
            for pieces, source in zip(targets, sources, strict=True)
        ]

    def decode(self, targets: Sequence[Sequence[int]], source: Source) -> list[str]:
        """See ``Codec``."""
        V = len(self._vocabulary)
        return self._vocabulary.join(
            [[t if t < V else _piece(source.pieces, t - V) for t in ids] for ids in targets]
        )

    def _ids(self, pieces: Sequence[int | str], words: Sequence[int | str]) -> list[int]:
        first = len(self._vocabulary)
        extended = {word: first + i for i, word in enumerate(words)}
        return [p if isinstance(p, int) else extended.get(p, UNK) for p in pieces]


class PointerCodec:
    """Targets are positions of their sources: token 3 + s is the source's position s.

    A word of a target is the first place of that word in the source that was not taken yet.

    Args:
        vocabulary: Of both sides.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def read(self, sentences: Sequence[str]) -> list[Source]:
        """See ``Codec``."""
        return [
            Source([p if isinstance(p, int) else UNK for p in pieces], pieces)
            for pieces in self._vocabulary.split(sentences)
        ]

    def encode(self, sentences: Sequence[str], sources: Sequence[Source]) -> list[list[int]]:
        """See ``Codec``.

        Raises:
            UnwritableTarget: A target has a word that its source has not, or not as often.
        """
        targets = self._vocabulary.split(sentences)
        return [
            self._places(pieces, source.pieces, index)
            for index, (pieces, source) in enumerate(zip(targets, sources, strict=True))
        ]

    def decode(self, targets: Sequence[Sequence[int]], source: Source) -> list[str]:
        """See ``Codec``."""
        return self._vocabulary.join(
            [
                [
                    _piece(source.pieces, token - POINTER_VOCABULARY)
                    for token in ids
                    if token >= POINTER_VOCABULARY
                ]
                for ids in targets
            ]
        )

    def _places(
        self, pieces: Sequence[int | str], source: Sequence[int | str], index: int
    ) -> list[int]:
        places: dict[int | str, list[int]] = {}
        for position in range(len(source) - 1, -1, -1):
            places.setdefault(source[position], []).append(position)
        found = []
        for piece in pieces:
            if not places.get(piece):
                [text] = self._vocabulary.join([[piece]])
                raise UnwritableTarget(
                    "a pointer network's target must consist of words of its source, each at most "
                    f"as often as there, got {text!r} once too often",
                    index,
                )
            found.append(POINTER_VOCABULARY + places[piece].pop())
        return found


def make_codec(vocabularies: Vocabularies, config: object) -> Codec:
    """Return the codec of a model.

    Args:
        vocabularies: The model's.
        config: The model's; what is no ``RNNSeq2SeqConfig`` does not copy.

    Raises:
        ValueError: The model copies, and its two vocabularies differ.
    """
    source, target = vocabularies.source, vocabularies.target
    if not isinstance(config, RNNSeq2SeqConfig) or not config.copies:
        return PlainCodec(source, target)
    if source != target:
        raise ValueError(
            f"make_codec: vocabularies must be one for both sides with output {config.output!r}, "
            "got two"
        )
    if config.output == "pointer":
        return PointerCodec(source)
    return CopyCodec(source, config.extra_tokens)


def _piece(pieces: Sequence[int | str], index: int) -> int | str:
    """What stands at an index; a model may name one that this source has not."""
    return pieces[index] if index < len(pieces) else UNK
