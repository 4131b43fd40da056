"""Hopper's instructions on a CPU: products by them are right, and mistakes with them are found."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.cuda_host.build import CSRC, HOST, build_program, missing
from tests.cuda_host.programs import RACE, RESULT, RIG, SCHEDULES, report

FORMS = (
    "both_along_k",
    "b_across_k",
    "both_across_k",
    "a_in_registers",
    "wide",
    "wide_in_registers",
)
# What finds each mistake: in every late schedule, in some schedule, in ThreadSanitizer's build,
# which takes seconds and is asked where a schedule may miss it.
MISTAKES: dict[str, tuple[str | None, str, str | None]] = {
    "no_wait_for_tiles": (RIG, RIG, None),
    "no_wait_for_buffer": (RIG, RIG, None),
    "early_release": (None, RESULT, RACE),
    "no_wait_for_products": (RESULT, RESULT, None),
    "too_few_bytes": (RIG, RIG, None),
    "too_many_bytes": (RIG, RIG, None),
    "wrong_parity": (RIG, RIG, None),
    "missing_arrival": (RIG, RIG, None),
    "no_fence_of_barriers": (RIG, RIG, None),
    "no_fence_of_registers": (RIG, RIG, None),
    "divergent_product": (RIG, RIG, None),
    "different_descriptors": (RIG, RIG, None),
    "overwritten_barrier": (RIG, RIG, None),
    "copy_after_the_end": (RIG, RIG, None),
}
NEEDS_RIG = pytest.mark.skipif(missing() != "", reason=missing() or "everything is there")


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return {flavour: build_program("hopper", flavour) for flavour in ("plain", "asan", "tsan")}


@NEEDS_RIG
@pytest.mark.parametrize("form", FORMS)
def test_multiplies(form: str, programs: dict[str, Path]) -> None:
    for schedule in SCHEDULES:
        assert report(programs["plain"], [form], "plain", schedule) == ""
    assert report(programs["asan"], [form], "asan") == ""


@NEEDS_RIG
@pytest.mark.parametrize("form", ["both_along_k", "a_in_registers"])
def test_multiplies_without_a_race(form: str, programs: dict[str, Path]) -> None:
    assert report(programs["tsan"], [form], "tsan") == ""


@NEEDS_RIG
def test_a_tensor_map_may_be_refused(programs: dict[str, Path]) -> None:
    assert "product: a tensor map was refused: 1" in report(programs["plain"], ["odd_map"], "plain")


@NEEDS_RIG
@pytest.mark.parametrize("mistake", MISTAKES)
def test_finds_the_mistake(mistake: str, programs: dict[str, Path]) -> None:
    always, sometimes, by_tsan = MISTAKES[mistake]
    reports = {s: report(programs["plain"], [mistake], "plain", s) for s in SCHEDULES}
    assert any(sometimes in text for text in reports.values()), reports
    if always is not None:
        late = [text for schedule, text in reports.items() if "early" not in schedule]
        assert all(always in text for text in late), reports
    if by_tsan is not None:
        assert by_tsan in report(programs["tsan"], [mistake], "tsan")


def nvcc(*words: str) -> subprocess.CompletedProcess[str]:
    """NVIDIA's compiler on the program; skips the test where there is none."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [str(Path(home, "bin")) for home in homes if home]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    compiler = shutil.which("nvcc", path=path)
    if compiler is None:
        pytest.skip("nvcc is not installed")
    flags = ["-x", "cu", "-std=c++20", "-O3", f"-I{CSRC}", f"-I{HOST}"]
    command = [compiler, *flags, *words, str(HOST / "hopper.cpp")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compiles_to_hoppers_instructions(tmp_path: Path) -> None:
    cubin = tmp_path / "hopper.cubin"
    result = nvcc("-arch=sm_90a", "-Xptxas=-v", "-cubin", "-o", str(cubin))
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    # C75xx: products one after the other, or waits that the source does not have.
    assert "(C75" not in result.stderr, result.stderr
    assert result.stderr.count(" 0 bytes spill stores") == len(FORMS)
    assert not re.search(r"[1-9]\d* bytes spill", result.stderr), result.stderr
    if importlib.util.find_spec("triton") is None:
        pytest.skip("nvdisasm comes with triton, which is not installed")
    import triton

    command = [triton.knobs.nvidia.nvdisasm.path, "--no-dataflow", str(cubin)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in (
        *[f"HGMMA.64x{n}x16.F32" for n in (64, 128, 256)],
        *["HGMMA.64x128x16.F32.BF16", "UTMALDG.2D", "SYNCS.PHASECHK", "USETMAXREG"],
    ):
        assert instruction in code, instruction


def test_compiles_for_other_architectures(tmp_path: Path) -> None:
    result = nvcc("-arch=sm_80", "-cubin", "-o", str(tmp_path / "hopper.cubin"))
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_multiplies_on_a_gpu(form: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("there is no GPU of capability 9.0 here")
    program = tmp_path / "hopper"
    result = nvcc("-arch=sm_90a", "-o", str(program))
    assert result.returncode == 0, result.stderr
    assert report(program, [form], "plain") == ""
