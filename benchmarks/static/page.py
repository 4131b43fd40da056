"""The table for readers: a summary, and ``docs/static.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import launches, table
from .table import Row
from .targets import CUDA_TARGETS, LIMITS, TRITON_TARGETS
from .triton import ROOT

PATH = ROOT / "docs" / "static.md"
_COLUMNS = (
    "op", "compiler", "target", "kernels", "registers", "spilled bytes", "shared bytes",
    "lowest occupancy", "tensor cores", "asynchronous copies", "bulk copies",
)  # fmt: skip
_DETAILS = (
    "kernel", "call", "tile, warps, stages", "registers", "shared bytes", "blocks", "occupancy",
    "bound by", "tensor cores", "copies: async, bulk", "widest load",
)  # fmt: skip
# Of which the page has details; the file has all.
_DETAILED = {"triton": "sm_90", "cuda": "sm_90a"}
_LOW = 0.125

_INTRODUCTION = """\
# What compilers make of the kernels

`python -m benchmarks.static --update` makes this page: it compiles the Triton kernels for
{triton_targets} and the CUDA kernels for {cuda_targets}, on a machine
without any of these GPUs. **Nothing here has run on a GPU.** The compilers are triton {triton},
with the assemblers that it brings, and nvcc {nvcc}. All rows are in
[static.jsonl](../benchmarks/results/static.jsonl), and the calls that are compiled in
`benchmarks/static/launches/`, a file an op. Without `--update` the command shows what differs from
the committed rows, and fails where a kernel spills, does not fit or does not compile. With
`--quick` it compiles what the tests do, which fail where a row differs too.

- *Registers* are of a thread; on AMD the vector registers of a lane, those for accumulation among
  them. *Spilled* are bytes that the compiler could not keep in registers. *Shared memory* is a
  block's, static and dynamic; of nvcc's `beam_search` for {beams} beams, the most that it takes.
- *Occupancy* is the share of a multiprocessor's warps that fit at a time: a bound, by registers,
  shared and tensor memory, warps and blocks, and no measurement. *Bound by* says what there would
  have to be more of. Low need not be slow: kernels that multiply tiles keep few warps with many
  registers on purpose.
- *Tensor cores*: `mma` (`mma.sync`), `wgmma` and `tcgen05` in PTX, `HMMA` and `HGMMA` in machine
  code, `v_mfma` on AMD. *Asynchronous copies* are `cp.async` (`LDGSTS`), *bulk copies* those by
  descriptors or of whole blocks (`cp.async.bulk`, TMA). Instructions are counted as written, not as
  often as they run.

A multiprocessor has:

{limits}
"""


def summary(rows: Sequence[Row], is_markdown: bool) -> str:
    """A line an op, compiler and target."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    order = {target: index for index, target in enumerate(LIMITS)}
    for row in sorted(rows, key=lambda r: (r["op"], r["kind"] == "cuda", order[r["target"]])):
        groups.setdefault((row["op"], row["kind"], row["target"]), []).append(row)
    cells = []
    for (op, kind, target), group in groups.items():
        lowest = min(group, key=lambda row: row["occupancy"]["share"])
        words = {word for row in group for word in row["tensor_core"]}
        cells.append(
            [
                *[op, _compiler(kind), target, str(len(group))],
                *(str(max(row[field] for row in group)) for field in ("registers", "spills")),
                str(max(row["shared"] for row in group)),
                f"{_share(lowest)}, {lowest['occupancy']['bound']}",
                ", ".join(sorted(words)) or "none",
                *(
                    _of(sum(row[field] > 0 for row in group), len(group))
                    for field in ("async_copies", "bulk_copies")
                ),
            ]
        )
    return _table(_COLUMNS, cells, is_markdown)


def write(compilers: Row, rows: Sequence[Row], path: Path = PATH) -> None:
    """Write the page."""
    path.write_text(text(compilers, rows), "utf-8")


