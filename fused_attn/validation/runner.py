"""Validates backends on this machine: every named case against the fp64 oracle."""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_attn.ops._backend import unavailable_reason
from fused_attn.ops._cases import Case

from .oracle import check_case
from .tolerance import Comparison

OPS = (
    "add_layer_norm",
    "additive_attention",
    "attention",
    "beam_search",
    "bias_activation_dropout",
    "copy_distribution",
    "decode_attention",
    "recurrent_cell",
)


@dataclass(frozen=True)
class Row:
    """The verdict on one case."""

    op: str
    backend: str
    case: str
    dtype: str
    device: str
    verdict: str
    """``passed``, ``failed``, ``refused`` (the backend says that it cannot run the case) or
    ``error`` (it raised anything else)."""
    comparisons: list[Comparison] = field(default_factory=list)
    detail: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """As an object of JSON, which has no infinity: a comparison that could not be made has no
        error to state."""
        record = dataclasses.asdict(self)
        for values, comparison in zip(record["comparisons"], self.comparisons, strict=True):
            values["passed"] = comparison.passed
            for name in ("max_error", "rms_error"):
                if values[name] == math.inf:
                    values[name] = None
        return record


def op_cases(op: str) -> tuple[Case, ...]:
    """The named cases of an op."""
    return importlib.import_module(f"fused_attn.ops.{op}.cases").CASES


def op_backends(op: str) -> tuple[str, ...]:
    """The backends that an op has, ``reference`` among them, whether or not they can run here."""
    return tuple(importlib.import_module(f"fused_attn.ops.{op}.api").BACKENDS)


def fused_backends(op: str, device: str) -> tuple[str, ...]:
    """The op's backends other than the reference that are available for a device here."""
    device_type = torch.device(device).type
    return tuple(
        name
        for name in op_backends(op)
        if name != "reference" and unavailable_reason(name, device_type) == ""
    )


def validate(
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    device: str = "cpu",
    kinds: Iterable[str] = ("edge", "typical"),
) -> Iterator[Row]:
    """Check ops on a device, yielding one row a case, dtype and backend.

    Args:
        ops: Names from :data:`OPS`; default: all.
        backends: Names; default: every available one but the reference.
        device: Where the tensors live, e.g. ``cpu`` or ``cuda:0``.
        kinds: Which kinds of cases to run.
    """
    for op in ops or OPS:
        names = fused_backends(op, device) if backends is None else backends
        for backend in names:
            if backend not in op_backends(op):
                continue
            for case in op_cases(op):
                if case.kind not in kinds:
                    continue
                for dtype in case.dtypes:
                    yield check(op, backend, case, dtype, device)


def check(op: str, backend: str, case: Case, dtype: torch.dtype, device: str) -> Row:
    """The verdict on one case."""
    label = str(dtype).removeprefix("torch.")
    started = time.perf_counter()
    try:
        comparisons = check_case(case, backend, dtype, device)
        verdict = "passed" if all(c.passed for c in comparisons) else "failed"
        detail = "; ".join(str(c) for c in comparisons if not c.passed)
    except NotImplementedError as error:
        comparisons, verdict, detail = [], "refused", str(error)
    except Exception as error:  # a row of the report, so that the other cases still run
        comparisons, verdict = [], "error"
        detail = f"{type(error).__name__}: {error}"
    elapsed = time.perf_counter() - started
    return Row(op, backend, case.name, label, device, verdict, comparisons, detail, elapsed)
