"""``python -m benchmarks.compare A B``: what got slower from A to B, with noise taken into account.

A and B are files of results, or name runs of one device in ``benchmarks/results``: a commit, or the
beginning of ``<device>/<date>-<commit>``.

Machines are noisy, and not equally fast in two runs, so a time alone proves nothing. A row has
several witnesses instead: its ratio to each peer that is in both runs in the same version, taken
in neighbouring turns; and its own time, over the factor by which unchanged peers were slower in B,
over all rows. A row is slower when

- the median of its witnesses' changes exceeds the limit, and
- of more than half of the witnesses the intervals of A and B do not overlap.

An interval is that of the median: 1.57 times the distance of the quartiles over the root of the
number of turns to either side (McGill, Tukey and Larsen, 1978); of two runs of the same they do
not overlap in one case of a hundred. They know the noise within a run alone. What differs between
runs (where memory lies, what else the machine does) shows in the peers, whose code is the same. So
the limit is the threshold, or, where that is more, what one of all rows would exceed in one
comparison of twenty if rows varied as peers do.

Memory and errors do not vary and are compared as they are. They are told, as is what is new, gone
and faster; what is slower, or fails now, makes the command fail.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_attn.validation import OPS

from .comparisons import TIMED, Comparison, comparisons, is_ours
from .results import FOLDER, ROOT, Row, Run, newest, read
from .tables import number

_NOTCH = 1.57
# Distances of quantiles of a normal distribution in standard deviations: quartiles; 20 % to 80 %.
_QUARTILES, _QUINTILES = 1.349, 1.683
_FALSE_ALARMS = 0.05
"""Of comparisons of two runs of the same code, those in which noise exceeds the limit."""
_FEWEST_CONTROLS = 8
"""Fewer changes of peers have no spread to speak of."""
_TURNS = 5
"""Of rows that do not say how many there were."""
# Of what only one run has: a run of a part has little of a whole one.
_LONGEST_LIST = 10
_SHORTEST_COMMIT = 4
_GROWN_ERROR, _GROWN_MEMORY, _PAGE = 1.10, 1.01, 4096
PACKAGE_OF = {
    "hugging_face": "transformers",
    "ctranslate2": "ctranslate2",
    "onnxruntime": "onnxruntime",
    "liger": "liger-kernel",
}
"""By the beginning of a peer's name, whose version its is; others' is torch's."""


class UnusableError(Exception):
    """Two runs that cannot be compared, or names of none."""


@dataclass(frozen=True)
class Interval:
    """Of a median, as logarithms."""

    low: float
    median: float
    high: float

    @classmethod
    def around(cls, median: float, spread: float, turns: int) -> Interval:
        """From a standard deviation, as a logarithm, and the number of turns."""
        half = _NOTCH * _QUARTILES * spread / math.sqrt(turns)
        return cls(math.log(median) - half, math.log(median), math.log(median) + half)

    def moved(self, by: float) -> Interval:
        """All of it."""
        return Interval(self.low + by, self.median + by, self.high + by)


@dataclass(frozen=True)
class Witness:
    """One measure of a change: a logarithm, above 0 where B is slower."""

    name: str
    change: float
    apart: bool
    """Whether the intervals of A and B do not overlap."""


@dataclass(frozen=True)
class Verdict:
    """What became of a row of ours."""

    name: str
    before: Row
    after: Row
    witnesses: tuple[Witness, ...]
    limit: float
    """Changes up to this, or down to its inverse, are noise."""

    @property
    def change(self) -> float:
        """How many times as long it takes: the median of the witnesses."""
        return math.exp(statistics.median(witness.change for witness in self.witnesses))

    @property
    def agreeing(self) -> int:
        """Witnesses whose intervals do not overlap, on the side of the change."""
        slower = self.change > 1
        return sum(w.apart and (w.change > 0) == slower for w in self.witnesses)

    @property
    def slower(self) -> bool:
        """Whether it got slower."""
        return self.change > self.limit and 2 * self.agreeing > len(self.witnesses)

    @property
    def faster(self) -> bool:
        """Whether it got faster."""
        return self.change < 1 / self.limit and 2 * self.agreeing > len(self.witnesses)


@dataclass(frozen=True)
class Result:
    """What `compare` finds."""

    verdicts: list[Verdict]
    notes: dict[str, list[str]]
    """``failed now``, ``gone``, ``new``, ``more memory``, ``larger error``: rows in words."""
    machine: float
    """How many times as long unchanged peers take in B: the median."""
    spread: float
    """Of their changes around it, as a logarithm: a standard deviation from the quartiles."""
    controls: int
    """Rows of peers from which these are."""
    limit: float
    """Changes up to this, or down to its inverse, count as none."""
    noisy: bool
    """Whether the limit is above the threshold."""

    @property
    def slower(self) -> list[Verdict]:
        """The slowest first."""
        return sorted((v for v in self.verdicts if v.slower), key=lambda v: -v.change)

    @property
    def faster(self) -> list[Verdict]:
        """The fastest first."""
        return sorted((v for v in self.verdicts if v.faster), key=lambda v: v.change)

    @property
    def worse(self) -> bool:
        """Whether a row is slower, or fails now."""
        return bool(self.slower or self.notes["failed now"])


