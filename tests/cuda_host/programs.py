"""Runs programs that execute kernels, and reads what is said of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cuda_host.build import environment

# Schedules that differ in which thread runs first and in when asynchronous operations happen.
SCHEDULES = ("forward", "reverse", "depth_first", "random seed=1", "random seed=2 early")

RESULT = "wrong: "
RIG = "cuda_host: "
ADDRESS = "AddressSanitizer"
UNDEFINED = "runtime error: "
RACE = "ThreadSanitizer: data race"


def report(program: Path, words: Sequence[str], flavour: str, schedule: str = "forward") -> str:
    """What the program and the sanitizer said; empty for a right result and silence."""
    result = subprocess.run(
        [str(program), *words],
        env={**os.environ, **environment(flavour, schedule, preload=False)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0 or result.stderr != "" or result.returncode < 0, result
    return result.stderr
