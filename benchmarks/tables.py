"""Tables of the report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .comparisons import Comparison
from .results import PACKAGES, Row, Run, last_line

PEERS_A_TABLE = 4
"""More of them continue in a table of their own."""
NONE = "–"
_COPIES = (1 << 16, 1 << 20, 1 << 24, 1 << 28)
"""Bytes of the copies that are shown of a roof."""
_MODEL = ("model", "task", "case", "dtype")
_ON_GPU = {"launch_ms": "launch ms", "graph_ms": "in a graph ms"}


def times(known: Sequence[Comparison]) -> Iterator[str]:
    """Times of ours, the floor, and how many times as long others take."""
    ours, peers = _providers(c.ours for c in known), _providers(c.peers for c in known)
    name = ours[0] if len(ours) > 1 else "ours"
    heads = ["case", "direction", f"{name} ms (p20–p80)", "floor ms", f"{name} / floor"]
    others = [*ours[1:], *peers]
    rows = []
    for one in known:
        row = one.first or {}
        gap = row["p50_ms"] / row["floor_ms"] if row.get("floor_ms") else None
        cells = [one.what["case"], one.what["direction"], _time(row)]
        rows.append([*cells, number(row.get("floor_ms")), number(gap)])
    for begin in range(0, max(1, len(others)), PEERS_A_TABLE):
        some = others[begin : begin + PEERS_A_TABLE]
        left = len(heads) if begin == 0 else 2
        cells_of = zip(rows, known, strict=True)
        yield from _table(
            [*heads[:left], *(f"{other} / {name}" for other in some)],
            ([*cells[:left], *(_ratio(one, other) for other in some)] for cells, one in cells_of),
        )


def work(known: Sequence[Comparison]) -> Iterator[str]:
    """What the work is, what bounds it, the memory that is held, and the error."""
    ours, peers = _providers(c.ours for c in known), _providers(c.peers for c in known)
    on_gpu = [name for name in _ON_GPU if any(name in (c.first or {}) for c in known)]
    heads = ["case", "direction", "MB moved", "GFLOP", "bound by"]
    heads += [_ON_GPU[name] for name in on_gpu]
    heads += [f"{'ours' if [name] == ours else name}, MB held" for name in (*ours, *peers)]
    rows = []
    for one in known:
        row = one.first or {}
        cells = [one.what["case"], one.what["direction"], _megabytes(row.get("bytes"))]
        cells += [number(row["flop"] / 1e9 if "flop" in row else None), row.get("bound", NONE)]
        cells += [number(row.get(name)) for name in on_gpu]
        cells += [_megabytes(one.rows.get(n, {}).get("peak_bytes")) for n in (*ours, *peers)]
        cells.append(NONE if row.get("error") is None else f"{row['error']:.1e}")
        cells.append(NONE if row.get("budget") is None else f"{row['budget']:.0%}")
        rows.append(cells)
    heads += ["error", "of its budget"]
    yield from _folded("Work, memory and error", heads, rows)


def models(known: Sequence[Comparison]) -> Iterator[str]:
    """Times of ours, and how many times as long others take; launches and memory."""
    ours, peers = _providers(c.ours for c in known), _providers(c.peers for c in known)
    others = [*ours[1:], *peers]
    heads = [*_MODEL, "ours ms (p20–p80)", "tokens/s", *(f"{name} / ours" for name in others)]
    rows, counts = [], []
    for one in known:
        row = one.first or {}
        what = [one.what[name] for name in _MODEL]
        cells = [*what, _time(row), number(row.get("tokens_per_s"))]
        rows.append([*cells, *(_ratio(one, name) for name in others)])
        for name, counted in one.timed.items():
            if "launches" in counted or "peak_bytes" in counted:
                cells = [number(counted.get("launches")), _megabytes(counted.get("peak_bytes"))]
                counts.append([*what, name, *cells])
    yield from _table(heads, rows)
    if counts:
        heads = [*_MODEL, "provider", "launches", "MB held"]
        yield from _folded("Launches and memory", heads, counts)


def roof(row: Row) -> Iterator[str]:
    """What a machine does at best."""
    copies = {size: seconds for size, seconds in row["copies"] if size in _COPIES}
    heads = [f"copy of {_size(size)}" for size in copies]
    heads += [f"products in {dtype}" for dtype in row["products"]]
    cells = [f"{number(size / seconds / 1e9)} GB/s" for size, seconds in copies.items()]
    cells += [f"{number(rate / 1e12)} TFLOP/s" for rate in row["products"].values()]
    yield from _table(heads, [cells])


def problems(known: Sequence[Comparison]) -> Iterator[str]:
    """A list of what is absent and what failed, with the cases."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for one in known:
        for name, row in one.rows.items():
            for problem in ("absent", "failed"):
                if problem in row:
                    text = _escaped(last_line(row[problem]))
                    found.setdefault((name, problem, text), []).append(_short(one))
    for (name, problem, text), cases in found.items():
        everywhere = len(cases) == sum(name in one.rows for one in known)
        yield f"- `{name}` {problem}{'' if everywhere else f' in {_listed(cases)}'}: {text}"
    if found:
        yield ""


