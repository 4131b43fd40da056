"""Additive attention's Triton kernels compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util

import pytest

from tests.triton_tools.ahead_of_time import SHARED_MEMORY_LIMIT, TARGETS, compile_in_subprocess

OP = "additive_attention"
FORWARD = {"additive_scores_kernel", "additive_context_kernel"}
BACKWARD = {
    "additive_score_gradient_kernel",
    "additive_value_gradient_kernel",
    "additive_pair_gradient_kernel",
    "additive_query_gradient_kernel",
    "reduce_partials_kernel",
}
CALLS = [
    {"dtype": "bfloat16"},
    # A step of decoding, or of training with location filters.
    {"dtype": "bfloat16", "T": 1, "F": 10},
    # Rows that are not aligned.
    {"dtype": "float32", "E": 250, "D": 250, "masked": False},
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason=f"{OP}: triton is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_ahead_of_time_without_spills(target: str) -> None:
    reports = compile_in_subprocess(target, OP, CALLS)
    kernels = {r["kernel"] for r in reports if r["call"] == CALLS[0]}
    assert kernels == FORWARD | BACKWARD
    kernels = {r["kernel"] for r in reports if r["call"] == CALLS[1]}
    assert "additive_feature_gradient_kernel" in kernels
    for report in reports:
        assert report["registers"] > 0, report
        assert report["spilled_bytes"] == 0, report
        assert report["shared"] <= SHARED_MEMORY_LIMIT[target], report


@pytest.mark.slow
def test_lengths_compile_nothing_anew() -> None:
    lengths = [{"B": 8, "T": 64, "S": 96}, {"B": 3, "T": 17, "S": 1}, {"B": 1, "T": 255, "S": 1001}]
    calls = [{"dtype": "bfloat16", "E": 96, "D": 48, "F": 3, **length} for length in lengths]
    reports = compile_in_subprocess("sm_90", OP, calls)
    assert {r["kernel"] for r in reports if r["call"] == calls[0]} > FORWARD
    # Sums of partial gradients have tiles that fit the number of programs.
    anew = [r["kernel"] for r in reports if r["call"] != calls[0]]
    assert set(anew) <= {"reduce_partials_kernel"}, anew
