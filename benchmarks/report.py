"""``python -m benchmarks.report``: the results as tables and pictures, in the pages of docs.

A page keeps what is written by hand, and has blocks that this command fills:

    <!-- results: operators attention on amd-epyc-avx512 -->
    <!-- end of results -->

Of each op and model, what is shown is the newest run of each device that has rows of it, from a
tree without changes. ``--check`` writes nothing and fails where a page or a picture is not what
the results give.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fused_attn.validation import OPS

from . import exponents, figures, tables
from .comparisons import comparisons, newest_rows
from .figures import Data
from .results import FOLDER, ROOT, Row, Run, newest

DOCS = ROOT / "docs"
IMAGES = Path("images", "performance")
"""Of docs: where pictures go."""
_BEGIN = re.compile(r"<!-- results: *(.*?) *-->\s*")
_END = re.compile(r"<!-- end of results -->\s*")


class ReportError(Exception):
    """A page that cannot be filled; the message names file and line."""


@dataclass(frozen=True)
class Block:
    """A part of a page that is made from results."""

    line: int
    """Of its first line, from 1."""
    kind: str
    words: tuple[str, ...]
    device: str | None
    """A folder of results; None: all of them."""


@dataclass
class Report:
    """What the results give, and the pictures that pages ask for."""

    runs: Mapping[str, Sequence[Run]]
    """By device, the newest first."""
    drawn: dict[str, tuple[str, Data]] = field(default_factory=dict)
    """By name, the kind and the data of each picture that was asked for."""
    blocks: list[Block] = field(default_factory=list)
    """That were filled."""

    def unshown(self) -> list[str]:
        """Measured, and in no block."""
        return [
            f"{device} {suite} {' '.join(names)}"
            for device, runs in self.runs.items()
            for suite, columns in _COLUMNS.items()
            for names in _measured(runs, suite, *columns)
            if not any(_shows(block, device, suite, names) for block in self.blocks)
        ]

    def fill(self, block: Block, images: str) -> list[str]:
        """The lines of a block, without its first and last.

        Args:
            block: What is asked for.
            images: The folder of the pictures, as the page says it.
        """
        self.blocks.append(block)
        lines: list[str] = []
        for device in [block.device] if block.device else self.runs:
            for part in _RENDERERS[block.kind](self.runs.get(device, []), block):
                if isinstance(part, Picture):
                    self.drawn[part.name] = (part.kind, part.data)
                    lines += [f"![{part.alternative}]({images}/{part.name}.svg)", ""]
                else:
                    lines.append(part)
        return ["", *(lines or ["Not measured yet.", ""])]


@dataclass(frozen=True)
class Picture:
    """A part of a block that is drawn."""

    name: str
    kind: str
    """A function of `benchmarks.plots`."""
    data: Data
    alternative: str
    """In words."""


# --- pages ---------------------------------------------------------------------------------------


def fill_page(text: str, name: str, report: Report, images: str) -> str:
    """A page with its blocks filled; the rest of it stays as it is.

    Args:
        text: The page.
        name: For messages.
        report: What fills them.
        images: The folder of the pictures, as the page says it.

    Raises:
        ReportError: A block is unknown or not closed.
    """
    result: list[str] = []
    block: Block | None = None
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if block is None and line.startswith("```"):
            fenced = not fenced
        begin, end = _BEGIN.fullmatch(line), _END.fullmatch(line)
        if fenced or not (begin or end):
            if block is None:
                result.append(line)
        elif begin:
            if block is not None:
                raise ReportError(f"{name}:{block.line}: this block is not closed")
            block = parse(begin[1], f"{name}:{number}", number)
            result.append(line)
        elif block is None:
            raise ReportError(f"{name}:{number}: the end of a block that was not begun")
        else:
            result += [*report.fill(block, images), line]
            block = None
    if block is not None:
        raise ReportError(f"{name}:{block.line}: this block is not closed")
    return "\n".join(result) + "\n"


def parse(words: str, where: str, line: int = 1) -> Block:
    """What the first line of a block asks for.

    Args:
        words: A kind; ops, or models as ``<model>/<task>`` with wildcards (all); ``on`` a device
            (all).
        where: For messages.
        line: Its number.

    Raises:
        ReportError: There is no such block.
    """
    asked, _, device = words.partition(" on ")
    kind, *rest = asked.split() or [""]
    if kind not in _RENDERERS:
        raise ReportError(f"{where}: unknown block '{kind}'; known: {', '.join(_RENDERERS)}")
    if kind in ("operators", "scaling"):
        unknown = [word for word in rest if word not in OPS]
        if unknown:
            raise ReportError(f"{where}: unknown op '{unknown[0]}'; known: {', '.join(OPS)}")
    elif rest and kind != "models":
        raise ReportError(f"{where}: a block '{kind}' takes nothing but 'on <device>'")
    return Block(line, kind, tuple(rest), device.strip() or None)


# --- blocks --------------------------------------------------------------------------------------

Parts = Iterator[str | Picture]


def _headline(runs: Sequence[Run], block: Block) -> Parts:
    data = figures.headline(runs) if runs else None
    if data:
        device = _folder(runs)
        words = f"How many times as fast as others on {data['device']}"
        yield Picture(f"headline-{device}", "headline", data, words)


def _machines(runs: Sequence[Run], block: Block) -> Parts:
    if runs:
        yield from (f"`{_folder(runs)}`: {tables.machine(runs[0].machine)}.", "")
        found = newest_rows(runs, "roof")
        if found:
            yield from tables.roof(found[1][-1])
            yield from tables.source(*found)


def _roofline(runs: Sequence[Run], block: Block) -> Parts:
    data = figures.roofline(runs)
    if data:
        words = f"Operations a byte and a second of every case under the roof of {data['device']}"
        yield Picture(f"roofline-{_folder(runs)}", "roofline", data, words)


def _operators(runs: Sequence[Run], block: Block) -> Parts:
    for op in block.words or OPS:
        found = newest_rows(runs, "operators", op=op)
        if found is None:
            continue
        if len(block.words) != 1:
            yield from (f"**{op}**", "")
        data = figures.shares(*found)
        if data:
            words = f"Share of the roof that the cases of {op} reach on {data['device']}"
            yield Picture(f"{op}-{_folder(runs)}", "shares", data, words)
        known = comparisons(found[1])
        dtypes = list(dict.fromkeys(one.what["dtype"] for one in known))
        for dtype in sorted(dtypes, key=lambda name: name == "float32"):
            if len(dtypes) > 1:
                yield from (f"{dtype}:", "")
            of_dtype = [one for one in known if one.what["dtype"] == dtype]
            yield from tables.times(of_dtype)
            yield from tables.work(of_dtype)
        yield from tables.problems(known)
        yield from tables.source(*found)


def _models(runs: Sequence[Run], block: Block) -> Parts:
    # A table for all that have the same providers, and so the same columns.
    alike: dict[tuple[Path, frozenset[str]], tuple[Run, list[Row]]] = {}
    for model, task in _measured(runs, "models", "model", "task"):
        if not block.words or any(_means(word, model, task) for word in block.words):
            run, rows = newest_rows(runs, "models", model=model, task=task) or (runs[0], [])
            providers = frozenset(row["provider"] for row in rows)
            alike.setdefault((run.path, providers), (run, []))[1].extend(rows)
    for run, rows in alike.values():
        known = comparisons(rows)
        yield from tables.models(known)
        yield from tables.problems(known)
        yield from tables.source(run, rows)


def _scaling(runs: Sequence[Run], block: Block) -> Parts:
    for op in block.words or OPS:
        found = newest_rows(runs, "scaling", op=op)
        if found:
            data = figures.scaling(*found)
            words = f"Time and memory of {op} against its sizes on {data['device']}"
            yield Picture(f"scaling-{op}-{_folder(runs)}", "scaling", data, words)
            yield from exponents.table(found[1])
            yield from tables.source(*found)


def _means(word: str, model: str, task: str) -> bool:
    """Whether ``<model>/<task>`` or ``<model>``, with wildcards, is this one."""
    return fnmatch.fnmatchcase(f"{model}/{task}", word if "/" in word else f"{word}/*")


def _measured(runs: Sequence[Run], suite: str, *names: str) -> list[tuple[str, ...]]:
    """What there are rows of."""
    rows = (row for run in runs for row in run.suite(suite))
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def _folder(runs: Sequence[Run]) -> str:
    return str(runs[0].path.parent.name)


_RENDERERS: dict[str, Callable[[Sequence[Run], Block], Parts]] = {
    "headline": _headline,
    "machines": _machines,
    "roofline": _roofline,
    "operators": _operators,
    "models": _models,
    "scaling": _scaling,
}


_COLUMNS = {"operators": ("op",), "models": ("model", "task"), "scaling": ("op",)}
"""Of suites that have tables or pictures: what these are of."""


def _shows(block: Block, device: str, suite: str, names: tuple[str, ...]) -> bool:
    if block.kind != suite or block.device not in (None, device):
        return False
    if not block.words:
        return True
    return names[0] in block.words or (
        suite == "models" and any(_means(word, *names) for word in block.words)
    )


# --- command -------------------------------------------------------------------------------------


def pages(docs: Path) -> list[Path]:
    """Pages that may have blocks: those of docs, and the README beside it."""
    readme = docs.parent / "README.md"
    return [*([readme] if readme.exists() else []), *sorted(docs.glob("*.md"))]


def committed(folder: Path) -> dict[str, list[Run]]:
    """By device, its runs of trees without changes, the newest first."""
    runs = {
        device: [run for run in found if not run.machine.get("changed")]
        for device, found in newest(folder).items()
    }
    return {device: found for device, found in runs.items() if found}


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the pages and draw the pictures; 0 when done, and with ``--check`` when up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help="benchmarks/results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="docs")
    parser.add_argument("--check", action="store_true", help="write nothing, 1 if out of date")
    arguments = parser.parse_args(argv)
    docs = arguments.docs
    report = Report(committed(arguments.results))
    stale = []
    try:
        for page in pages(docs):
            images = Path(os.path.relpath(docs / IMAGES, page.parent)).as_posix()
            text = page.read_text(encoding="utf-8")
            filled = fill_page(text, os.path.relpath(page), report, images)
            if filled != text:
                stale.append(page)
                if not arguments.check:
                    page.write_text(filled, encoding="utf-8")
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, (kind, data) in report.drawn.items():
        if not arguments.check:
            from . import plots  # matplotlib takes a while

            stale += plots.save(kind, data, docs / IMAGES / name)
        else:
            stamp = figures.stamp(data).encode()
            paths = (docs / IMAGES / f"{name}.{ending}" for ending in figures.ENDINGS)
            stale += [p for p in paths if not p.exists() or stamp not in p.read_bytes()]
    for what in report.unshown():
        print(f"no block shows {what}")
    for path in stale:
        state = "is not what the results give" if arguments.check else "written"
        print(f"{os.path.relpath(path)}: {state}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