def compare(
    a: Run, b: Run, threshold: float = 1.10, suites: Sequence[str] = (), ops: Sequence[str] = ()
) -> Result:
    """What became of the rows of A in B.

    Args:
        a: Before.
        b: After.
        threshold: Of the change that counts.
        suites: Only these of `comparisons.TIMED`; empty: all.
        ops: Only rows of these ops; empty: all.

    Raises:
        UnusableError: The runs are of different devices or numbers of threads.
    """
    for name in ("device", "name", "cpu", "our_instructions", "threads"):
        known = [run.machine[name] for run in (a, b) if run.machine.get(name) is not None]
        if len(set(known)) > 1:
            raise UnusableError(
                f"the runs are of different machines: {name} {known[0]} and {known[1]}"
            )
    before, after = _by_name(a, suites, ops), _by_name(b, suites, ops)
    same = {
        provider: _same_version(a, b, provider) for one in before.values() for provider in one.rows
    }
    changes = [
        math.log(after[name].timed[provider]["p50_ms"] / row["p50_ms"])
        for name, one in before.items()
        if name in after
        for provider, row in one.timed.items()
        if not is_ours(provider) and same[provider] and provider in after[name].timed
    ]
    machine, spread = _middle(changes)
    rows = max(1, sum(len(one.ours) for one in before.values()))
    spreads = statistics.NormalDist().inv_cdf(1 - _FALSE_ALARMS / rows)
    limit = max(threshold, math.exp(spreads * spread))
    notes: dict[str, list[str]] = {
        name: [] for name in ("failed now", "gone", "new", "more memory", "larger error")
    }
    verdicts = []
    for name, one in before.items():
        other = after.get(name, Comparison(one.what, {}))
        for provider, row in one.ours.items():
            full = f"{name} {provider}"
            now = other.rows.get(provider)
            if now is None or "p50_ms" not in now:
                kind = "failed now" if now and "failed" in now else "gone"
                notes[kind].append(full)
                continue
            witnesses = [*_paired(one, other, provider, same), _own_time(row, now, machine)]
            verdicts.append(Verdict(full, row, now, tuple(witnesses), limit))
            for kind, text in _grown(row, now):
                notes[kind].append(f"{full}: {text}")
    for name, one in after.items():
        known = before[name].ours if name in before else {}
        notes["new"] += [f"{name} {provider}" for provider in one.ours if provider not in known]
    factor = math.exp(machine)
    return Result(verdicts, notes, factor, spread, len(changes), limit, limit > threshold)


def _by_name(run: Run, suites: Sequence[str], ops: Sequence[str]) -> dict[str, Comparison]:
    rows: Iterable[Row] = run.rows
    if suites:
        rows = [row for row in rows if row["suite"] in suites]
    if ops:
        rows = [row for row in rows if row.get("op") in ops]
    return {f"{one.what['suite']} {one.name}": one for one in comparisons(rows)}


def _same_version(a: Run, b: Run, provider: str) -> bool:
    packages = (package for start, package in PACKAGE_OF.items() if provider.startswith(start))
    package = next(packages, "torch")
    return bool(a.machine.get(package) == b.machine.get(package))


def _middle(changes: Sequence[float]) -> tuple[float, float]:
    """The median, and the standard deviation around it; no spread of too few."""
    if not changes:
        return 0.0, 0.0
    if len(changes) < _FEWEST_CONTROLS:
        return statistics.median(changes), 0.0
    low, median, high = statistics.quantiles(changes, n=4)
    return median, (high - low) / _QUARTILES


def _paired(
    one: Comparison, other: Comparison, provider: str, same: Mapping[str, bool]
) -> Iterator[Witness]:
    """The changes of ratios to peers, which are to the first of ours."""
    if one.first is not one.rows[provider] or other.first is not other.rows[provider]:
        return
    for peer, row in one.timed.items():
        now = other.timed.get(peer, {})
        if "ratio" in row and "ratio" in now and not is_ours(peer) and same[peer]:
            # Of the peer's time to ours: it falls where ours gets slower.
            yield _witness(peer, _of_ratio(now), _of_ratio(row))


def _own_time(row: Row, now: Row, machine: float) -> Witness:
    return _witness("time", _of_time(row), _of_time(now).moved(-machine))


def _witness(name: str, a: Interval, b: Interval) -> Witness:
    return Witness(name, b.median - a.median, b.low > a.high or a.low > b.high)


def _of_ratio(row: Row) -> Interval:
    low, median, high = row["ratio"]
    return Interval.around(median, math.log(high / low) / _QUARTILES, row["rounds"])


def _of_time(row: Row) -> Interval:
    spread = math.log(row["p80_ms"] / row["p20_ms"]) / _QUINTILES
    return Interval.around(row["p50_ms"], spread, row.get("rounds", _TURNS))


