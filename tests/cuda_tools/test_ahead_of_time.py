"""What nvcc makes of the CUDA kernels, and that their bindings fit torch's CUDA headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fused_attn.validation import OPS, op_backends
from tests.cuda_host.build import CSRC, cuda_headers
from tests.cuda_tools.ahead_of_time import (
    ARCHITECTURES,
    Compiled,
    compile_binding,
    compile_unit,
    disassembler,
    nvcc,
    unit_names,
)

needs_nvcc = pytest.mark.skipif(
    nvcc() is None or disassembler() is None, reason="needs nvcc, and cuobjdump (Triton has it)"
)
# The other types' kernels are instances of the same templates; `python -m
# tests.cuda_tools.ahead_of_time` compiles them all.
UNITS = unit_names({"FUSED_ATTN_T": ["__nv_bfloat16"]})
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


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", UNITS)
def test_compiles_without_spills_or_warnings(unit: str, architecture: str) -> None:
    compiled: Compiled = compile_unit(unit, architecture)
    assert compiled.warnings == []
    assert compiled.kernels != []
    assert {k.name: k.spilled_bytes for k in compiled.kernels if k.spilled_bytes > 0} == {}
    assert all(0 < kernel.registers <= 255 for kernel in compiled.kernels)
    found = {op for kernel in compiled.kernels for op in kernel.instructions}
    for wanted in EXPECTED[unit.split("_cuda")[0]]:
        assert wanted in found, wanted
    # add_layer_norm's kernels of vectors of 8 move no row element by element.
    of_vectors = re.compile(r"nv_bfloat16(Li\d+E)*Li8E(EE|Lb)")
    vectorised = [kernel for kernel in compiled.kernels if of_vectors.search(kernel.name)]
    assert (vectorised != []) == unit.startswith("add_layer_norm")
    for kernel in vectorised:
        assert kernel.instructions["LDG.E.128"] > 0
        assert not [op for op in kernel.instructions if re.match("(LDG|STG).*U16", op)]


@pytest.mark.skipif(cuda_headers() is None, reason="needs CUDA's headers")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*/*_cuda.cpp")), ids=lambda p: p.stem)
def test_bindings_fit_the_headers_of_a_cuda_build_of_torch(source: Path) -> None:
    assert compile_binding(source) == ""
