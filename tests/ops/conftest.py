"""Parametrises the shared suite: see `suite.py`."""

from __future__ import annotations

import pytest
import torch

from fused_attn.validation import fused_backends, op_cases

from .suite import OpSuite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = metafunc.cls
    if suite is None or not issubclass(suite, OpSuite) or "backend" not in metafunc.fixturenames:
        return
    (kind,) = {"case", "runnable_case", "typical_case"} & set(metafunc.fixturenames)
    names = [kind, *(["dtype"] if kind == "case" else []), "backend", "device"]
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for backend in fused_backends(suite.op, device):
            for case in op_cases(suite.op):
                if case.kind == "benchmark" or (kind == "typical_case" and case.kind != "typical"):
                    continue
                if kind != "case" and not suite.runnable_dtypes(backend, case):
                    continue
                is_interpreted = backend == "triton" and device == "cpu"
                if is_interpreted and suite.interpreted and case.name not in suite.interpreted:
                    continue
                label = f"{device}-{backend}-{case.name}"
                if kind != "case":
                    rows.append(pytest.param(case, backend, device, marks=marks, id=label))
                    continue
                for dtype in case.dtypes:
                    short = str(dtype).removeprefix("torch.")
                    rows.append(
                        pytest.param(
                            case, dtype, backend, device, marks=marks, id=f"{label}-{short}"
                        )
                    )
    if not rows:
        reason = f"{suite.op}: no fused backend is available here"
        rows = [
            pytest.param(*(None for _ in names), marks=pytest.mark.skip(reason=reason), id="none")
        ]
    metafunc.parametrize(names, rows)
