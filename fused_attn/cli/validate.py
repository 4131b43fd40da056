"""``fused-attn validate``: checks every backend against the fp64 oracle on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter

from tqdm import tqdm

from fused_attn.ops._backend import BACKENDS, substitute, unavailable_reason
from fused_attn.validation import OPS, Row, fused_backends, op_backends, op_cases, validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument(
        "--backend", action="append", choices=BACKENDS, help="only this backend; repeatable"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--kind",
        action="append",
        choices=("edge", "typical", "benchmark"),
        help="kinds of cases; repeatable (default: edge and typical)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--quiet", action="store_true", help="print only the rows that did not pass"
    )


def run(arguments: argparse.Namespace) -> int:
    """Validate; 0 when every case that ran passed and every named backend ran some case."""
    kinds = tuple(arguments.kind or ("edge", "typical"))
    ops = arguments.op or list(OPS)
    total = sum(
        len(case.dtypes)
        for op in ops
        for backend in (arguments.backend or fused_backends(op, arguments.device))
        if backend in op_backends(op)
        for case in op_cases(op)
        if case.kind in kinds
    )
    rows = []
    bar = tqdm(
        validate(ops, arguments.backend, arguments.device, kinds),
        total=total,
        unit="case",
        disable=None,
        leave=False,
    )
    for row in bar:
        rows.append(row)
        if arguments.json:
            print(json.dumps(row.as_json()), flush=True)
        elif not arguments.quiet or row.verdict != "passed":
            tqdm.write(_as_line(row), file=sys.stdout)
    silent = [
        backend
        for backend in arguments.backend or []
        if not any(row.backend == backend and row.verdict in ("passed", "failed") for row in rows)
    ]
    if not arguments.json:
        _print_summary(rows, arguments.device.split(":")[0])
    for backend in silent:
        reason = unavailable_reason(backend, arguments.device.split(":")[0]) or "no case applied"
        print(f"backend {backend} ran no case: {reason}", file=sys.stderr)
    if not any(row.verdict == "passed" for row in rows):
        print("no case passed: nothing was validated", file=sys.stderr)
        return 1
    return 1 if silent or any(row.verdict in ("failed", "error") for row in rows) else 0


def _as_line(row: Row) -> str:
    head = f"{row.verdict:8}{row.op:24}{row.backend:8}{row.dtype:10}{row.case:32}"
    if row.comparisons and row.verdict == "passed":
        worst = max(row.comparisons, key=lambda c: c.share)
        return (
            f"{head}worst {worst.name}: error {worst.max_error:.2g}, budget {worst.max_budget:.2g}"
        )
    return f"{head}{row.detail}"


def _print_summary(rows: list[Row], device_type: str) -> None:
    print(f"{'op':24}{'backend':10}{'passed':>8}{'failed':>8}{'refused':>9}{'errors':>8}  worst")
    for op, backend in sorted({(row.op, row.backend) for row in rows}):
        group = [row for row in rows if (row.op, row.backend) == (op, backend)]
        count = Counter(row.verdict for row in group)
        worst = max((c.share for row in group for c in row.comparisons), default=0.0)
        print(
            f"{op:24}{backend:10}{count['passed']:8}{count['failed']:8}{count['refused']:9}"
            f"{count['error']:8}  {worst:.0%} of the error budget"
        )
    for backend in sorted({row.backend for row in rows}):
        if instead := substitute(backend, device_type):
            print(f"{backend}: {instead}, not on a GPU")
