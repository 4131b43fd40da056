"""The end of the output, which may be all that one sees of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..comparisons import comparisons
from ..results import Row
from .session import Session, line

# Together below a hundred lines.
FAILURES, TIMES = 20, 45


def summary(session: Session) -> list[str]:
    """What passed, what failed and why, and ours beside the best peer."""
    lines = [line(row) for row in session.suite("stage")]
    counts = Counter((r["op"], r["backend"], r["verdict"]) for r in session.suite("validate"))
    for op, backend in dict.fromkeys((op, backend) for op, backend, _ in counts):
        found = (f"{counts[op, backend, v]} {v}" for v in ("passed", "failed", "error", "refused"))
        lines.append(f"validate {op} {backend}: {', '.join(found)}")
    problems = [
        line(row)
        for suite in ("validate", "tests", "operators", "models", "profile")
        for row in session.suite(suite)
        if row.get("verdict") in ("failed", "error") or row.get("failed")
    ]
    lines += problems[:FAILURES]
    if len(problems) > FAILURES:
        lines.append(f"... and {len(problems) - FAILURES} more failures")
    times = list(_beside_best_peer([*session.suite("models"), *session.suite("operators")]))
    lines += times[:TIMES]
    if len(times) > TIMES:
        lines.append(f"... and {len(times) - TIMES} more times")
    return lines


def _beside_best_peer(rows: Sequence[Row]) -> Iterable[str]:
    """A line a case: the best of ours and the best of the others."""
    for one in comparisons(rows):
        best, peer = one.fastest, one.best_peer
        if best is None:
            continue
        text = f"{one.name}: {best['provider']} {best['p50_ms']:.4g} ms"
        if "share_of_roof" in best:
            text += f", {best['share_of_roof']:.0%} of the roof"
        if peer is not None:
            text += f"; {peer['provider']} {peer['p50_ms'] / best['p50_ms']:.2f} times that"
        yield text
