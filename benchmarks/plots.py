"""Draws the pictures of the results, in one style, from the data of `benchmarks.figures`.

Backgrounds are transparent and greys are in the middle, so a picture can be read on a white and on a
dark page. The files are the same to the byte for the same data and the same matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .comparisons import is_ours
from .figures import ENDINGS, PEER_NAMES, Data, stamp

TEXT, FAINT = "#7a8490", "#8b949e"
OURS, PALE, WORSE = "#2f7fd8", "#9cc3ee", "#d07a54"
PEERS = ("#c9973f", "#3f9c86", "#a97bb5", "#c96f7d", "#8f8f5a")
"""Of peers in the order in which they come; told apart by their lightness too."""
_MARKERS = "DsP^v"
_WIDTH = 8.4
_DPI = 192
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "text.color": TEXT,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": TEXT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "fused_attn",
}


def save(kind: str, data: Data, path: Path) -> list[Path]:
    """Draw a picture as SVG and PNG, which carry a hash of their data.

    Args:
        kind: ``headline``, ``roofline``, ``shares`` or ``scaling``.
        data: Of `benchmarks.figures`.
        path: Without an ending.

    Returns:
        The files that were not there, or were another picture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    changed = []
    with matplotlib.rc_context(_STYLE):
        figure = _KINDS[kind](data)
        for ending in ENDINGS:
            target = path.with_name(f"{path.name}.{ending}")
            before = target.read_bytes() if target.exists() else b""
            metadata: dict[str, Any] = {"Description": stamp(data)}
            metadata |= {"Date": None, "Creator": None} if ending == "svg" else {"Software": None}
            figure.savefig(target, dpi=_DPI, transparent=True, metadata=metadata)
            changed += [target] if target.read_bytes() != before else []
        pyplot.close(figure)
    return changed


# --- how many times as fast ----------------------------------------------------------------------


def headline(data: Data) -> Figure:
    """A bar a case: dark to the fastest peer, pale to the slowest, on a logarithmic axis."""
    rows = data["rows"]
    places, y, family = [], 0.0, rows[0]["family"]
    for row in rows:
        y += 0.55 * (row["family"] != family)
        family = row["family"]
        places.append(y)
        y += 1.0
    height = 0.235 * y + 0.95
    figure = pyplot.figure(figsize=(_WIDTH, height))
    bottom, top = 0.36 / height, 1 - 0.56 / height
    axes = figure.add_axes((0.225, bottom, 0.37, top - bottom))
    times = [peer["times"] for row in rows for peer in row["peers"]]
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *times) / 1.05, max(2.0, *times) * 1.1)
    axes.set_ylim(y - 0.4, -0.6)
    for place, row in zip(places, rows, strict=True):
        values = [peer["times"] for peer in row["peers"]]
        best, most = values[0], values[-1]
        axes.barh(place, most - 1, left=1, height=0.72, color=PALE if most >= 1 else WORSE)
        axes.barh(place, best - 1, left=1, height=0.72, color=OURS if best >= 1 else WORSE)
        for value in values[1:-1]:
            axes.plot([value] * 2, [place - 0.36, place + 0.36], color="white", linewidth=0.8)
        words = [f"{_times(peer['times'])} {peer['name']}" for peer in row["peers"]]
        _beside(axes, place, words)
    _families(axes, places, rows)
    axes.axvline(1, color=TEXT, linewidth=1.0)
    axes.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _times(value)))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=2)
    figure.text(0.012, 1 - 0.2 / height, "Times as fast as others", weight="bold", size=10.5)
    figure.text(0.012, 1 - 0.41 / height, data["device"], color=FAINT)
    _legend(
        figure, 0.225, 1 - 0.41 / height, [("■ the fastest other", OURS), ("■ the slowest", PALE)]
    )
    return figure


def _beside(axes: Axes, y: float, words: Sequence[str]) -> None:
    place = {"xy": (1.0, y), "xycoords": ("axes fraction", "data"), "va": "center"}
    offset = {"textcoords": "offset points"}
    axes.annotate(words[0], xytext=(8, 0), weight="bold", size=7.5, **place, **offset)
    if words[1:]:
        text = " · ".join(words[1:])
        axes.annotate(text, xytext=(112, 0), size=7.0, color=FAINT, **place, **offset)


def _families(axes: Axes, places: Sequence[float], rows: Sequence[Data]) -> None:
    axes.set_yticks(places, [row["label"] for row in rows])
    first: dict[str, float] = {}
    for place, row in zip(places, rows, strict=True):
        first.setdefault(row["family"], place)
    for family, place in first.items():
        where = axes.get_yaxis_transform()
        axes.text(-0.575, place, family, transform=where, va="center", weight="bold", size=7.5)


# --- roofline ------------------------------------------------------------------------------------


