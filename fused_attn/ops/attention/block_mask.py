"""A boolean mask by tiles, which says in advance where there is nothing to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Queries and keys of a tile."""
_WORD = 32
_EMPTY, _FULL, _FIRST_PARTIAL = range(3)
_NAME = "BlockMask"

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which pairs take part, as tiles of 128 queries by 128 keys that are empty, full or partial.

    Attention computes nothing of an empty tile and reads no mask for a full one. Build it once,
    with :meth:`from_mask`, :meth:`from_edges` or :meth:`from_predicate`, and use it in every
    layer; the backward uses the same. Memory: one bit a pair in partial tiles, and three integers
    a tile.
    """

    shape: tuple[int, int]
    """``(T, S)``."""
    tiles: Tensor
    """``[b, h, query tiles, key tiles]`` int32, b and h being 1 or B and H: 0 empty, 1 full,
    n >= 2 partial, with the bits of slot n - 2."""
    bits: Tensor
    """``[slots, 128, 4]`` int32: key s of query t is bit s % 32 of word s // 32 of row t."""
    key_tiles: Tensor
    """``[b, h, query tiles, key tiles]`` int32: for each query tile first its partial key tiles,
    then its full ones, both ascending."""
    key_counts: Tensor
    """``[b, h, query tiles, 2]`` int32: how many of them are partial, how many full."""
    query_tiles: Tensor
    """``[b, h, key tiles, query tiles]`` int32: likewise the query tiles of each key tile."""
    query_counts: Tensor
    """``[b, h, key tiles, 2]`` int32."""

    @classmethod
    def from_mask(cls, mask: Tensor) -> BlockMask:
        """From a boolean mask.

        Args:
            mask: ``[T, S]``, ``[H, T, S]`` or ``[B, H, T, S]``, where B and H may be 1; True
                takes part.

        Raises:
            TypeError: The mask is not boolean.
            ValueError: It has fewer than two or more than four dimensions.
        """
        _check_bool("mask", mask)
        if not 2 <= mask.dim() <= 4:
            raise ValueError(
                f"{_NAME}: mask must have shape [T, S], [H, T, S] or [B, H, T, S], got "
                f"{list(mask.shape)}"
            )
        mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))
        b, h, T, S = mask.shape
        strips = (mask[:, :, t : t + BLOCK] for t in range(0, T, BLOCK))
        return cls._from_strips((b, h, T, S), strips, mask.device)

    @classmethod
    def from_predicate(
        cls,
        predicate: Predicate,
        shape: tuple[int, int, int, int],
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """From a function of indices; never holds more than 128 rows of the mask.

            BlockMask.from_predicate(lambda b, h, t, s: (t - s).abs() % 4 == 0, (1, 1, T, S))

        Args:
            predicate: Takes b, h, t and s, integer tensors that broadcast to ``[b, h, 128, S]``,
                and returns a boolean tensor that does.
            shape: ``(B, H, T, S)``; 1 for B or H where the mask does not depend on them.
            device: Where it is computed and kept.

        Raises:
            TypeError: The predicate does not return a boolean tensor.
            ValueError: The shape has not four sizes, or what the predicate returns does not
                broadcast.
        """
        if len(shape) != 4 or min(shape) < 0:
            raise ValueError(f"{_NAME}: shape must be (B, H, T, S), got {tuple(shape)}")
        B, H, T, S = shape

        def index(size: int, dimension: int, first: int = 0) -> Tensor:
            sizes = [1, 1, 1, 1]
            sizes[dimension] = size
            return torch.arange(first, first + size, device=device).view(sizes)

        def strip(first: int) -> Tensor:
            rows = min(BLOCK, T - first)
            shown = predicate(index(B, 0), index(H, 1), index(rows, 2, first), index(S, 3))
            _check_bool("what the predicate returns", shown)
            try:
                return shown.expand(B, H, rows, S)
            except RuntimeError:
                raise ValueError(
                    f"{_NAME}: what the predicate returns must broadcast to {[B, H, rows, S]}, "
                    f"got {list(shown.shape)}"
                ) from None

        strips = (strip(first) for first in range(0, T, BLOCK))
        return cls._from_strips((B, H, T, S), strips, torch.device(device))

    @classmethod
    def from_edges(cls, edges: Tensor, queries: int, keys: int) -> BlockMask:
        """From the edges of a graph; memory and time follow their number, not T * S.

        Args:
            edges: ``[2, E]`` int32 or int64: query and key of each pair that takes part. Repeated
                edges count once.
            queries: T.
            keys: S.

        Raises:
            TypeError: The edges are no integers.
            ValueError: Their shape is not ``[2, E]``, or one lies outside T x S.
        """
        if edges.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{_NAME}: edges must have dtype int32 or int64, got {edges.dtype}")
        if edges.dim() != 2 or edges.size(0) != 2:
            raise ValueError(f"{_NAME}: edges must have shape [2, E], got {list(edges.shape)}")
        limits = torch.tensor([[queries], [keys]], device=edges.device)
        if bool(((edges < 0) | (edges >= limits)).any()):
            raise ValueError(f"{_NAME}: edges must lie within {queries} queries and {keys} keys")
        rows, columns = _tile_count(queries), _tile_count(keys)
        pairs = torch.unique(edges[0].long() * keys + edges[1].long())
        t, s = pairs // max(keys, 1), pairs % max(keys, 1)
        numbers, slots, counts = torch.unique(
            t // BLOCK * columns + s // BLOCK, return_inverse=True, return_counts=True
        )
        areas = _tile_areas(queries, keys, edges.device).flatten()
        is_full = counts == areas[numbers]
        # Every edge sets a bit of its own, so that adding is setting.
        words = torch.zeros(len(numbers) * BLOCK * BLOCK // _WORD, dtype=torch.int64).to(t)
        place = slots * BLOCK * BLOCK + t % BLOCK * BLOCK + s % BLOCK
        words.scatter_add_(0, place // _WORD, 1 << (place % _WORD))
        bits = words.to(torch.int32).view(-1, BLOCK, BLOCK // _WORD)[~is_full]
        tiles = torch.zeros(rows * columns, dtype=torch.int32, device=edges.device)
        partial = torch.cumsum(~is_full, 0) - 1 + _FIRST_PARTIAL
        tiles[numbers] = torch.where(is_full, _FULL, partial).int()
        return cls._from_tiles((queries, keys), tiles.view(1, 1, rows, columns), bits)

    @classmethod
    def of(cls, shape: tuple[int, int], tensors: Sequence[Tensor]) -> BlockMask:
        """From :meth:`tensors`."""
        return cls(shape, *tensors)

    def tensors(self) -> list[Tensor]:
        """What the private operators take."""
        return [
            self.tiles,
            self.bits,
            self.key_tiles,
            self.key_counts,
            self.query_tiles,
            self.query_counts,
        ]

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on a device."""
        return BlockMask.of(self.shape, [tensor.to(device) for tensor in self.tensors()])

    @property
    def density(self) -> float:
        """Share of tiles that are computed."""
        return float((self.tiles != _EMPTY).float().mean()) if self.tiles.numel() else 0.0

    def dense(self) -> Tensor:
        """As a boolean tensor ``[b, h, T, S]``."""
        b, h, rows, columns = self.tiles.shape
        shift = torch.arange(_WORD, dtype=torch.int32, device=self.bits.device)
        slots = ((self.bits[..., None] >> shift) & 1).bool().view(-1, BLOCK, BLOCK)
        constant = torch.zeros(2, BLOCK, BLOCK, dtype=torch.bool, device=self.bits.device)
        constant[_FULL] = True
        pairs = torch.cat([constant, slots])[self.tiles.long()]  # [b, h, nq, nk, 128, 128]
        T, S = self.shape
        pairs = pairs.transpose(3, 4).reshape(b, h, rows * BLOCK, columns * BLOCK)
        return pairs[:, :, :T, :S]

    def __repr__(self) -> str:
        b, h, rows, columns = self.tiles.shape
        T, S = self.shape
        return (
            f"BlockMask({b} x {h} x {T} x {S}, {rows} x {columns} tiles of {BLOCK} x {BLOCK}, "
            f"{self.density:.0%} computed)"
        )

    @classmethod
    def _from_strips(
        cls, shape: tuple[int, int, int, int], strips: Iterable[Tensor], device: torch.device
    ) -> BlockMask:
        """From masks ``[b, h, <= 128, S]`` of one row of tiles each."""
        b, h, T, S = shape
        columns = _tile_count(S)
        areas = _tile_areas(T, S, device)
        shift = torch.arange(_WORD, device=device)
        rows: list[Tensor] = []
        slots: list[Tensor] = []
        count = _FIRST_PARTIAL
        for i, strip in enumerate(strips):
            padded = torch.zeros(b, h, BLOCK, columns * BLOCK, dtype=torch.bool, device=device)
            padded[:, :, : strip.size(2), :S] = strip
            pairs = padded.view(b, h, BLOCK, columns, BLOCK).transpose(2, 3)
            shown = pairs.sum(dim=(3, 4))  # [b, h, nk]
            is_full, is_empty = shown == areas[i], shown == 0
            is_partial = ~(is_full | is_empty)
            words = pairs[is_partial].view(-1, BLOCK, BLOCK // _WORD, _WORD).long() << shift
            slots.append(words.sum(dim=-1).to(torch.int32))
            numbers = torch.cumsum(is_partial.flatten(), 0).view_as(shown) - 1 + count
            rows.append(torch.where(is_partial, numbers, is_full.long()).int())
            count += len(slots[-1])
        no_rows = torch.zeros(b, h, 0, columns, dtype=torch.int32, device=device)
        tiles = torch.cat([no_rows, *(row[:, :, None] for row in rows)], dim=2)
        no_bits = torch.zeros(0, BLOCK, BLOCK // _WORD, dtype=torch.int32, device=device)
        return cls._from_tiles((T, S), tiles, torch.cat([no_bits, *slots]))

    @classmethod
    def _from_tiles(cls, shape: tuple[int, int], tiles: Tensor, bits: Tensor) -> BlockMask:
        keys = _worklist(tiles)
        queries = _worklist(tiles.transpose(2, 3))
        return cls(shape, tiles.contiguous(), bits.contiguous(), *keys, *queries)


def _worklist(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the last dimension's tiles, partial, full, empty; how many of the first two."""
    is_partial, is_full = tiles >= _FIRST_PARTIAL, tiles == _FULL
    rank = torch.where(is_partial, 0, torch.where(is_full, 1, 2))
    order = torch.argsort(rank, dim=-1, stable=True).int()
    counts = torch.stack([is_partial.sum(dim=-1), is_full.sum(dim=-1)], dim=-1).int()
    return order.contiguous(), counts


def _tile_count(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK


def _tile_areas(queries: int, keys: int, device: torch.device) -> Tensor:
    """Pairs of each tile: ``[query tiles, key tiles]``."""

    def extents(size: int) -> Tensor:
        first = torch.arange(0, size, BLOCK, device=device)
        return (size - first).clamp(max=BLOCK)

    return extents(queries)[:, None] * extents(keys)


def _check_bool(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.bool:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{_NAME}: {name} must have dtype bool, got {dtype}")
