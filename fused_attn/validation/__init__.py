"""Checks every backend against the fp64 oracle on the machine at hand."""

from .oracle import case_inputs, check_case, run_case
from .runner import OPS, Row, check, fused_backends, op_backends, op_cases, validate
from .tolerance import Comparison, compare

__all__ = [
    "OPS",
    "Comparison",
    "Row",
    "case_inputs",
    "check",
    "check_case",
    "compare",
    "fused_backends",
    "op_backends",
    "op_cases",
    "run_case",
    "validate",
]
