"""The translation units of the CUDA kernels, for setup.py and the tests.

``csrc/<op>/<op>_cuda.cu`` is compiled once a combination of the macros that comments at its top
list, so that compilers run side by side::

    // units: FUSED_ATTN_T = float __half __nv_bfloat16
    // units: FUSED_ATTN_HEAD_DIM = 32 64 96 128 256
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
# Architectures come from TORCH_CUDA_ARCH_LIST.
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo"]


def write_units(folder: Path, only: Mapping[str, Sequence[str]] | None = None) -> list[Path]:
    """Write a small source a unit, which defines its macros and includes the ``.cu`` file.

    Args:
        folder: Where to; made if need be. A unit that has not changed is not written again.
        only: Values to build of a macro, where not all of them are wanted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units = []
    for source in sorted(CSRC.glob("*/*_cuda.cu")):
        axes = []
        for macro, values in re.findall(r"^// units: (\w+) = (.+)$", source.read_text(), re.M):
            wanted = values.split()
            if only is not None and macro in only:
                wanted = [value for value in wanted if value in only[macro]]
            axes.append([(macro, value) for value in wanted])
        for combination in itertools.product(*axes):
            name = "_".join([source.stem, *(value.strip("_") for _, value in combination)])
            text = "// Generated from a list in the file that it includes.\n"
            text += "".join(f"#define {macro} {value}\n" for macro, value in combination)
            text += f'#include "{source.relative_to(CSRC).as_posix()}"\n'
            unit = folder / f"{name}.cu"
            if not unit.exists() or unit.read_text() != text:
                unit.write_text(text)
            units.append(unit)
    return units
