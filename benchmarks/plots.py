"""Draws the pictures of the results, in one style, from the data of `benchmarks.figures`.

Backgrounds are transparent and greys are in the middle, so a picture can be read on a white and on
a dark page. The files are the same to the byte for the same data and the same matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .comparisons import is_ours
from .figures import ENDINGS, PEER_NAMES, Data, stamp

TEXT, FAINT = "#7a8490", "#8b949e"
OURS, PALE, WORSE = "#2f7fd8", "#86b4e8", "#d07a54"
PEERS = ("#c9973f", "#3f9c86", "#a97bb5", "#c96f7d", "#8f8f5a")
"""Of peers in the order in which they come; told apart by their lightness too."""
_MARKERS = "DsP^v"
_CACHED = 1.2
"""Times as fast as memory, from which a cache has a line of its own."""
_WIDTH = 8.4
_GAP = 0.02
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
    with matplotlib.rc_context(_STYLE):
        figure = _KINDS[kind](data)
        contents = {"svg": _svg(figure, stamp(data)), "png": _png(figure, stamp(data))}
        pyplot.close(figure)
    changed = []
    for ending in ENDINGS:
        target = path.with_name(f"{path.name}.{ending}")
        if not target.exists() or target.read_bytes() != contents[ending]:
            target.write_bytes(contents[ending])
            changed.append(target)
    return changed


def _svg(figure: Figure, description: str) -> bytes:
    """With two decimals, which are more than anybody sees, and without indentation."""
    into = io.BytesIO()
    metadata = {"Description": description, "Date": None, "Creator": None}
    figure.savefig(into, format="svg", transparent=True, metadata=metadata)
    text = re.sub(r"(?<=\d)\.(\d\d)\d+", r".\1", into.getvalue().decode())
    text = re.sub(r" *\n(?=[MLQCz\"])| *<!--.*?-->", "", text)
    return re.sub(r"\n\s+", "\n", text).encode()


def _png(figure: Figure, description: str) -> bytes:
    """With a palette, which takes a third of the bytes."""
    drawn, into = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI, transparent=True)
    about = PngInfo()
    about.add_text("Description", description)
    image = Image.open(drawn).quantize(128, method=Image.Quantize.FASTOCTREE)
    image.save(into, format="png", optimize=True, pnginfo=about)
    return into.getvalue()


# --- how many times as fast ----------------------------------------------------------------------


def headline(data: Data) -> Figure:
    """A bar a case: dark to the fastest peer, pale to the slowest, on a logarithmic axis."""
    rows = data["rows"]
    families = [row["family"] for row in rows]
    places, y = [], 0.0
    for i, family in enumerate(families):
        if i and family != families[i - 1]:
            # What is said below a family's name needs a line.
            y += 0.55 if families.count(families[i - 1]) > 1 else 1.3
        places.append(y)
        y += 1.0
    height = 0.235 * y + 0.95
    figure = pyplot.figure(figsize=(_WIDTH, height))
    bottom, top = 0.36 / height, 1 - 0.56 / height
    axes = figure.add_axes((0.30, bottom, 0.34, top - bottom))
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
        shown = [row["peers"][0], *row["peers"][1:][-1:]]
        _beside(axes, place, [f"{_times(peer['times'])} {peer['name']}" for peer in shown])
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
    names = [("■ the fastest other", OURS), ("■ the slowest other", PALE), ("■ slower", WORSE)]
    names = names if min(times) < 1 else names[:2]
    _title(figure, "fused_attn: how many times as fast as others", data["device"], 0.30, names)
    return figure


def _beside(axes: Axes, y: float, words: Sequence[str]) -> None:
    place = {"xy": (1.0, y), "xycoords": ("axes fraction", "data"), "va": "center"}
    offset = {"textcoords": "offset points"}
    axes.annotate(words[0], xytext=(8, 0), weight="bold", size=7.5, **place, **offset)
    for word in words[1:]:
        axes.annotate(word, xytext=(108, 0), size=7.0, color=FAINT, **place, **offset)


def _families(axes: Axes, places: Sequence[float], rows: Sequence[Data]) -> None:
    axes.set_yticks(places, [row["label"] for row in rows])
    left = {"xycoords": ("figure fraction", "data"), "va": "center", "annotation_clip": False}
    seen: set[str] = set()
    for place, row in zip(places, rows, strict=True):
        if row["family"] not in seen:
            seen.add(row["family"])
            axes.annotate(row["family"], xy=(0.012, place), weight="bold", **left)
            axes.annotate(row["about"], xy=(0.012, place + 1), size=7, color=FAINT, **left)


# --- roofline ------------------------------------------------------------------------------------


def roofline(data: Data) -> Figure:
    """A panel an op: each case's operations a second over its operations a byte."""
    ops = data["ops"]
    columns = min(4, len(ops))
    lines = math.ceil(len(ops) / columns)
    height = 1.95 * lines + 0.8
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
        xs, ours, theirs = ([p[name] for p in some] for name in ("intensity", "ours", "peer"))
        axes.vlines(xs, theirs, ours, color=FAINT, linewidth=0.4, zorder=2)
        hollow = {"markerfacecolor": "none", "markeredgecolor": PEERS[0]}
        axes.plot(xs, theirs, "o", markersize=4, zorder=3, **hollow)
        axes.plot(xs, ours, "o", markersize=4, zorder=4, color=OURS)
        axes.set_title(op.replace("_", " "))
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(least, peak * 3))
        axes.grid()
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in list(grid.flat)[len(ops) :]:
        axes.set_visible(False)
    figure.subplots_adjust(0.085, 0.45 / height, 0.985, 1 - 0.76 / height, wspace=0.08, hspace=0.24)
    figure.supxlabel("operations a byte", size=8, y=0.08 / height)
    dtype = max(data["products"], key=data["products"].get)
    roof = f"— memory {_rate(data['memory'])}B/s, products in {dtype} {_rate(peak)}FLOP/s"
    names = [("● ours", OURS), ("○ the fastest other", PEERS[0]), (roof, TEXT)]
    if data["cache"] > _CACHED * data["memory"]:
        names.append((f"- - cache {_rate(data['cache'])}B/s", TEXT))
    _title(figure, "Operations a second under the roof", data["device"], 0.235, names)
    return figure


