"""The rig that executes CUDA kernels on a CPU: it must find every mistake that it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_host.build import build_program, missing
from tests.cuda_host.programs import ADDRESS, RACE, RESULT, RIG, SCHEDULES, UNDEFINED, report

pytestmark = pytest.mark.skipif(missing() != "", reason=missing() or "everything is there")

# What finds each mistake: in every plain schedule, in some plain schedule, in AddressSanitizer's
# and in ThreadSanitizer's build. None: nothing does there.
MISTAKES: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "missing_barrier": (RESULT, RESULT, RESULT, RACE),
    "reused_buffer": (None, RESULT, None, RACE),
    "missing_syncwarp": (RESULT, RESULT, RESULT, RACE),
    "divergent_barrier": (RIG, RIG, RIG, RIG),
    "exited_lanes": (RIG, RIG, RIG, RIG),
    "mixed_collectives": (RIG, RIG, RIG, RIG),
    "absent_source": (RIG, RIG, RIG, RIG),
    "barrier_counts": (RIG, RIG, RIG, RIG),
    "race_of_blocks": (RESULT, RESULT, RESULT, RACE),
    "lost_update": (None, None, None, RACE),
    "missing_wait": (None, RESULT, RESULT, RESULT),
    "copy_into_buffer_in_use": (None, RESULT, None, RACE),
    "misaligned_copy": (RIG, RIG, RIG, RIG),
    "global_bounds": (RESULT, RESULT, ADDRESS, RESULT),
    "dynamic_shared_bounds": (None, None, ADDRESS, None),
    "static_shared_bounds": (None, None, ADDRESS, None),
    "local_bounds": (None, None, UNDEFINED, None),
    "misaligned_vector": (None, None, UNDEFINED, None),
    "uninitialised_shared": (RESULT, RESULT, RESULT, RESULT),
}


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return {flavour: build_program("defects", flavour) for flavour in ("plain", "asan", "tsan")}


@pytest.mark.parametrize("name", MISTAKES)
def test_lets_the_right_kernel_pass(name: str, programs: dict[str, Path]) -> None:
    for schedule in SCHEDULES:
        assert report(programs["plain"], [name, "right"], "plain", schedule) == ""
    for flavour in ("asan", "tsan"):
        assert report(programs[flavour], [name, "right"], flavour) == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_finds_the_mistake(name: str, programs: dict[str, Path]) -> None:
    always, sometimes, by_asan, by_tsan = MISTAKES[name]
    plain = [report(programs["plain"], [name, "wrong"], "plain", s) for s in SCHEDULES]
    if always is not None:
        assert all(always in text for text in plain), plain
    if sometimes is not None:
        assert any(sometimes in text for text in plain), plain
    if by_asan is not None:
        assert by_asan in report(programs["asan"], [name, "wrong"], "asan")
    if by_tsan is not None:
        assert by_tsan in report(programs["tsan"], [name, "wrong"], "tsan")
    assert {sometimes, by_asan, by_tsan} != {None}


def test_says_where_every_thread_waits(programs: dict[str, Path]) -> None:
    text = report(programs["plain"], ["divergent_barrier", "wrong"], "plain")
    assert "divergent_barrier, block (0, 0, 0), thread (" in text
    assert "from thread 0: waits in __syncthreads" in text


def test_a_schedule_must_be_known(programs: dict[str, Path]) -> None:
    text = report(programs["plain"], ["missing_barrier", "right"], "plain", "sideways")
    assert "CUDA_HOST_SCHEDULE: unknown word sideways" in text
