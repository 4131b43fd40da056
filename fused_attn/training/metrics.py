"""Scores of translations: BLEU by sacreBLEU, with its signature; exact match; error rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import missing_library


@dataclass(frozen=True)
class Bleu:
    """A BLEU score and how it was computed; the one means nothing without the other.

    Attributes:
        score: 0 to 100.
        signature: sacreBLEU's: number of references, case, tokenisation, smoothing, version.
        details: n-gram precisions, brevity penalty and lengths, in sacreBLEU's words.
    """

    score: float
    signature: str
    details: str

    def __str__(self) -> str:
        return f"BLEU = {self.score:.2f}  {self.signature}"


def corpus_bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, tokenization: str = "13a"
) -> Bleu:
    """Return the corpus BLEU of translations, cased, with one reference each.

    Args:
        hypotheses: The translations, plain text.
        references: The references, plain text, one for each.
        tokenization: sacreBLEU's: ``13a`` for languages with spaces, ``zh`` for Chinese, ``char``.

    Raises:
        MissingLibraryError: sacreBLEU is not installed.
        ValueError: The numbers of translations and references differ.

    Reference: Post, 2018. https://arxiv.org/abs/1804.08771
    """
    _check_lengths("corpus_bleu", hypotheses, references)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise missing_library("sacrebleu", "a BLEU score", "text") from error
    metric = BLEU(tokenize=tokenization)
    score = metric.corpus_score(list(hypotheses), [list(references)])
    signature = str(metric.get_signature())
    return Bleu(float(score.score), signature, str(score).split(maxsplit=3)[-1])


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Return the fraction of translations that equal their reference, outer spaces aside.

    Raises:
        ValueError: The numbers of translations and references differ, or there are none.
    """
    _check_lengths("exact_match", hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    equal = sum(hypothesis.strip() == reference.strip() for hypothesis, reference in pairs)
    return equal / len(references)


def error_rate(
    hypotheses: Sequence[Sequence[object]], references: Sequence[Sequence[object]]
) -> float:
    """Return the least number of insertions, deletions and substitutions, by references' length.

    Args:
        hypotheses: Strings, for the error rate of characters, or lists of words.
        references: Likewise, one for each.

    Raises:
        ValueError: Their numbers differ, or there are none.
    """
    _check_lengths("error_rate", hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    return sum(_edits(*pair) for pair in pairs) / max(1, sum(map(len, references)))


def _edits(one: Sequence[object], other: Sequence[object]) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for i, item in enumerate(one, start=1):
        above, row = row, [i]
        for j, wanted in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (item != wanted)))
    return row[-1]


def _check_lengths(name: str, hypotheses: Sequence[object], references: Sequence[object]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"{name}: hypotheses must have one sentence for each reference, at least one, got "
            f"{len(hypotheses)} for {len(references)}"
        )
