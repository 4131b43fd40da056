"""Recordings of an invented alphabet: a monotonic task, as speech is, and exact by construction.

Each letter sounds for a random number of frames. A frame is the letter's sound, a fixed random
vector, with noise. No letter follows itself, so the frames determine the letters as far as the
noise lets them. A recording is several times as long as its text, and every letter occurs in it
more than once: what is said does not tell an attention where to look, only where it looked before.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from .features import FeatureSequences


@dataclass(frozen=True)
class SyntheticSpeech:
    """How recordings sound.

    Attributes:
        letters: Size of the alphabet, 2 to 26: the first letters of the Latin one.
        features: F, numbers in a frame.
        shortest: Fewest letters of a text.
        longest: Most.
        fewest_frames: Fewest frames of a letter.
        most_frames: Most.
        noise: Standard deviation of what is added to each number; that of the sounds is 1.
        voice: Seed of the sounds.

    Raises:
        ValueError: A value is out of range.
    """

    letters: int = 10
    features: int = 8
    shortest: int = 20
    longest: int = 40
    fewest_frames: int = 2
    most_frames: int = 5
    noise: float = 0.5
    voice: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.letters <= 26:
            raise ValueError(f"SyntheticSpeech: letters must be in 2..26, got {self.letters}")
        for low, high in (("shortest", "longest"), ("fewest_frames", "most_frames")):
            least, most = getattr(self, low), getattr(self, high)
            if not 1 <= least <= most:
                raise ValueError(
                    f"SyntheticSpeech: {low} must be in 1..{most} ({high}), got {least}"
                )
        for name, least in (("features", 1), ("noise", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"SyntheticSpeech: {name} must be at least {least}, got {getattr(self, name)}"
                )

    def generate(self, count: int, *, seed: int = 1) -> tuple[FeatureSequences, list[str]]:
        """Return recordings and their texts.

        Args:
            count: How many, at least 1.
            seed: Determines them, with all attributes.
        """
        sounds = np.random.default_rng(self.voice).normal(size=(self.letters, self.features))
        random = np.random.default_rng(seed)
        recordings, texts = [], []
        for _ in range(count):
            length = random.integers(self.shortest, self.longest + 1)
            # Steps of 1 to letters - 1 never lead back to the same letter.
            steps = random.integers(1, self.letters, length)
            steps[0] = random.integers(self.letters)
            text = steps.cumsum() % self.letters
            frames = random.integers(self.fewest_frames, self.most_frames + 1, length)
            clean = sounds[text.repeat(frames)]
            recordings.append(clean + self.noise * random.normal(size=clean.shape))
            texts.append("".join(string.ascii_lowercase[letter] for letter in text))
        return FeatureSequences.from_list(recordings), texts