def _roof(axes: Axes, data: Data, low: float, high: float) -> None:
    """Memory's slope, the cache's as a dashed line, and the ceilings of products."""
    peak = max(data["products"].values())
    ridge = peak / data["memory"]
    axes.plot([low, ridge, high], [low * data["memory"], peak, peak], color=TEXT, linewidth=1.1)
    ridge = peak / data["cache"]
    if data["cache"] > _CACHED * data["memory"] and ridge > low:
        axes.plot([low, ridge], [low * data["cache"], peak], "--", color=TEXT, linewidth=0.8)
    for rate in data["products"].values():
        if rate < peak:
            axes.plot([rate / data["memory"], high], [rate] * 2, color=TEXT, linewidth=0.7)


# --- shares of the roof --------------------------------------------------------------------------


def shares(data: Data) -> Figure:
    """A bar a case for ours and a mark a peer, in a panel a direction."""
    panels = data["panels"]
    every = [row for rows in panels.values() for row in rows]
    labels = list(dict.fromkeys(row["label"] for row in every))
    places = {label: i for i, label in enumerate(labels)}
    peers = list(dict.fromkeys(name for row in every for name in row["peers"]))
    height = 0.19 * len(labels) + 1.2
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(_WIDTH, height), sharey=True, squeeze=False
    )
    most = max(share for row in every for share in (row["ours"], *row["peers"].values()))
    for axes, (direction, rows) in zip(grid[0], panels.items(), strict=True):
        ys = [places[row["label"]] for row in rows]
        axes.barh(ys, [row["ours"] for row in rows], height=0.7, color=OURS)
        for i, name in enumerate(peers):
            reached = [row["peers"].get(name, math.nan) for row in rows]
            edge = {"markersize": 4.2, "markeredgecolor": "white", "markeredgewidth": 0.4}
            axes.plot(reached, ys, _MARKERS[i % 5], color=PEERS[i % 5], **edge)
        axes.axvline(1, color=TEXT, linewidth=1.0)
        axes.set_title(direction.replace("+", " + "))
        axes.set_xlim(0, max(1.05, 1.05 * most))
        axes.xaxis.set_major_locator(MaxNLocator(3) if most > 2 else MultipleLocator(0.5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    left = 0.02 + 0.0082 * max(len(label) for label in labels)
    figure.subplots_adjust(left, 0.28 / height, 0.98, 1 - 0.78 / height, wspace=0.08)
    glyphs = {"D": "◆", "s": "■", "P": "✚", "^": "▲", "v": "▼"}
    names = [(f"{glyphs[_MARKERS[i % 5]]} {name}", PEERS[i % 5]) for i, name in enumerate(peers)]
    names.insert(0, ("■ ours", OURS))
    words = f"Share of the roof: {data['op'].replace('_', ' ')}"
    _title(figure, words, data["device"], 0.30, names)
    return figure


# --- against sizes -------------------------------------------------------------------------------


def scaling(data: Data) -> Figure:
    """Time and memory of an op against each of its sizes, on logarithmic axes."""
    panels = data["panels"]
    dimensions = list(dict.fromkeys(panel["dimension"] for panel in panels))
    ways = list(dict.fromkeys((panel["direction"], panel["dtype"]) for panel in panels))
    figure_rows = [(way, what) for way in ways for what in ("time", "memory")]
    height = 1.5 * len(figure_rows) + 0.9
    figure, grid = pyplot.subplots(
        len(figure_rows), len(dimensions), figsize=(_WIDTH, height), squeeze=False, sharex="col",
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
                axes.set_title(f"{way[0].replace('+', ' + ')}{several}, {what}", size=8)
    _size_ticks(grid, panels, dimensions)
    figure.subplots_adjust(0.085, 0.45 / height, 0.985, 1 - 0.8 / height, wspace=0.08, hspace=0.36)
    names = [("● ours", OURS)]
    names += [(f"● {PEER_NAMES.get(name, name)}", _peer_color(others, name)) for name in others]
    names.append(("- - the model", TEXT))
    words = f"{data['op'].replace('_', ' ')} as it grows"
    _title(figure, words, data["device"], 0.30, names)
    return figure


def _lines(axes: Axes, panel: Data, what: str, others: Sequence[str]) -> None:
    drawn_model = False
    for name, points in panel["lines"].items():
        ours = is_ours(name)
        color = OURS if ours else _peer_color(others, name)
        style = {"color": color, "linewidth": 1.6 if ours else 1.0, "zorder": 4 if ours else 3}
        values = [point["value"] for point in points]
        if what == "time":
            axes.plot(values, [p["p50_ms"] / 1e3 for p in points], "o-", markersize=2.6, **style)
            bounds = [[p[name] / 1e3 for p in points] for name in ("p20_ms", "p80_ms")]
            axes.fill_between(values, *bounds, color=color, alpha=0.2, linewidth=0)
        else:
            held = [p["peak_bytes"] or math.nan for p in points]
            axes.plot(values, held, "o-", markersize=2.6, **style)
        model = [p["floor_ms" if what == "time" else "held_bytes"] for p in points]
        if not drawn_model and all(model):
            scale = 1e-3 if what == "time" else 1.0
            axes.plot(values, [v * scale for v in model], "--", color=TEXT, linewidth=1.0, zorder=5)
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
    for i, row in enumerate(grid):
        row[0].yaxis.set_major_locator(LogLocator(numticks=6))
        words = _seconds if i % 2 == 0 else _bytes
        row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _, words=words: words(value)))


# --- words ---------------------------------------------------------------------------------------


def _title(
    figure: Figure, words: str, device: str, x: float, names: Sequence[tuple[str, str]]
) -> None:
    """At the top left; below it the device, and words in the colours that they explain.

    Args:
        figure: To be written on.
        words: The title.
        device: Its name.
        x: Where the explanations begin, further left if there are many.
        names: What they say, with their colours.
    """
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.2 / height, words, weight="bold", size=10.5)
    y = 1 - 0.41 / height
    left = 0.012 + _written(figure.text(0.012, y, device, color=FAINT)) + _GAP
    texts = [figure.text(0, y, word, color=color) for word, color in names]
    needed = sum(_written(text) + _GAP for text in texts)
    x = max(left, min(x, 1 - needed))
    for text in texts:
        text.set_x(x)
        x += _written(text) + _GAP


