"""Attention's Triton kernels compiled for GPUs that are not there, as the launchers choose."""

from __future__ import annotations

import importlib.util

import pytest

from tests.triton_tools.ahead_of_time import SHARED_MEMORY_LIMIT, TARGETS, compile_in_subprocess

SPECIALIZED = "128x128 4w 2s tma specialize"
KERNELS = {
    "attention_forward_kernel",
    "attention_query_gradient_kernel",
    "attention_key_gradient_kernel",
}
CALLS = [
    {"dtype": "bfloat16", "head_size": 64},
    {"dtype": "bfloat16", "head_size": 128},
    {"dtype": "bfloat16", "head_size": 64, "features": "everything"},
    {"dtype": "bfloat16", "head_size": 128, "features": "everything"},
    # Too few rows for descriptors.
    {"dtype": "float16", "head_size": 128, "rows": 256, "key_heads": 8},
    {"dtype": "float32", "head_size": 64, "features": "masked"},
]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_ahead_of_time_without_spills(target: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("attention: triton is not installed")
    reports = compile_in_subprocess(target, "attention", CALLS)
    for call in CALLS:
        wanted = KERNELS | ({"attention_bias_gradient_kernel"} if "features" in call else set())
        assert {r["kernel"] for r in reports if r["call"] == call} == wanted, call
    for report in reports:
        assert report["registers"] > 0, report
        assert report["spilled_bytes"] == 0, report
        assert report["shared"] <= SHARED_MEMORY_LIMIT[target], report
        if report["call"]["dtype"] == "float32":
            continue
        assert report["tensor_core"] > 0, report
        if target == "sm_90" and report["kernel"] in KERNELS:
            assert report["wgmma"] > 0, report
            assert not report["serialized"], report
    if target == "sm_90":
        # Large plain calls: loads through descriptors.
        large = [r for r in reports if r["call"] in CALLS[:2]]
        described = {"attention_forward_kernel", "attention_query_gradient_kernel"}
        large = [r for r in large if r["kernel"] in described]
        assert len(large) == 4
        assert all(r["bulk_copies"] > 0 for r in large), large


@pytest.mark.slow
def test_warps_can_divide_the_work_of_a_forward() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("attention: triton is not installed")
    calls = [{**call, "forward_launch": SPECIALIZED} for call in CALLS[:2]]
    reports = compile_in_subprocess("sm_90", "attention", calls)
    assert len(reports) == len(calls)
    for report in reports:
        assert report["specialized"], report
        assert report["wgmma"] > 0, report
        assert report["bulk_copies"] > 0, report
        assert report["spilled_bytes"] == 0, report
        assert report["shared"] <= SHARED_MEMORY_LIMIT["sm_90"], report