def _grown(row: Row, now: Row) -> Iterator[tuple[str, str]]:
    """What does not vary and is more than before."""
    if now.get("peak_bytes", 0) > _GROWN_MEMORY * row.get("peak_bytes", math.inf) + _PAGE:
        sizes = " to ".join(f"{number(one['peak_bytes'] / 1e6)} MB" for one in (row, now))
        yield "more memory", sizes
    if now.get("error", 0.0) > _GROWN_ERROR * row.get("error", math.inf):
        yield "larger error", f"{row['error']:.2g} to {now['error']:.2g}"


# --- command -------------------------------------------------------------------------------------


def resolve(a: str, b: str, folder: Path = FOLDER) -> tuple[Run, Run]:
    """The two runs that are meant.

    Raises:
        UnusableError: There is none, or several devices have both.
    """
    known = [run for runs in newest(folder).values() for run in runs]
    before, after = (_meant(text, known, folder) for text in (a, b))
    if isinstance(before, Run) and isinstance(after, Run):
        return before, after
    pairs = [
        (x, y)
        for x in ([before] if isinstance(before, Run) else before)
        for y in ([after] if isinstance(after, Run) else after)
        if x.machine["folder"] == y.machine["folder"]
    ]
    if len({x.machine["folder"] for x, _ in pairs}) > 1 or not pairs:
        names = ", ".join(sorted({x.machine["folder"] for x, _ in pairs})) or "no device"
        raise UnusableError(f"'{a}' and '{b}' are both of {names}; name files, or <device>/<date>")
    return pairs[0]


def _meant(text: str, known: Sequence[Run], folder: Path) -> Run | list[Run]:
    """A file's run, or those in the folder that the text names, the newest first."""
    path = Path(text)
    if path.is_file():
        try:
            return read(path)
        except ValueError as error:
            raise UnusableError(str(error)) from error
    commit = _commit(text) or text
    found = [
        run
        for run in known
        if ("/" in text and run.path.relative_to(folder).as_posix().startswith(text))
        or (len(commit) >= _SHORTEST_COMMIT and (run.machine["commit"] or "").startswith(commit))
    ]
    if not found:
        raise UnusableError(f"'{text}' is no file, nor name nor commit of a run in {folder}")
    return found


def _commit(text: str) -> str | None:
    """What git calls the commit of a name such as ``main`` or ``HEAD~2``; None if it knows none."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{text}^{{commit}}"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def lines(result: Result) -> Iterator[str]:
    """The result as text, and the verdict at last."""
    yield (
        f"unchanged peers take {result.machine:.3f} times as long in B, with a spread of "
        f"{math.expm1(result.spread):.1%} ({result.controls} rows): limit {result.limit:.2f}"
    )
    for title, verdicts in (("slower", result.slower), ("faster", result.faster)):
        if verdicts:
            yield from (
                "",
                f"| {title} | times as long | A ms | B ms | witnesses |",
                "|---" * 5 + "|",
            )
        for v in verdicts:
            yield (
                f"| {v.name} | {v.change:.2f} | {number(v.before['p50_ms'])} "
                f"| {number(v.after['p50_ms'])} | {_told(v)} |"
            )
    for title, rows in result.notes.items():
        shown = rows[:_LONGEST_LIST] if title in ("gone", "new") else rows
        if rows:
            yield from ("", f"{title}:", *(f"- {row}" for row in shown))
        if len(rows) > len(shown):
            yield f"- and {len(rows) - len(shown)} more"
    counts = f"{len(result.slower)} slower, {len(result.faster)} faster"
    counts += "".join(f", {len(rows)} {title}" for title, rows in result.notes.items() if rows)
    hidden = f"; noise hides changes below {result.limit:.2f}" if result.noisy else ""
    verdict = "WORSE" if result.worse else "ok"
    yield from ("", f"{verdict}: of {len(result.verdicts)} rows {counts}{hidden}")


def _told(verdict: Verdict) -> str:
    told = (f"{w.name} {math.exp(w.change):.2f}{'' if w.apart else '?'}" for w in verdict.witnesses)
    return f"{verdict.agreeing} of {len(verdict.witnesses)}: {', '.join(told)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 0 when nothing is worse, 1 when something is, 2 for unusable arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="before")
    parser.add_argument("b", metavar="B", help="after")
    parser.add_argument("--threshold", type=float, default=1.10, help="times as long (1.10)")
    parser.add_argument("--suite", action="append", choices=TIMED, default=[], help="repeatable")
    parser.add_argument("--op", action="append", choices=OPS, default=[], help="repeatable")
    parser.add_argument("--results", type=Path, default=FOLDER, help="benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.threshold <= 1:
        parser.error("--threshold must be above 1: how many times as long counts as slower")
    try:
        a, b = resolve(arguments.a, arguments.b, arguments.results)
        if a.path == b.path:
            raise UnusableError(f"A and B are both {a.path}")
        result = compare(a, b, arguments.threshold, arguments.suite, arguments.op)
        if not result.verdicts and not any(result.notes.values()):
            raise UnusableError("no row of ours is in either run")
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"A: {a.path}, {a.machine['started']}\nB: {b.path}, {b.machine['started']}")
    print("\n".join(lines(result)))
    return 1 if result.worse else 0


if __name__ == "__main__":
    sys.exit(main())
