"""Draws the pictures of attention.md: ``python docs/pictures.py [folder]`` or ``make docs``.

Every picture is made by the library: the weights that `attention` returns for equal logits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from torch import Tensor

from fused_attn import BlockMask, attention

FOLDER = Path(__file__).parent / "images"
SHORT, LONG = 10, 16


class Panel(NamedTuple):
    """One mask: what `attention` is called with, for T queries and S keys."""

    title: str
    options: dict[str, Any]
    T: int = SHORT
    S: int = LONG
    tile: int = 0
    """Lines every so many, where tiles matter."""


_LENGTHS = {"query_lengths": torch.tensor([7]), "key_lengths": torch.tensor([12])}
_HOLES = torch.rand(SHORT, LONG, generator=torch.Generator().manual_seed(2)) < 0.6
_HOLES[4] = False
_RING = torch.arange(12)
_EDGES = torch.cat([torch.stack([_RING, (_RING + step) % 12]) for step in (0, 1, -1, 5)], dim=1)

PICTURES: dict[str, tuple[Panel, ...]] = {
    "causal": (
        Panel("is_causal", {"is_causal": True}),
        Panel("align='lower_right'", {"is_causal": True, "align": "lower_right"}),
        Panel(
            "lower_right, lengths 7 and 12",
            {"is_causal": True, "align": "lower_right", **_LENGTHS},
        ),
    ),
    "window": (
        Panel("window=(3, 1)", {"window": (3, 1)}),
        Panel("window=(3, 1), lower_right", {"window": (3, 1), "align": "lower_right"}),
        Panel("window=(3, None), is_causal", {"window": (3, None), "is_causal": True}),
    ),
    "lengths": (
        Panel("lengths 7 and 12", _LENGTHS),
        Panel("mask, an empty row", {"mask": _HOLES}),
        Panel("mask and is_causal", {"mask": _HOLES, "is_causal": True}),
    ),
    "alibi": (
        Panel("alibi_slopes = 0.3", {"alibi_slopes": torch.tensor([0.3])}, SHORT, SHORT),
        Panel(
            "with is_causal", {"alibi_slopes": torch.tensor([0.3]), "is_causal": True}, SHORT, SHORT
        ),
        Panel("edges of a graph", {"block_mask": BlockMask.from_edges(_EDGES, 12, 12)}, 12, 12),
    ),
    "blocks": (
        Panel(
            "predicate: |t - s| < 150",
            {
                "block_mask": BlockMask.from_predicate(
                    lambda b, h, t, s: (t - s).abs() < 150, (1, 1, 640, 768)
                )
            },
            640,
            768,
            128,
        ),
        Panel(
            "a global prefix and a diagonal",
            {
                "block_mask": BlockMask.from_predicate(
                    lambda b, h, t, s: (s < 60) | (t // 128 == s // 128), (1, 1, 640, 768)
                )
            },
            640,
            768,
            128,
        ),
    ),
}


def weights(panel: Panel) -> Tensor:
    """``[T, S]``: what each query makes of keys that are all alike."""
    nothing = torch.zeros(1, 1, max(panel.T, panel.S), 1)
    query, key = nothing[:, :, : panel.T], nothing[:, :, : panel.S]
    _, found = attention(query, key, key, **panel.options, return_weights="mean")
    return found[0]


def draw(name: str, folder: Path) -> Path:
    """Draw one picture as ``<name>.png``."""
    panels = PICTURES[name]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        shares = weights(panel)
        peaks = shares.amax(dim=1, keepdim=True).clamp(min=1e-30)
        # Rows have different sums of keys: shown relative to each row's largest.
        axis.imshow((shares / peaks).numpy(), cmap="Blues", vmin=0.0, vmax=1.3, aspect="equal")
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel("key s", fontsize=8)
        axis.set_ylabel("query t", fontsize=8)
        axis.tick_params(labelsize=7)
        step = panel.tile or 1
        axis.set_xticks([x - 0.5 for x in range(0, panel.S + 1, step)], minor=True)
        axis.set_yticks([y - 0.5 for y in range(0, panel.T + 1, step)], minor=True)
        axis.grid(which="minor", color="0.8" if not panel.tile else "0.4", linewidth=0.5)
        axis.tick_params(which="minor", length=0)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for picture in PICTURES:
        print(draw(picture, target))
