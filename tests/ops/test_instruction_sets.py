"""Every case of an op with the C++ kernels of the lesser instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn.validation import OPS, fused_backends

ROOT = Path(__file__).parents[2]
# Their own tests also see to it that those kernels run.
TESTED_ELSEWHERE = ("attention", "decode_attention")


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.parametrize("op", [op for op in OPS if op not in TESTED_ELSEWHERE])
def test_every_instruction_set(op: str, capability: str) -> None:
    if "cpu" not in fused_backends(op, "cpu"):
        pytest.skip(f"{op}: the C++ extension is not available here")
    command = ["-m", "fused_attn", "validate", "--op", op, "--backend", "cpu"]
    result = subprocess.run(
        [sys.executable, *command, "--quiet"],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
