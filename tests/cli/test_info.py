"""``fused-attn info`` and the command line itself."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attn import __version__, _extension
from fused_attn.cli import COMMANDS, main
from fused_attn.ops import _backend
from fused_attn.validation import OPS

ROOT = Path(__file__).resolve().parents[2]
MISSING = "the C++ extension was not built (no C++ compiler at installation): install g++"


def test_json_tells_versions_hardware_and_every_backend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["fused_attn"] == __version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["extension"]["loaded"]
    assert found["extension"]["instruction_set"] in found["extension"]["compiled_for"]
    assert found["backends"]["cpu"]["cpu"] == ""
    assert found["backends"]["cpu"]["reference"] == ""
    assert "cuda tensors only" in found["backends"]["cpu"]["cuda"]
    assert ("cuda" in found["backends"]) == torch.cuda.is_available()
    assert set(found["ops"]) == set(OPS)
    assert all(has["reference"] for has in found["ops"].values())


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library of the tests, which executes CUDA kernels on the CPU."""
    monkeypatch.setattr(_extension, "load_cuda_host", lambda: "runs on cuda tensors only, got cpu")


def test_text_has_a_line_for_each_op_and_says_which_kernels_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{'torch':16}{torch.__version__}" in lines
    assert any(line.startswith("C++ kernels") and "compiled for" in line for line in lines)
    for op in OPS:
        (line,) = (x for x in lines if x.split()[:2] == ["cpu", op])
        assert line.split()[-1] == "yes"
    assert any("cuda on cpu tensors: runs on cuda tensors only" in line for line in lines)


def test_says_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(_extension, "load", lambda: MISSING)
    monkeypatch.setattr(
        _backend.importlib.util, "find_spec", lambda name: None if name == "triton" else name
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"absent: {MISSING}" in text
    assert f"cpu on cpu tensors: {MISSING}" in text
    assert "pip install 'fused_attn[triton]'" in text
    for name in ("triton", "C++ compiler", "nvcc"):
        assert f"{name:16}not found" in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extension"] == {
        "loaded": False,
        "missing": MISSING,
        "instruction_set": None,
        "compiled_for": [],
        "cuda": None,
    }


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fused_attn", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"fused-attn {__version__}\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text


@pytest.mark.parametrize("words", [[], ["dance"], ["info", "--yaml"]])
def test_a_wrong_call_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "usage: fused-attn" in capsys.readouterr().err
