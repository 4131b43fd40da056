"""``pytest benchmarks``: options, and the fixture that times a provider."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn.ops._cases import Case, Direction

from .operators import OURS
from .results import problem
from .suite import CLOCK, Session

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_attn benchmarks")
    group.addoption("--quick", action="store_true", help="two cases of each op, 5 turns")
    group.addoption("--turns", type=int, help="turns of each provider (15; quick: 5)")
    group.addoption("--out", type=Path, help="folder of the results; default: results/<device>/")


def pytest_configure(config: pytest.Config) -> None:
    turns = config.getoption("turns") or (5 if config.getoption("quick") else 15)
    config.stash[_SESSION] = Session(turns, config.getoption("out"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("quick"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    path = session.close()
    if path is None:
        return
    terminalreporter.section("peers")
    for note in session.notes():
        terminalreporter.write_line(note)
    terminalreporter.write_line(f"results: {path}")


@pytest.fixture
def measured(
    benchmark: Any, request: pytest.FixtureRequest
) -> Callable[[Case, torch.dtype, Direction, str], None]:
    """Times a provider among its peers; ours may not fail, a peer is then skipped."""

    def measure(case: Case, dtype: torch.dtype, direction: Direction, provider: str) -> None:
        session = request.config.stash[_SESSION]
        row, seconds = session.row(case, dtype, direction, provider)
        if "failed" in row and provider in OURS:
            pytest.fail(row["failed"])
        if why := problem(row):
            pytest.skip(why)
        benchmark.extra_info.update(row)
        turns = iter(seconds)
        benchmark.pedantic(lambda: CLOCK.advance(next(turns)), rounds=len(seconds), iterations=1)

    return measure