def roofline(data: Data) -> Figure:
    """A panel an op: each case's operations a second over its operations a byte."""
    ops = data["ops"]
    columns = min(4, len(ops))
    lines = math.ceil(len(ops) / columns)
    height = 1.95 * lines + 0.75
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(_WIDTH, height), sharex=True, sharey=True, squeeze=False
    )
    points = [point for some in ops.values() for point in some]
    peak = max(data["products"].values())
    low = min(point["intensity"] for point in points) / 2
    high = max(max(point["intensity"] for point in points), peak / data["memory"]) * 2.5
    least = min(min(point["ours"], point["peer"]) for point in points) / 2
    for axes, (op, some) in zip(grid.flat, ops.items(), strict=False):
        _roof(axes, data, low, high)
        for point in some:
            x = point["intensity"]
            axes.plot([x, x], [point["peer"], point["ours"]], color=FAINT, linewidth=0.5, zorder=2)
            axes.plot(x, point["peer"], _SHAPES[point["direction"]], markersize=4, zorder=3,
                      markerfacecolor="none", markeredgecolor=PEERS[0], markeredgewidth=0.9)  # fmt: skip
            axes.plot(x, point["ours"], _SHAPES[point["direction"]], markersize=4, zorder=4,
                      color=OURS, markeredgewidth=0)  # fmt: skip
        axes.set_title(op.replace("_", " "))
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(least, peak * 3))
        axes.grid()
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in list(grid.flat)[len(ops) :]:
        axes.set_visible(False)
    figure.subplots_adjust(
        0.085, 0.45 / height, 0.985, 1 - 0.72 / height, wspace=0.08, hspace=0.24
    )
    figure.supxlabel("operations a byte", size=8, y=0.08 / height)
    head = f"Under the roof: {data['device']}, FLOP/s"
    figure.text(0.012, 1 - 0.2 / height, head, weight="bold", size=10.5)
    _legend(
        figure,
        0.012,
        1 - 0.41 / height,
        [
            ("● ours", OURS),
            ("○ the fastest other", PEERS[0]),
            ("circle: forward, triangle: backward, square: both", FAINT),
        ],
    )
    return figure


_SHAPES = {"forward": "o", "backward": "^", "forward+backward": "s"}


def _roof(axes: Axes, data: Data, low: float, high: float) -> None:
    """Memory's slope, the cache's as a dashed line, and the ceilings of products."""
    peak = max(data["products"].values())
    ridge = peak / data["memory"]
    axes.plot([low, ridge, high], [low * data["memory"], peak, peak], color=TEXT, linewidth=1.1)
    ridge = peak / data["cache"]
    if data["cache"] > 1.2 * data["memory"] and ridge > low:
        axes.plot([low, ridge], [low * data["cache"], peak], "--", color=TEXT, linewidth=0.8)
    for rate in data["products"].values():
        if rate < peak:
            axes.plot([rate / data["memory"], high], [rate] * 2, color=TEXT, linewidth=0.7)


# --- shares of the roof --------------------------------------------------------------------------