def text(compilers: Row, rows: Sequence[Row]) -> str:
    """The page."""
    parts = [
        _INTRODUCTION.format(
            triton=compilers["triton"],
            nvcc=compilers["nvcc"],
            triton_targets=_listed(TRITON_TARGETS),
            cuda_targets=_listed(CUDA_TARGETS),
            beams=256,
            limits=_limits(),
        ),
        "## By op and target\n",
        "In the last two columns: how many of the kernels have such copies.\n",
        summary(rows, is_markdown=True) + "\n",
        "## What stands out\n",
        *_remarkable(rows),
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        parts.append(f"## {op}\n")
        for kind, target in _DETAILED.items():
            shown = [row for row in rows if _is_main(row, op, kind, target)]
            if shown:
                parts += [f"{_compiler(kind)}, {target}:\n", _details(shown) + "\n"]
    return "\n".join(parts)


def _remarkable(rows: Sequence[Row]) -> list[str]:
    spilling = [row for row in rows if row["spills"] > 0]
    lines = [f"- Kernels that spill: {len(spilling)} of {len(rows)}."]
    lines += [
        f"  - {table.name(row)}: {row['spills']} bytes; {table.allowed_spill(row) or 'not allowed'}"
        for row in spilling
    ]
    serial = [row for row in rows if row.get("is_serialized")]
    lines.append(f"- Kernels whose `wgmma` the assembler serializes: {len(serial)}.")
    lines += [f"  - {table.name(row)}" for row in serial]
    low = [row for row in rows if row["occupancy"]["share"] < _LOW]
    lines.append(
        f"- Kernels of which less than {_LOW:.1%} of the warps fit: {len(low)}. "
        "By op, kernel and target:"
    )
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in low:
        kernel = row["kernel"].split("<")[0].split(" ")[0]
        groups.setdefault((row["op"], kernel, row["target"]), []).append(row)
    for (op, kernel, target), group in sorted(groups.items()):
        lowest = min(group, key=lambda row: row["occupancy"]["share"])
        lines.append(
            f"  - {op} `{kernel}` {target}: {len(group)}; lowest {_share(lowest)} by "
            f"{lowest['occupancy']['bound']}: {lowest['call']}"
        )
    return ["\n".join(lines) + "\n"]


def _is_main(row: Row, op: str, kind: str, target: str) -> bool:
    if (row["op"], row["kind"], row["target"]) != (op, kind, target):
        return False
    if kind == "cuda":
        return "bfloat16" in row["call"]
    return row["call"] in {call.name for call in launches.calls(op, target, is_quick=True)}


def _details(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        spilled = f" + {row['spills']} bytes spilled" if row["spills"] > 0 else ""
        products = ", ".join(f"{n} {kind}" for kind, n in row["tensor_core"].items())
        widths = [int(bits) // 8 for bits in row["loads"]]
        cells.append(
            [
                f"`{row['kernel']}`",
                row["call"],
                row.get("launch", ""),
                f"{row['registers']}{spilled}",
                str(row["shared"]),
                f"{row['occupancy']['blocks']} x {row['threads']} threads",
                _share(row),
                row["occupancy"]["bound"],
                products or "none",
                f"{row['async_copies']}, {row['bulk_copies']}",
                f"{max(widths)} bytes" if widths else "none",
            ]
        )
    return _table(_DETAILS, cells, is_markdown=True)


def _limits() -> str:
    columns = ("target", "warps", "blocks", "registers", "shared bytes", "of a block")
    cells = [
        [
            target,
            f"{limits.warps} of {limits.warp_size} threads",
            str(limits.blocks),
            str(limits.registers * limits.partitions),
            str(limits.shared),
            str(limits.block_shared),
        ]
        for target, limits in LIMITS.items()
    ]
    return _table(columns, cells, is_markdown=True)


def _compiler(kind: str) -> str:
    return {"triton": "Triton", "cuda": "nvcc"}[kind]


def _share(row: Row) -> str:
    return f"{row['occupancy']['share']:.1%}".replace(".0%", "%")


def _of(count: int, total: int) -> str:
    return "none" if count == 0 else "all" if count == total else f"{count}"


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], is_markdown: bool) -> str:
    if is_markdown:
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
