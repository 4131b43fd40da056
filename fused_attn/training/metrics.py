"""Scores of translations: BLEU by sacreBLEU, with its signature, and exact match."""

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


def _check_lengths(name: str, hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"{name}: hypotheses must have one sentence for each reference, at least one, got "
            f"{len(hypotheses)} for {len(references)}"
        )
