"""Every CUDA kernel, executed on the host: in several schedules and under the sanitizers.

The shared suite (tests/ops) runs them too, in the plain schedule.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn.validation import OPS, op_backends, validate
from tests.cuda_host.build import SANITIZED, build, environment, missing

ROOT = Path(__file__).resolve().parents[2]
CUDA_OPS = tuple(op for op in OPS if "cuda" in op_backends(op))

pytestmark = pytest.mark.skipif(missing() != "", reason=missing() or "everything is there")


def run_python(flavour: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python process that executes CUDA kernels in this flavour."""
    library = {"FUSED_ATTN_CUDA_HOST": str(build(flavour))}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment(flavour), **library},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("schedule", ["reverse", "depth_first", "random seed=1 early"])
@pytest.mark.parametrize("op", CUDA_OPS)
def test_any_schedule(op: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOST_SCHEDULE", schedule)
    rows = list(validate([op], ["cuda"], "cpu"))
    assert [row for row in rows if row.verdict not in ("passed", "refused")] == []
    assert any(row.verdict == "passed" for row in rows)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("op", CUDA_OPS)
def test_sanitized(op: str, flavour: str) -> None:
    dtypes = [word for dtype in SANITIZED[op] for word in ("--dtype", dtype)]
    result = run_python(flavour, "-m", "tests.cuda_host.check", op, *dtypes)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"passed [1-9]\d*, refused \d+, launches [1-9]", result.stdout)


@pytest.mark.parametrize(
    ("flavour", "mistake", "found"),
    [
        ("asan", "write_behind", "AddressSanitizer: heap-buffer-overflow"),
        ("tsan", "race", "ThreadSanitizer: data race"),
    ],
)
def test_sanitizers_watch_over_tensors(flavour: str, mistake: str, found: str) -> None:
    script = f"""
import torch
from fused_attn import _extension
assert _extension.load_cuda_host() is None
x = torch.zeros(5)
torch.ops.fused_attn_cuda_host.{mistake}(x)
print("went on")
"""
    result = run_python(flavour, "-c", script)
    assert result.returncode != 0
    assert found in result.stderr
    assert "went on" not in result.stdout