def shares(data: Data) -> Figure:
    """A bar a case for ours and a mark a peer, in a panel a direction."""
    panels = data["panels"]
    labels = list(dict.fromkeys(row["label"] for rows in panels.values() for row in rows))
    places = {label: i for i, label in enumerate(labels)}
    peers = list(
        dict.fromkeys(name for rows in panels.values() for row in rows for name in row["peers"])
    )
    height = 0.19 * len(labels) + 1.15
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(_WIDTH, height), sharey=True, squeeze=False
    )
    most = max(row["ours"] for rows in panels.values() for row in rows)
    for axes, (direction, rows) in zip(grid[0], panels.items(), strict=True):
        for row in rows:
            y = places[row["label"]]
            axes.barh(y, row["ours"], height=0.7, color=OURS)
            for i, name in enumerate(peers):
                if name in row["peers"]:
                    axes.plot(row["peers"][name], y, _MARKERS[i % 5], color=PEERS[i % 5],
                              markersize=4.2, markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
        axes.axvline(1, color=TEXT, linewidth=1.0)
        axes.set_title(direction.replace("+", " + "))
        axes.set_xlim(0, max(1.05, 1.05 * most))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    left = 0.02 + 0.0082 * max(len(label) for label in labels)
    figure.subplots_adjust(left, 0.28 / height, 0.98, 1 - 0.72 / height, wspace=0.08)
    op = data["op"].replace("_", " ")
    figure.text(
        0.012, 1 - 0.2 / height, f"Share of the roof: {op}, {data['device']}", weight="bold", size=10.5
    )
    glyphs = {"D": "◆", "s": "■", "P": "✚", "^": "▲", "v": "▼"}
    names = [
        (f"{glyphs[_MARKERS[i % 5]]} {name}", PEERS[i % 5]) for i, name in enumerate(peers)
    ]
    _legend(figure, 0.012, 1 - 0.41 / height, [("■ ours", OURS), *names])
    return figure


# --- against sizes -------------------------------------------------------------------------------


def scaling(data: Data) -> Figure:
    """Time and memory of an op against each of its sizes, on logarithmic axes."""
    panels = data["panels"]
    dimensions = list(dict.fromkeys(panel["dimension"] for panel in panels))
    ways = list(dict.fromkeys((panel["direction"], panel["dtype"]) for panel in panels))
    figure_rows = [(way, what) for way in ways for what in ("time", "memory")]
    height = 1.75 * len(figure_rows) + 0.85
    width = min(_WIDTH, 1.0 + 2.6 * len(dimensions))
    figure, grid = pyplot.subplots(
        len(figure_rows), len(dimensions), figsize=(width, height), squeeze=False, sharex="col",
        sharey="row",
    )  # fmt: skip
    providers = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    others = [name for name in providers if not is_ours(name)]
    for i, (way, what) in enumerate(figure_rows):
        for j, dimension in enumerate(dimensions):
            axes = grid[i][j]
            wanted = (dimension, *way)
            found = [p for p in panels if (p["dimension"], p["direction"], p["dtype"]) == wanted]
            for panel in found:
                _lines(axes, panel, what, others)
            axes.set(xscale="log", yscale="log")
            axes.grid()
            axes.tick_params(which="minor", length=0)
            if i == len(figure_rows) - 1:
                axes.set_xlabel(dimension, weight="bold")
            if j == 0:
                several = f" {way[1]}" if len({dtype for _, dtype in ways}) > 1 else ""
                axes.set_ylabel("ms" if what == "time" else "MB held")
                axes.set_title(f"{way[0].replace('+', ' + ')}{several}, {what}", size=8)
    _size_ticks(grid, panels, dimensions)
    figure.subplots_adjust(
        0.62 / width, 0.45 / height, 1 - 0.12 / width, 1 - 0.8 / height, wspace=0.08, hspace=0.3
    )
    op = data["op"].replace("_", " ")
    x = 0.1 / width
    figure.text(x, 1 - 0.2 / height, f"{op}: {data['device']}", weight="bold", size=10.5)
    names = [("● ours", OURS)]
    names += [(f"● {PEER_NAMES.get(name, name)}", _peer_color(others, name)) for name in others]
    _legend(figure, x, 1 - 0.41 / height, [*names, ("- - the model", TEXT)])
    return figure


def _lines(axes: Axes, panel: Data, what: str, others: Sequence[str]) -> None:
    drawn_model = False
    for name, points in panel["lines"].items():
        ours = is_ours(name)
        color = OURS if ours else _peer_color(others, name)
        style = {"color": color, "linewidth": 1.6 if ours else 1.0, "zorder": 4 if ours else 3}
        values = [point["value"] for point in points]
        if what == "time":
            axes.plot(values, [p["p50_ms"] for p in points], "o-", markersize=2.6, **style)
            bounds = [p["p20_ms"] for p in points], [p["p80_ms"] for p in points]
            axes.fill_between(values, *bounds, color=color, alpha=0.2, linewidth=0)
        else:
            held = [p["peak_bytes"] / 1e6 if p["peak_bytes"] else math.nan for p in points]
            axes.plot(values, held, "o-", markersize=2.6, **style)
        model = [p["floor_ms" if what == "time" else "held_bytes"] for p in points]
        if not drawn_model and all(model):
            scale = 1.0 if what == "time" else 1e-6
            axes.plot(values, [v * scale for v in model], "--", color=TEXT, linewidth=1.0)
            drawn_model = True


def _size_ticks(grid: Any, panels: Sequence[Data], dimensions: Sequence[str]) -> None:
    """A tick where it was measured, every second where that is close."""
    for j, dimension in enumerate(dimensions):
        lines = (p["lines"].values() for p in panels if p["dimension"] == dimension)
        values = sorted({point["value"] for some in lines for line in some for point in line})
        axes = grid[-1][j]
        step = math.ceil(len(values) / 5)
        axes.xaxis.set_major_locator(FixedLocator(values[::-step][::-1]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    for row in grid:
        row[0].yaxis.set_major_locator(LogLocator(numticks=6))
        row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# --- words ---------------------------------------------------------------------------------------


def _legend(figure: Figure, x: float, y: float, words: Sequence[tuple[str, str]]) -> None:
    """Words in the colours that they explain, one after the other."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width = figure.get_figwidth() * figure.dpi
    for word, color in words:
        text = figure.text(x, y, word, color=color, size=8)
        x += text.get_window_extent(renderer).width / width + 0.022


def _peer_color(others: Sequence[str], name: str) -> str:
    return PEERS[list(others).index(name) % len(PEERS)]


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 or value in (1, 2, 5) else f"{value:.3g}×"


def _rate(value: float) -> str:
    return _with_unit(value, ((1e12, "T"), (1e9, "G"), (1e6, "M")))


def _count(value: float) -> str:
    return _with_unit(value, ((1 << 20, "Mi"), (1 << 10, "Ki"))) if value % 1024 == 0 else f"{value:g}"


def _with_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


_KINDS = {"headline": headline, "roofline": roofline, "shares": shares, "scaling": scaling}
