"""Checks every backend against the fp64 oracle on the machine at hand."""

from .oracle import case_inputs, check_case, oracle_and_reference, run_case, run_function
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
    "oracle_and_reference",
    "run_case",
    "run_function",
    "validate",
]