def _written(text: Text) -> float:
    """The width of a text as a share of its figure's."""
    figure = text.get_figure()
    assert isinstance(figure, Figure)
    return float(text.get_window_extent().width / figure.bbox.width)


def _peer_color(others: Sequence[str], name: str) -> str:
    return PEERS[list(others).index(name) % len(PEERS)]


def _times(value: float) -> str:
    digits = 0 if value >= 9.95 or value in (1, 2, 5) else 1 if value in (0.2, 0.5) else 2
    return f"{value:.{digits}f}×"


def _rate(value: float) -> str:
    return _with_unit(value, ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1, " ")))


def _bytes(value: float) -> str:
    return _with_unit(value, ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")))


def _seconds(value: float) -> str:
    return _with_unit(value, ((1, " s"), (1e-3, " ms"), (1e-6, " µs")))


def _count(value: float) -> str:
    """A power of two in its own units."""
    size = int(value)
    if size >= 1024 and size & (size - 1) == 0:
        return _with_unit(value, ((1 << 20, " Mi"), (1 << 10, " Ki")))
    return f"{size}"


def _with_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    size, unit = next((pair for pair in units if value >= 0.999 * pair[0]), units[-1])
    return f"{value / size:.3g}{unit}" if value < 1000 * size else f"{value / size:g}{unit}"


_KINDS = {"headline": headline, "roofline": roofline, "shares": shares, "scaling": scaling}
