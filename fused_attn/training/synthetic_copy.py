"""English sentences about people and places nobody has heard of, and their German translations.

Every name is drawn anew, so nearly all names of a test set are in no training set and in no
vocabulary; which names go where in the translation depends on the sentence alone. Pairs are exact
by construction: every sentence has one right translation. A model that writes words of its
vocabulary alone translates none of them exactly; one that copies can translate all.

Names are no words of either language's templates. Within a sentence they differ.
"""

from __future__ import annotations

import random

_TEMPLATES = tuple(
    tuple(side.strip() for side in line.split("|"))
    for line in """
    {0} met {1} in {2} . | in {2} hat {0} {1} getroffen .
    {0} sent {1} a letter from {2} . | aus {2} schickte {0} {1} einen brief .
    the train from {0} to {1} is late . | der zug nach {1} aus {0} hat verspätung .
    {0} thinks that {1} lives in {2} . | {0} glaubt , dass {1} in {2} wohnt .
    {0} , {1} and {2} come from {3} . | aus {3} kommen {0} , {1} und {2} .
    did {0} ever travel from {1} to {2} ? | ist {0} je nach {2} von {1} gereist ?
    {0} was born in {1} and died in {2} . | gestorben ist {0} in {2} , geboren in {1} .
    {0} and {1} sold a house in {2} . | in {2} haben {0} und {1} ein haus verkauft .
    nobody in {0} knows {1} . | {1} kennt in {0} niemand .
    {0} is older than {1} , but not as old as {2} . | {2} ist älter als {0} , {0} älter als {1} .
    when {0} called , {1} was already in {2} . | als {0} anrief , war {1} schon in {2} .
    the road from {0} to {1} through {2} is closed . | die straße über {2} nach {1} aus {0} ist zu .
    """.strip().splitlines()
)

_ONSETS = [*"bdfghklmnprstvwz", "br", "dr", "gr", "kr", "tr", "kl", "pl", "st", "sch"]
_VOWELS = [*"aeiou", "ei", "au"]
_ENDS = ["", "", "", "l", "n", "r", "s", "m"]


def copy_words() -> list[str]:
    """Return the words of the templates of both languages: all that is not a name."""
    words: dict[str, None] = {}
    for pair in _TEMPLATES:
        for sentence in pair:
            words |= dict.fromkeys(word for word in sentence.split() if word[0] != "{")
    return list(words)


def generate_copy_pairs(count: int, *, seed: int = 1) -> list[tuple[str, str]]:
    """Return sentence pairs, words and punctuation separated by spaces.

    Args:
        count: How many; all different.
        seed: Determines them.
    """
    choose = random.Random(f"copy {seed}")
    words = set(copy_words())
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < count:
        english, german = choose.choice(_TEMPLATES)
        names: list[str] = []
        while len(names) < english.count("{"):
            name = _name(choose)
            if name not in words and name not in names:
                names.append(name)
        pairs[english.format(*names), german.format(*names)] = None
    return list(pairs)


def _name(choose: random.Random) -> str:
    syllables = [
        choose.choice(_ONSETS) + choose.choice(_VOWELS) for _ in range(choose.randint(2, 3))
    ]
    return "".join(syllables) + choose.choice(_ENDS)
