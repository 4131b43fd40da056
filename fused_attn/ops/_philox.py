"""Philox 4x32-10 in PyTorch: the random numbers of dropout, as every backend draws them.

The stream is keyed by a 64-bit seed and by the element's logical index in the row-major output,
so a mask depends neither on tiling nor on the backend. Element ``i`` takes word ``i % 4`` of
counter ``(i // 4, 0, 0)``; the words are those of ``triton.language.randint4x(seed, i // 4)``.

Reference: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
https://doi.org/10.1145/2063384.2063405
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A seed ``[1]`` int64 on the device, drawn from PyTorch's generator for that device."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, shape: tuple[int, ...] | torch.Size, dropout_p: float) -> Tensor:
    """Boolean tensor of the given shape, True where dropout keeps the element."""
    count = math.prod(shape)
    counter = torch.arange(-(-count // 4), dtype=torch.int64, device=seed.device)
    threshold = keep_threshold(dropout_p)
    kept = torch.stack([word >= threshold for word in _four_words(seed, counter)], dim=1)
    return kept.flatten()[:count].reshape(shape)


def keep_threshold(dropout_p: float) -> int:
    """An element is kept when its random word is at least this, of 2**32."""
    return min(int(dropout_p * 2.0**32), _LOW)


def random_words(seed: Tensor, index: Tensor) -> Tensor:
    """The 32-bit random word of each element as int64 in ``[0, 2**32)``.

    Args:
        seed: ``[1]`` int64.
        index: Any shape, int64, not negative: logical element indices.
    """
    words = _four_words(seed, index // 4)
    lane = index % 4
    even = torch.where(lane == 0, words[0], words[2])
    odd = torch.where(lane == 1, words[1], words[3])
    return torch.where(lane % 2 == 0, even, odd)


def _four_words(seed: Tensor, counter: Tensor) -> list[Tensor]:
    """The words of each counter, those of its four elements in turn."""
    zero = torch.zeros_like(counter)
    words = [counter & _LOW, counter >> 32, zero, zero]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIERS[0], words[0])
        high_1, low_1 = _multiply(_MULTIPLIERS[1], words[2])
        words = [high_1 ^ words[1] ^ key[0], low_1, high_0 ^ words[3] ^ key[1], low_0]
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    return words


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
