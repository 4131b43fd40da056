"""The CUDA kernels' bindings fit torch's CUDA headers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.cuda_host.build import CSRC, cuda_headers, header_flags


@pytest.mark.skipif(cuda_headers() is None, reason="needs CUDA's headers")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*/*_cuda.cpp")), ids=lambda p: p.stem)
def test_bindings_fit_the_headers_of_a_cuda_build_of_torch(source: Path, tmp_path: Path) -> None:
    # Those of a CPU build are the same but for one file, which is written here.
    absent = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    absent.parent.mkdir(parents=True)
    absent.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    torch_include = Path(torch.__file__).parent / "include"
    command = [
        *["g++", "-std=c++20", "-O0", "-Wall", "-Werror", "-fPIC", "-c", str(source)],
        *["-o", str(tmp_path / "binding.o")],
        *[f"-I{CSRC}", f"-isystem{tmp_path}"],
        *[f"-isystem{torch_include}", f"-isystem{torch_include}/torch/csrc/api/include"],
        *header_flags(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
