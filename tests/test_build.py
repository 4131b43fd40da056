"""What setup.py decides: with and without a compiler, nvcc and a CUDA build of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run_setup(path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext --dry-run``-like: evaluates the extension list without compiling."""
    script = (
        "import sys, setuptools; sys.argv = ['setup.py', 'build_ext']; "
        "setuptools.setup = lambda **k: print('extensions:', len(k['ext_modules'])); "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), "
        "{'__name__': 'setup', '__file__': 'setup.py'})"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**clean, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def empty_path(tmp_path: Path) -> str:
    return str(tmp_path)


def test_builds_one_extension_with_a_compiler() -> None:
    result = run_setup(os.environ["PATH"], FUSED_ATTN_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "extensions: 1" in result.stdout


def test_installs_without_the_extension_when_there_is_no_compiler(empty_path: str) -> None:
    result = run_setup(empty_path)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found" in result.stdout
    assert "extensions: 0" in result.stdout


def test_cuda_1_without_nvcc_is_an_error(empty_path: str) -> None:
    result = run_setup(empty_path, FUSED_ATTN_CUDA="1")
    assert result.returncode != 0
    assert "FUSED_ATTN_CUDA=1, but" in result.stderr
    assert "nvcc is not on PATH" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_cuda_1_with_a_cpu_build_of_torch_is_an_error(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    result = run_setup(f"{tmp_path}:{os.environ['PATH']}", FUSED_ATTN_CUDA="1")
    assert result.returncode != 0
    assert "this torch is a CPU build" in result.stderr
    assert "nvcc is not on PATH" not in result.stderr


def test_cuda_takes_three_values_only() -> None:
    result = run_setup(os.environ["PATH"], FUSED_ATTN_CUDA="yes")
    assert result.returncode != 0
    assert "FUSED_ATTN_CUDA must be auto, 0 or 1, got 'yes'" in result.stderr


def test_a_cuda_build_has_a_source_for_every_type_and_head_size(tmp_path: Path) -> None:
    """The list of sources and flags of a CUDA build, as on a machine with nvcc and a CUDA torch."""
    script = """
import sys
from unittest import mock
import setuptools, torch
from torch.utils import cpp_extension
sys.argv = ["setup.py", "build_ext"]
found = {}
with (
    mock.patch.object(torch.version, "cuda", "13.0"),
    mock.patch.object(cpp_extension, "CUDAExtension", lambda *a, **k: found.update(k, name=a)),
    mock.patch.object(setuptools, "setup", lambda **k: None),
):
    exec(compile(open("setup.py").read(), "setup.py", "exec"),
         {"__name__": "setup", "__file__": "setup.py"})
import os
print(os.environ["TORCH_CUDA_ARCH_LIST"])
print(*found["name"][1], sep="\\n")
print(found["extra_compile_args"]["nvcc"], found["define_macros"])
"""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FUSED_ATTN_CUDA": "1"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "8.0;9.0+PTX"
    assert "('FUSED_ATTN_BUILD_CUDA', '1')" in lines[-1]
    sources = lines[1:-1]
    for op in ("add_layer_norm", "attention", "beam_search", "decode_attention"):
        assert f"csrc/{op}/{op}_cuda.cpp" in sources
        assert any(source.startswith(f"build/generated/{op}_cuda_half") for source in sources)
    assert "build/generated/attention_cuda_nv_bfloat16_128.cu" in sources
    assert "build/generated/cuda_architectures.cpp" in sources
    assert not any(source.endswith("_cuda.cu") for source in sources)


@pytest.mark.parametrize("architectures", ["7.5", "8.0;Volta", "7.0 9.0"])
def test_architectures_before_8_0_are_an_error(architectures: str) -> None:
    script = (
        "import setuptools; setuptools.setup = lambda **k: None; g = {'__name__': 'setup', "
        "'__file__': 'setup.py'}; exec(compile(open('setup.py').read(), 'setup.py', 'exec'), g); "
        "g['cuda_architectures']([])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": architectures},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "the CUDA kernels need compute capability 8.0 or later" in result.stderr
