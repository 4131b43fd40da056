"""A plugin for pytest: a row for each test that fails, and now and then how many have passed.

``-p benchmarks.gpu.pytest_rows``. The rows are lines of the output, so that they are kept when the
run is ended before pytest says what it has found.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

_EVERY = 50
_ERROR_CHARACTERS = 2000


class _Rows:
    def __init__(self, config: pytest.Config) -> None:
        self._terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
        self._count: Counter[str] = Counter()

    def _write(self, row: dict[str, Any]) -> None:
        # Dots may stand before it in the line.
        self._terminal.write("\n" + json.dumps({"suite": "tests", **row}) + "\n", flush=True)

    def _write_count(self) -> None:
        self._write({"case": "all", "counts": dict(self._count)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            error = report.longreprtext[-_ERROR_CHARACTERS:]
            self._write({"case": report.nodeid, "when": report.when, "failed": error})
        if report.when == "call" or report.outcome != "passed":
            self._count[report.outcome] += 1
            if sum(self._count.values()) % _EVERY == 0:
                self._write_count()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            error = report.longreprtext[-_ERROR_CHARACTERS:]
            self._write({"case": report.nodeid, "when": "collect", "failed": error})

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        self._write_count()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # xdist's workers tell the process that started them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Rows(config), "benchmarks-rows")
