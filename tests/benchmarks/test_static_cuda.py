"""The CUDA kernels of benchmarks/static's quick units, compiled by nvcc; needs no GPU."""

from __future__ import annotations

import re

import pytest

from benchmarks.static import cuda, table
from fused_attn.validation import OPS, op_backends

# The other types' kernels are instances of the same templates; `python -m benchmarks.static`
# compiles them all.
UNITS = cuda.unit_names(is_quick=True)
# Instructions that some kernel of an op's unit must have.
TENSOR_CORES = "HMMA.16816.F32.BF16"
COPY_16_BYTES = "LDGSTS.E.BYPASS.128"
EXPECTED = {
    "add_layer_norm": ["LDG.E.128", "STG.E.128"],
    "attention": [TENSOR_CORES, COPY_16_BYTES, "LDSM.16.M88.4", "LDSM.16.MT88.4", "STG.E.128"],
    "beam_search": ["LDG.E.128"],
    "decode_attention": [TENSOR_CORES, COPY_16_BYTES, "STG.E.128"],
}


def test_every_op_with_cuda_kernels_is_compiled_here() -> None:
    ops = {op for op in OPS if "cuda" in op_backends(op)}
    assert {re.split("_cuda", unit)[0] for unit in UNITS} == ops == set(EXPECTED)


@pytest.mark.skipif(cuda.absent() != "", reason=cuda.absent() or "everything is there")
@pytest.mark.parametrize("target", cuda.QUICK_TARGETS)
@pytest.mark.parametrize("unit", UNITS)
def test_compiles_as_the_table_says(unit: str, target: str) -> None:
    compiled = cuda.compile_unit(unit, target)
    op = unit.split("_cuda")[0]
    assert compiled.warnings == []
    assert compiled.kernels != []
    rows = table.cuda_rows(compiled, unit, target)
    assert table.problems(rows) == []
    assert all(0 < row["registers"] <= 255 and row["threads"] > 0 for row in rows)
    found = {opcode for kernel in compiled.kernels for opcode in kernel.instructions}
    for wanted in EXPECTED[op]:
        assert wanted in found, wanted
    # Every kernel with matrix products has its tiles in dynamic shared memory.
    for row in rows:
        assert row["tensor_core"] == {} or row["shared"] > 8192, row
    # add_layer_norm's kernels of vectors of 8 move no row element by element.
    vectorised = [
        k for k in compiled.kernels if re.search(r"<__nv_bfloat16.* 8(, (true|false))?>", k.name)
    ]
    if op == "add_layer_norm":
        assert len(vectorised) > 8
        for kernel in vectorised:
            assert kernel.instructions["LDG.E.128"] > 0
            assert not [op for op in kernel.instructions if re.match("(LDG|STG).*U16", op)]
    versions, committed = table.read()
    if versions["nvcc"] == cuda.version():
        before = [row for row in committed if table.scope(row) == table.scope(rows[0])]
        update = f"python -m benchmarks.static --op {op} --update"
        assert "\n".join(table.differences(before, rows)) == "", f"if this is meant: {update}"


@pytest.mark.skipif(cuda.absent() != "", reason=cuda.absent() or "everything is there")
def test_the_table_is_of_this_nvcc() -> None:
    there, here = table.read()[0]["nvcc"], cuda.version()
    if there != here:
        pytest.skip(f"the table is of nvcc {there}, this is {here}: rows are not compared")
