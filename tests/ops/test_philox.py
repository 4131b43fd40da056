"""The random numbers of dropout are those of the published generator."""

from __future__ import annotations

import pytest
import torch

from fused_attn.ops._philox import draw_seed, keep_mask, keep_threshold, random_words

WORD = 2**32


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 as the paper has it, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_oracle_gives_the_published_answers(counter: str, key: str, words: str) -> None:
    """The known answers of Random123, the authors' own library."""

    def parse(text: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in text.split())

    assert philox(parse(counter), parse(key)) == parse(words)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**62 - 1, -1])
@pytest.mark.parametrize("start", [0, 6, 2**34 - 2, 2**40 + 1])
def test_words_are_philox(seed: int, start: int) -> None:
    index = torch.arange(start, start + 9)
    key = seed % 2**64
    expected = [
        philox((i // 4 % WORD, i // 4 // WORD, 0, 0), (key % WORD, key // WORD))[i % 4]
        for i in index.tolist()
    ]
    assert random_words(torch.tensor([seed]), index).tolist() == expected


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_drops_the_share_asked_for(dropout_p: float) -> None:
    count = 200_000
    kept = keep_mask(torch.tensor([12345]), (400, 500), dropout_p).sum().item()
    deviation = (count * dropout_p * (1.0 - dropout_p)) ** 0.5
    assert abs(kept - count * (1.0 - dropout_p)) < 5.0 * deviation


def test_threshold_at_the_ends() -> None:
    assert keep_threshold(0.0) == 0  # every word is kept
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(1.0 - 2.0**-33) == WORD - 1  # and not 2**32, which wraps to 0


def test_seeds_follow_the_generator() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    first, second = draw_seed(cpu), draw_seed(cpu)
    torch.manual_seed(3)
    assert torch.equal(draw_seed(cpu), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (1,)
