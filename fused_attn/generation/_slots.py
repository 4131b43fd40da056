"""The places of a running batch: what generation keeps on the device for each source in it.

Shapes are fixed while a batch runs, but for room that doubles when it is used up: a source that
has finished leaves its place to one that waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ._finished import Finished

# What a place holds where a tensor is larger than its source needs.
_FILL = {"forced": -1, "shortlist": -1}


@dataclass
class Slots:
    """B places with K beams each, cut into G groups; see ``Slots.fresh`` for those of a start."""

    tokens: Tensor
    """``[B, K]`` int64: the last token of each target."""
    scores: Tensor
    """``[B, K]`` fp32: sums of log-probabilities; -inf for a beam that is not."""
    steps: Tensor
    """``[B, 1]`` int64: tokens so far."""
    limits: Tensor
    """``[B, 1]`` int64: most tokens."""
    source_lengths: Tensor
    """``[B, 1]`` int64."""
    numbers: Tensor
    """``[B, 1]`` int64: the source's number in its call."""
    done: Tensor
    """``[B, G]`` bool."""
    failed: Tensor
    """``[B]`` int64: the step at which the logits held NaN or +inf; 0: none did."""
    pool_scores: Tensor
    """``[B, K]``: ``Finished`` of all groups one after the other."""
    pool_sums: Tensor
    pool_paths: Tensor
    moves: Tensor
    """``[B, capacity, K]`` int64: token * K + parent of each step, from which hypotheses are read
    off, last step first, when the source leaves. Nothing is moved when beams change places."""
    sums: Tensor
    """``[B, capacity, K]`` fp32: the scores after each step."""
    prefixes: Tensor | None
    """``[B, K, capacity + 1]`` int64: the targets in order, where constraints look back."""
    forced: Tensor | None
    """``[B, P + 1]`` int64: the tokens that must come first, then -1."""
    shortlist: Tensor | None
    """``[B, N]`` int64, ascending, then -1."""
    coverage: Tensor | None
    """``[B, K, S]`` fp32: attention that each source position got."""

    @property
    def capacity(self) -> int:
        """Steps that there is room for."""
        return self.moves.size(1)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def select(self, rows: Tensor) -> None:
        """Keep these places only."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.index_select(0, rows))

    def put(self, rows: Tensor, other: Slots) -> None:
        """Let the places of ``other`` take these."""
        incoming = other.tensors()
        for name, tensor in self.tensors().items():
            shape = [max(pair) for pair in zip(tensor.shape, incoming[name].shape, strict=True)]
            tensor = _padded(tensor, shape, _FILL.get(name, 0))
            arriving = _padded(incoming[name], shape, _FILL.get(name, 0))
            setattr(self, name, tensor.index_copy_(0, rows, arriving))

    def grow(self, capacity: int) -> None:
        """Make room for that many steps."""
        B, _, K = self.moves.shape
        self.moves = _padded(self.moves, [B, capacity, K], 0)
        self.sums = _padded(self.sums, [B, capacity, K], 0)
        if self.prefixes is not None:
            self.prefixes = _padded(self.prefixes, [B, K, capacity + 1], 0)

    def pool(self, groups: int) -> Finished:
        """The pools ``[B, G, K / G]``, views."""
        return Finished(
            *(
                field.unflatten(1, (groups, -1))
                for field in (self.pool_scores, self.pool_sums, self.pool_paths)
            )
        )


def _padded(tensor: Tensor, shape: list[int], fill: int) -> Tensor:
    """The tensor itself where it is of that shape but for the places, else a larger copy."""
    padding: list[int] = []
    for size, wanted in zip(reversed(tensor.shape[1:]), reversed(shape[1:]), strict=True):
        padding += [0, wanted - size]
    return F.pad(tensor, padding, value=fill) if any(padding) else tensor


def last_row(table: Tensor, steps: Tensor) -> Tensor:
    """Entry ``min(steps, size - 1)`` of each row of ``[B, N]``: ``[B]``."""
    return table.gather(1, steps.clamp(max=table.size(1) - 1))[:, 0]


def row_index(steps: Tensor, beams: int) -> Tensor:
    """Where this step is in ``[B, capacity, K]``: ``[B, 1, K]``."""
    return steps[:, :, None].expand(-1, 1, beams)


def move(tokens: Tensor, parents: Tensor) -> Tensor:
    """``Slots.moves`` of a step."""
    return tokens * tokens.size(1) + parents
