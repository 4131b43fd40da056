"""Checks every backend against the fp64 oracle on the machine at hand."""

from .oracle import (
    case_inputs,
    check_case,
    compare_results,
    oracle_and_reference,
    run_case,
    run_function,
)
from .runner import OPS, Row, fused_backends, op_backends, op_cases, validate
from .tolerance import Comparison, compare

__all__ = [
    "OPS",
    "Comparison",
    "Row",
    "case_inputs",
    "check_case",
    "compare",
    "compare_results",
    "fused_backends",
    "op_backends",
    "op_cases",
    "oracle_and_reference",
    "run_case",
    "run_function",
    "validate",
]
