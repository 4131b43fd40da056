"""The tiles of a mask, against the mask."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import BlockMask
from fused_attn.ops.attention.block_mask import BLOCK

SHAPES = ((1, 1, 1, 1), (2, 1, 128, 128), (1, 3, 129, 255), (2, 2, 300, 500), (1, 1, 640, 100))


def blocky(*shape: int, seed: int = 0) -> Tensor:
    """A mask with empty, full and mixed tiles."""
    generator = torch.Generator().manual_seed(seed)
    *leading, T, S = shape
    draw = torch.rand((*leading, -(-T // BLOCK), -(-S // BLOCK)), generator=generator)
    draw = draw.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :T, :S]
    noise = torch.rand(shape, generator=generator) < 0.5
    return (draw > 0.66) | ((draw > 0.33) & noise)


def state(mask: Tensor, i: int, j: int) -> int:
    """0, 1 or 2 for an empty, full or partial tile of a mask [T, S]."""
    tile = mask[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
    return 0 if not tile.any() else 1 if tile.all() else 2


@pytest.mark.parametrize("shape", SHAPES)
def test_says_of_each_tile_what_the_mask_says(shape: tuple[int, int, int, int]) -> None:
    mask = blocky(*shape)
    blocks = BlockMask.from_mask(mask)
    assert torch.equal(blocks.dense(), mask)
    b, h, rows, columns = blocks.tiles.shape
    for x in range(b):
        for y in range(h):
            want = torch.tensor(
                [[state(mask[x, y], i, j) for j in range(columns)] for i in range(rows)]
            )
            assert torch.equal(blocks.tiles[x, y].clamp(max=2).long(), want)
            for order, counts, states in (
                (blocks.key_tiles, blocks.key_counts, want),
                (blocks.query_tiles, blocks.query_counts, want.t()),
            ):
                for i, row in enumerate(states):
                    partial, full = (row == 2).nonzero()[:, 0], (row == 1).nonzero()[:, 0]
                    assert counts[x, y, i].tolist() == [len(partial), len(full)]
                    listed = order[x, y, i, : len(partial) + len(full)]
                    assert listed.tolist() == [*partial.tolist(), *full.tolist()]
    assert int((blocks.tiles >= 2).sum()) == len(blocks.bits)
    assert blocks.tiles[blocks.tiles >= 2].unique().numel() == len(blocks.bits)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_predicate_gives_what_its_mask_gives(shape: tuple[int, int, int, int]) -> None:
    mask = blocky(*shape)
    a = BlockMask.from_mask(mask)
    b = BlockMask.from_predicate(lambda b, h, t, s: mask[b, h, t, s], shape)
    assert a.shape == b.shape
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(x, y)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_edges_give_what_their_mask_gives(T: int, S: int, seed: int) -> None:
    mask = blocky(T, S, seed=seed)
    edges = mask.nonzero().t()
    shuffled = torch.cat([edges, edges[:, :3]], dim=1).flip(1)
    a, b = BlockMask.from_mask(mask), BlockMask.from_edges(shuffled.int(), T, S)
    assert torch.equal(b.dense(), mask[None, None])
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(x, y)


def test_edges_of_a_large_sparse_graph_take_little_memory() -> None:
    N = 100_000  # as a mask: 10 GB
    ring = torch.arange(N)
    blocks = BlockMask.from_edges(torch.stack([ring, (ring + 1) % N]), N, N)
    assert sum(t.numel() * t.element_size() for t in blocks.tensors()) < 20e6
    assert blocks.density < 0.01
    assert int(blocks.bits.bitwise_count().sum() if hasattr(Tensor, "bitwise_count") else N) == N


def test_nothing_and_no_rows() -> None:
    empty = BlockMask.from_edges(torch.zeros(2, 0, dtype=torch.int64), 200, 300)
    assert empty.density == 0.0
    assert not empty.dense().any()
    for T, S in ((0, 5), (5, 0), (0, 0)):
        blocks = BlockMask.from_mask(torch.ones(T, S, dtype=torch.bool))
        assert blocks.dense().shape == (1, 1, T, S)


def test_moves_and_shows_itself() -> None:
    blocks = BlockMask.from_mask(blocky(2, 1, 300, 500))
    moved = blocks.to("cpu")
    assert moved.shape == blocks.shape
    assert torch.equal(moved.dense(), blocks.dense())
    assert repr(blocks).startswith("BlockMask(2 x 1 x 300 x 500, 3 x 4 tiles of 128 x 128, ")


_BOOL = torch.ones(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: BlockMask.from_mask([1]), TypeError, "mask must be a tensor, got list"),
        (lambda: BlockMask.from_mask(_BOOL.int()), TypeError, "mask must have dtype bool"),
        (lambda: BlockMask.from_mask(_BOOL[0]), ValueError, "mask must have shape [T, S], [H, T"),
        (
            lambda: BlockMask.from_edges(torch.zeros(2, 3), 4, 4),
            TypeError,
            "edges must have dtype int32 or int64, got torch.float32",
        ),
        (
            lambda: BlockMask.from_edges(torch.zeros(3, 2).long(), 4, 4),
            ValueError,
            "edges must have shape [2, E], got [3, 2]",
        ),
        (
            lambda: BlockMask.from_edges(torch.tensor([[0], [4]]), 5, 4),
            ValueError,
            "edges must lie within 5 queries and 4 keys",
        ),
        (
            lambda: BlockMask.from_edges(torch.tensor([[-1], [0]]), 5, 4),
            ValueError,
            "edges must lie within 5 queries and 4 keys",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, t, s: t - s, (1, 1, 4, 4)),
            TypeError,
            "what the predicate returns must have dtype bool, got int64",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, t, s: _BOOL[:3, :3], (1, 1, 4, 4)),
            ValueError,
            "what the predicate returns must broadcast to [1, 1, 4, 4], got [3, 3]",
        ),
        (
            lambda: BlockMask.from_predicate(lambda b, h, t, s: t > s, (4, 4)),
            ValueError,
            "shape must be (B, H, T, S), got (4, 4)",
        ),
    ],
    ids=lambda value: re.sub(r"\W+", "_", value)[:50] if isinstance(value, str) else None,
)
def test_errors(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"BlockMask: {message}")):
        build()