def source(run: Run, rows: Sequence[Row]) -> Iterator[str]:
    """When, of which commit and in how many turns the figures above were taken."""
    machine = run.machine
    rounds = sorted({row["rounds"] for row in rows if "rounds" in row})
    turns = "–".join(str(n) for n in dict.fromkeys(rounds[:1] + rounds[-1:]))
    said = [run.path.parent.name, machine["started"][:10], (machine["commit"] or "unknown")[:7]]
    said += [f"{turns} turns of each"] if turns else []
    yield from (f"<sub>{', '.join(said)}</sub>", "")


def machine(row: Row) -> str:
    """The device and the versions, in a line."""
    parts = [row["name"]]
    if row["device"] == "cuda":
        parts += [f"capability {row['capability']}", f"CUDA {row['cuda']}"]
        parts.append(f"driver {row['driver']}")
    else:
        parts += [f"{row['our_instructions']}", f"{row['threads']} threads"]
    parts += [f"Python {row['python']}", f"torch {row['torch']}"]
    parts += [f"{name} {row[name]}" for name in PACKAGES if row.get(name)]
    return ", ".join(parts)


def number(value: float | None) -> str:
    """Three digits, never with an exponent; a dash for None."""
    if value is None:
        return NONE
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text.removesuffix(".")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for cells in rows:
        yield f"| {' | '.join(_escaped(cell) for cell in cells)} |"
    yield ""


def _folded(summary: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield from (f"<details><summary>{summary}</summary>", "")
    yield from _table(heads, rows)
    yield from ("</details>", "")


def _providers(rows: Iterable[Mapping[str, Row]]) -> list[str]:
    return list(dict.fromkeys(name for some in rows for name in some))


def _time(row: Mapping[str, Any]) -> str:
    if "p50_ms" not in row:
        return NONE
    return f"{number(row['p50_ms'])} ({number(row['p20_ms'])}–{number(row['p80_ms'])})"


def _ratio(one: Comparison, name: str) -> str:
    row = one.rows.get(name, {})
    if "ratio" not in row:
        return next((problem for problem in ("absent", "failed") if problem in row), NONE)
    low, median, high = (number(value) for value in row["ratio"])
    return f"**{median}** ({low}–{high})"


def _megabytes(value: float | None) -> str:
    return NONE if value is None else f"{value / 1e6:,.1f}"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"


def _short(one: Comparison) -> str:
    names = ("model", "task", "case", "dtype", "direction")
    return " ".join(one.what[name] for name in names if name in one.what)


def _listed(cases: Sequence[str]) -> str:
    return ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
