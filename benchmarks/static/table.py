"""The rows: made of reports, kept in ``benchmarks/results/static.jsonl``, compared."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from . import cuda
from .launches import Call
from .targets import LIMITS, occupancy
from .triton import ROOT, Compiler

PATH = ROOT / "benchmarks" / "results" / "static.jsonl"
# Why a kernel may spill, by op, target and kernel. Each is shown.
ALLOWED_SPILLS: dict[tuple[str, str, str], str] = {}

Row = dict[str, Any]
_SORTED_BY = ("kind", "op", "target", "call", "kernel")


class Scope(NamedTuple):
    """A call for a target, or a unit: what is compiled together."""

    kind: str
    op: str
    target: str
    call: str


def scope(row: Row) -> Scope:
    """Which a row belongs to."""
    return Scope(row["kind"], row["op"], row["target"], row["call"])


def triton_rows(compiler: Compiler, op: str, target: str, call: Call) -> list[Row]:
    """A row a kernel of a call.

    Raises:
        RuntimeError: It does not compile.
    """
    reports = compiler.compile(target, op, call.arguments)
    return _rows(Scope("triton", op, target, call.name), reports)


def cuda_rows(compiled: cuda.Compiled, unit: str, target: str) -> list[Row]:
    """A row a kernel of a unit."""
    op, _, kind = unit.partition("_cuda_")
    return _rows(Scope("cuda", op, target, kind), [k.report() for k in compiled.kernels])


def _rows(place: Scope, reports: list[dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for report in reports:
        fields = {name: value for name, value in report.items() if name != "hash"}
        kernel = fields.pop("kernel")
        seen[kernel] = seen.get(kernel, 0) + 1
        if seen[kernel] > 1:
            kernel += f" ({seen[kernel]})"
        found = occupancy(
            place.target,
            fields["threads"],
            fields["registers"],
            fields["shared"],
            fields.get("tensor_columns", 0),
        )
        rows.append(
            {
                "suite": "static",
                **place._asdict(),
                "kernel": kernel,
                **fields,
                "occupancy": {**found._asdict(), "share": round(found.share, 4)},
            }
        )
    return rows


def versions() -> Row:
    """The row that says what compiled the others; of what is not here, nothing."""
    found = {"suite": "static", "kind": "versions"}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if cuda.absent() == "":
        found["nvcc"] = cuda.version()
    return found


def problems(rows: Iterable[Row]) -> list[str]:
    """What must not be, a line each."""
    found = []
    for row in rows:
        if row["spills"] > 0 and allowed_spill(row) == "":
            found.append(f"{name(row)}: {row['spills']} bytes of registers are spilled")
        limit = LIMITS[row["target"]].block_shared
        if row["shared"] > limit:
            found.append(
                f"{name(row)}: {row['shared']} bytes of shared memory; a block may have {limit}"
            )
        if row["occupancy"]["blocks"] == 0 and row["shared"] <= limit:
            found.append(f"{name(row)}: no block fits: {row['occupancy']['bound']}")
    return found


def allowed_spill(row: Row) -> str:
    """Why this kernel may spill; empty if it may not."""
    return ALLOWED_SPILLS.get((row["op"], row["target"], row["kernel"].split(" ")[0]), "")


def name(row: Row) -> str:
    """``attention sm_90 attention_forward_kernel bfloat16 head_size=64 causal``."""
    return " ".join(row[part] for part in ("op", "target", "kernel", "call"))


def differences(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """What is new, gone or changed, a line each."""
    old, new = ({_key(row): row for row in rows} for rows in (before, after))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            lines.append(f"{name(old[key])}: gone")
        elif key not in old:
            lines.append(f"{name(new[key])}: added")
        else:
            changes = [
                f"{field} {_cell(old[key].get(field))} -> {_cell(new[key].get(field))}"
                for field in dict.fromkeys([*old[key], *new[key]])
                if old[key].get(field) != new[key].get(field)
            ]
            if changes:
                lines.append(f"{name(new[key])}: {', '.join(changes)}")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + " ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return "none" if value is None else str(value)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[part] for part in _SORTED_BY)


def read(path: Path = PATH) -> tuple[Row, list[Row]]:
    """The versions, and the rows; of no file, an empty table."""
    if not path.exists():
        return {"triton": None, "nvcc": None}, []
    first, *rows = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return first, rows


def write(compilers: Row, rows: Iterable[Row], path: Path = PATH) -> None:
    """Write the whole table, sorted: the same rows make the same bytes."""
    lines = [compilers, *sorted(rows, key=_key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), "utf-8")
