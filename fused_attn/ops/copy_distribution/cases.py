"""Named cases of ``copy_distribution`` and ``copy_nll``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._cases import ELEMENTARY, Case
from .api import copy_distribution, copy_nll

IGNORED = -100

# Of five rows, the one whose target is neither in the vocabulary nor in the source, and the one
# without a loss.
_WITHOUT_WORD = (2, 4)


@dataclass(frozen=True, kw_only=True)
class CopyDistributionCase(Case):
    """``copy_nll`` of rows ``[*leading]``, or ``copy_distribution`` where ``all_words``."""

    op: ClassVar[str] = "copy_distribution"
    differentiable: ClassVar[tuple[str, ...]] = ("logits", "copy", "gate")

    leading: tuple[int, ...]
    vocabulary: int
    positions: int
    extra: int = 4
    """Words that only sources have."""
    gate: bool = True
    all_words: bool = False
    lengths: tuple[int, ...] | None = None
    """Of the sources. What is behind them is garbage."""
    fp32_copy: bool = False
    """Weights or scores, and the gate, are in fp32 whatever the logits are."""
    one_source: bool = True
    """All rows of a batch have one source: ``source_tokens`` is ``[B, 1, ..., S]``."""
    repeated: int = 0
    """The source has only so many different words; 0: as they come."""
    scale: float = 1.0
    """Of logits and scores."""
    gate_offset: float = 0.0
    masked: float = 0.0
    """Share of the logits, and of the scores, that are -inf."""
    nothing: str = ""
    """``generated``: all logits are -inf in every other row; ``at all``: the scores too."""
    no_weights: bool = False
    """All weights are 0."""
    layout: str = "contiguous"
    """``contiguous``, ``transposed`` (the first two dimensions), ``sliced`` (rows with gaps) or
    ``columns_first``."""

    @property
    def extended(self) -> int:
        """Words of vocabulary and sources."""
        return self.vocabulary + self.extra

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Normal logits and scores, or weights that sum to 1; targets of every sort."""

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        def draw_words(high: int, *sizes: int) -> Tensor:
            return torch.randint(high, sizes, generator=generator)

        B, S = self.leading[0], self.positions
        logits = self.scale * draw(*self.leading, self.vocabulary)
        scores = self.scale * draw(*self.leading, S)
        leading = (B, *(1 for _ in self.leading[1:])) if self.one_source else self.leading
        tokens = draw_words(self.extended, *leading, S)
        if self.repeated:
            words = draw_words(self.extended, self.repeated)
            tokens = words[tokens % self.repeated]
        self._mask(logits, generator)
        behind = torch.zeros(*self.leading, S, dtype=torch.bool)
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        if lengths is not None:
            behind |= torch.arange(S) >= lengths.view(-1, *(1 for _ in self.leading))
        if self.gate:
            nothing = behind.all(dim=-1, keepdim=True)
            copy = scores.masked_fill(behind & ~nothing, -math.inf).softmax(dim=-1)
            copy = torch.zeros_like(copy) if self.no_weights else copy
        else:
            copy = scores
            self._mask(copy, generator)
        targets = self._targets(tokens.expand(*self.leading, S), behind, draw_words)
        copy = copy.masked_fill(behind, math.nan)
        tokens = tokens.masked_fill(behind[..., : tokens.size(-2), :], 2**60) if S else tokens

        beside = torch.float32 if self.fp32_copy and dtype != torch.float64 else dtype
        call: dict[str, Any] = {
            "logits": self._lay_out(logits.to(device, dtype)),
            "copy": self._lay_out(copy.to(device, beside)),
            "source_tokens": tokens.to(device),
        }
        if self.gate:
            gate = draw(*self.leading) + self.gate_offset
            call["gate"] = gate.to(device, beside)
        if lengths is not None:
            call["source_lengths"] = lengths.to(device)
        if self.all_words:
            call["extended_size"] = self.extended
        else:
            call["targets"] = targets.to(device)
        return call

    def _mask(self, numbers: Tensor, generator: torch.Generator) -> None:
        numbers[torch.rand(numbers.shape, generator=generator) < self.masked] = -math.inf
        is_score = numbers.size(-1) == self.positions
        if self.nothing == "at all" or (self.nothing == "generated" and not is_score):
            numbers.flatten(0, -2)[::2] = -math.inf

    def _targets(self, tokens: Tensor, behind: Tensor, draw_words: Any) -> Tensor:
        """A word of the vocabulary, of the source, of neither, or none, from row to row."""
        targets = draw_words(self.vocabulary, *self.leading)
        kind = torch.arange(targets.numel()).view(targets.shape) % 5
        if self.positions:
            place = draw_words(self.positions, *self.leading)[..., None]
            source = tokens.gather(-1, place).squeeze(-1)
            in_source = ~behind.gather(-1, place).squeeze(-1)
            targets = torch.where((kind % 2 == 1) & in_source, source, targets)
        unknown, ignored = _WITHOUT_WORD
        targets[kind == unknown] = self.extended
        targets[kind == ignored] = IGNORED
        return targets

    def _lay_out(self, tensor: Tensor) -> Tensor:
        if self.layout == "transposed":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "sliced":
            wide = tensor.new_zeros(*tensor.shape[:-1], tensor.size(-1) + 7)
            wide[..., : tensor.size(-1)] = tensor
            return wide[..., : tensor.size(-1)]
        if self.layout == "columns_first":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        return tensor

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Log-probabilities, or negative ones of the targets."""
        function = copy_distribution if self.all_words else copy_nll
        return (function(**inputs, backend=backend),)

    @property
    def _rows(self) -> int:
        return math.prod(self.leading)

    @property
    def _scored(self) -> int:
        """Rows that must be looked at: of the losses, those whose target is some word."""
        if self.all_words:
            return self._rows
        return sum(row % 5 not in _WITHOUT_WORD for row in range(self._rows))

    def flops(self, backward: bool = False) -> int:
        """An exponential and an addition a logit, and as much a score.

        Of all words also the addition that makes a log-probability, and one a weight. Backward the
        exponential and a product; of all words the sum of the gradients and a multiply-add.
        """
        words = self.vocabulary * (ELEMENTARY + 1)
        if self.all_words:
            words += self.vocabulary * (2 if backward else 1)
        score = int(self.all_words) if self.gate else ELEMENTARY + 1
        return self._scored * (words + score * self.positions)

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """The logits once, and tokens and numbers of the positions.

        Of all words also the log-probabilities once. Backward writes the gradients of the logits
        and the positions' besides, and reads those of the log-probabilities. A row whose target is
        no word is not read, but its gradients are written.
        """
        copy_size = 4 if self.fp32_copy else itemsize
        row = self.vocabulary * itemsize + self.positions * copy_size
        moved = (self._scored + (self._rows if backward else 0)) * row
        moved += self._rows * self.extended * 4 if self.all_words else 0
        sources = self.leading[0] if self.one_source else self._rows
        return moved + sources * self.positions * 8


_ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _edge(name: str, **options: Any) -> CopyDistributionCase:
    """In fp32, since a dtype is but a matter of loads and stores."""
    sizes: dict[str, Any] = {"leading": (3, 2), "vocabulary": 37, "positions": 6}
    sizes["dtypes"] = (torch.float32,)
    return CopyDistributionCase(name=name, kind="edge", **(sizes | options))


def _both(name: str, **options: Any) -> tuple[CopyDistributionCase, CopyDistributionCase]:
    """``copy_nll`` and ``copy_distribution``."""
    return _edge(f"nll_{name}", **options), _edge(f"words_{name}", all_words=True, **options)


def _benchmark(
    name: str, leading: tuple[int, ...], vocabulary: int, positions: int, **options: Any
) -> CopyDistributionCase:
    return CopyDistributionCase(
        name=name,
        kind="benchmark",
        leading=leading,
        vocabulary=vocabulary,
        positions=positions,
        extra=100,
        **options,
    )


CASES: tuple[CopyDistributionCase, ...] = (
    *(
        CopyDistributionCase(
            name=name,
            kind="typical",
            leading=(2, 2),
            vocabulary=50,
            positions=7,
            gate=gate,
            all_words=not gate,
            lengths=(7, 4),
        )
        for name, gate in (("typical_nll", True), ("typical_words_copynet", False))
    ),
    _edge("words_lengths", lengths=(6, 2, 4), all_words=True),
    _edge("nll_lengths_copynet", lengths=(6, 2, 4), gate=False),
    *_both("smooth", leading=(2, 3), vocabulary=5, positions=4, gradcheck=True),
    *_both(
        "smooth_copynet",
        leading=(2, 3),
        vocabulary=5,
        positions=6,
        gate=False,
        repeated=2,
        lengths=(6, 3),
        gradcheck=True,
    ),
    *_both("repeated", positions=40, repeated=5),
    *_both("repeated_copynet", positions=40, repeated=5, gate=False, dtypes=_ALL_DTYPES),
    *_both("own_sources", one_source=False, layout="transposed", dtypes=_ALL_DTYPES),
    *_both("one_row_each", leading=(7,), lengths=(6, 0, 1, 6, 5, 2, 3), layout="sliced"),
    *_both("masked", masked=0.4, gate=False, lengths=(6, 3, 0), dtypes=_ALL_DTYPES),
    *_both("nothing_generated", nothing="generated"),
    _edge("words_nothing_generated_copynet", nothing="generated", gate=False, all_words=True),
    *_both("nothing_at_all", nothing="at all", gate=False, vocabulary=5),
    _edge("words_no_weights", no_weights=True, all_words=True),
    *_both("large_logits", scale=30.0, dtypes=_ALL_DTYPES),
    _edge("words_large_logits_copynet", scale=30.0, gate=False, all_words=True),
    *_both("closed_gate", gate_offset=-30.0),
    *_both("open_gate", gate_offset=30.0),
    _edge("nll_fp32_copy", fp32_copy=True, layout="columns_first", dtypes=_ALL_DTYPES),
    _edge(
        "words_fp32_copy_copynet", fp32_copy=True, gate=False, all_words=True, dtypes=_ALL_DTYPES
    ),
    _edge("words_no_source", positions=0, all_words=True),
    _edge("nll_no_source_copynet", positions=0, gate=False),
    *_both("empty_sources", lengths=(0, 0, 0)),
    *_both("no_rows", leading=(0, 3)),
    *_both("pointer_network", vocabulary=3, positions=17, extra=17, gate=False, lengths=(17, 9, 1)),
    *_both("one_word", vocabulary=1, positions=5, extra=3, gate=False),
    *_both("vocabulary_2053", leading=(2, 1, 2), vocabulary=2053, positions=67, dtypes=_ALL_DTYPES),
    _edge("nll_vocabulary_8192_copynet", leading=(2, 2), vocabulary=8192, positions=64, gate=False),
    _benchmark("nll_1024x32000_gate", (16, 64), 32000, 64),
    _benchmark("nll_1024x32000_copynet", (16, 64), 32000, 64, gate=False),
    _benchmark("words_64x32000_gate", (16, 4), 32000, 64, all_words=True),
    _benchmark("words_64x32000_copynet", (16, 4), 32000, 64, gate=False, all_words=True),
)
