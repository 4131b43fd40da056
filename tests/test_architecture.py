"""The rules of docs/architecture.md that a program can check."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import fused_attn
from fused_attn.validation import OPS, op_backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fused_attn"

# A layer may import those to its right, and of `training`, `generation` and `validation` none
# imports another but training, whose validation translates.
LAYERS = {
    "cli": {"training", "generation", "validation", "models", "nn", "ops"},
    "training": {"generation", "models", "nn", "ops"},
    "generation": {"ops"},
    "validation": {"ops"},
    "models": {"nn", "ops"},
    "nn": {"ops"},
    "ops": set(),
}
BACKENDS = ("cpu", "cuda", "triton", "reference")
OPTIONAL = {"triton", "sentencepiece", "sacrebleu", "matplotlib"}


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Absolute names of everything that a module imports, and whether at its top level."""
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(source)
    type_checking = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, top
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base]).rstrip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}", top


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports against the rules."""
    parts = module.split(".")
    layer = parts[1] if len(parts) > 1 else ""
    found = []
    for name, top in imports(source, module, is_package):
        target = name.split(".")
        if target[0] in {"tests", "benchmarks"}:
            found.append(f"{module} imports {name}: nothing imports tests or benchmarks")
        if (
            target[0] in OPTIONAL
            and top
            and not re.fullmatch(r"_?triton_(\w+_)?kernels", parts[-1])
        ):
            found.append(f"{module} imports {name} at its top: optional, so only in functions")
        if target[0] != "fused_attn":
            if parts[-1] == "contract" and target[0] not in {"torch", *sys.stdlib_module_names}:
                found.append(f"{module} imports {name}: a contract imports torch alone")
            continue
        other = target[1] if len(target) > 1 else ""
        if layer in LAYERS and other in LAYERS and other != layer and other not in LAYERS[layer]:
            found.append(f"{module} imports {name}: {layer} must not import {other}")
        if layer == "ops" and len(parts) > 3 and other == "ops" and len(target) > 2:
            op, other_op = parts[2], target[2]
            if not other_op.startswith("_") and other_op != op:
                found.append(f"{module} imports {name}: an op never imports another")
            leaf = target[3] if len(target) > 3 else ""
            if parts[3] in BACKENDS and other_op == op and leaf in BACKENDS and leaf != parts[3]:
                found.append(f"{module} imports {name}: backends never import each other")
            if parts[3] == "contract" and other_op == op:
                found.append(f"{module} imports {name}: a contract imports torch alone")
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("")
    is_package = relative.name == "__init__"
    name = ".".join(relative.parent.parts if is_package else relative.parts)
    assert violations(path.read_text(), name, is_package) == []


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("fused_attn.nn.attention", "from fused_attn.models import Transformer", "must not import"),
        ("fused_attn.generation.beam", "from ..models import Transformer", "must not import"),
        ("fused_attn.ops.attention.api", "from ..beam_search import api", "never imports another"),
        ("fused_attn.ops.attention.cpu", "from . import triton", "never import each other"),
        ("fused_attn.ops.attention.cpu", "from .reference import f", "never import each other"),
        ("fused_attn.ops.attention.contract", "import numpy", "torch alone"),
        ("fused_attn.ops.attention.contract", "from . import cpu", "torch alone"),
        ("fused_attn.ops.attention.triton", "import triton", "only in functions"),
        ("fused_attn.nn.attention", "from benchmarks import timing", "tests or benchmarks"),
    ],
)
def test_the_checker_sees_violations(module: str, source: str, rule: str) -> None:
    assert any(rule in line for line in violations(source, module))


def test_kernels_do_not_include_torch() -> None:
    kernels = [p for p in (ROOT / "csrc").rglob("*_kernel*") if p.is_file()]
    assert len(kernels) >= len(OPS)
    kernels += [ROOT / "csrc/common/vec.h", ROOT / "csrc/common/dtype.h"]
    kernels += [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*_cuda.h")]
    kernels += (ROOT / "csrc/common").glob("*.cuh")
    for path in kernels:
        included = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
        assert not [i for i in included if i.startswith(("torch/", "ATen/", "c10/"))], path


@pytest.mark.parametrize("op", OPS)
def test_one_name_finds_everything_about_an_op(op: str) -> None:
    folder = PACKAGE / "ops" / op
    for name in ("__init__.py", "api.py", "contract.py", "reference.py", "cpu.py", "cases.py"):
        assert (folder / name).is_file(), name
    assert (folder / "README.md").is_file()
    for name in (f"{op}.h", f"{op}_kernel_cpu.h", f"{op}_cpu.cpp"):
        assert (ROOT / "csrc" / op / name).is_file(), name
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()


@pytest.mark.parametrize("op", [op for op in OPS if "cuda" in op_backends(op)])
def test_one_name_finds_the_cuda_kernels_of_an_op(op: str) -> None:
    assert (PACKAGE / "ops" / op / "cuda.py").is_file()
    folder = ROOT / "csrc" / op
    for name in (f"{op}_cuda.h", f"{op}_cuda.cu", f"{op}_cuda.cpp"):
        assert (folder / name).is_file(), name
    assert any(folder.glob(f"{op}*_kernel.cuh"))


def test_kernels_are_written_so_that_they_can_be_executed_on_a_cpu() -> None:
    """Inline PTX in its headers alone; shared memory and launches in the spelling of cuda.cuh."""
    allowed = {
        "ptx.cuh": "asm",
        "ptx_sm90.cuh": "asm|__CUDA_ARCH__",
        "cuda.cuh": "__shared__|<<<",
        "attention_forward_kernel.cuh": "__CUDA_ARCH__",  # a budget of registers
    }
    sources = [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*.cuh")]
    assert len(sources) >= 8
    for path in sources:
        words = r"\basm\b|__shared__|<<<|__CUDA_ARCH__|\bcub::|cooperative_groups"
        found = set(re.findall(words, re.sub(r"//.*", "", path.read_text())))
        assert found <= set(allowed.get(path.name, "").split("|")), (path, found)


@pytest.mark.parametrize(
    "name",
    [
        "add_layer_norm",
        "additive_attention",
        "additive_scores",
        "attention",
        "beam_search_step",
        "bias_activation_dropout",
        "decode_attention",
    ],
)
def test_public_functions_are_documented(name: str) -> None:
    function = getattr(fused_attn, name)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Raises:", "Reference:", "backend:"):
        assert section in text, section
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in text, f"{name} does not document {parameter}"


def test_imports_without_triton_and_without_the_extension(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from importlib.machinery import PathFinder

        find = PathFinder.find_spec

        def without_triton(name, path=None, target=None):
            return None if name.split(".")[0] == "triton" else find(name, path, target)

        PathFinder.find_spec = without_triton
        real = Path.glob
        Path.glob = lambda self, pattern: iter(()) if pattern.startswith("_C") else real(
            self, pattern
        )

        import torch
        import fused_attn
        import fused_attn.nn, fused_attn.models, fused_attn.generation
        from fused_attn.ops._backend import unavailable_reason

        assert "triton" not in sys.modules
        x = torch.randn(2, 8)
        assert fused_attn.add_layer_norm(x).shape == x.shape
        try:
            fused_attn.add_layer_norm(x, backend="cpu")
        except NotImplementedError as error:
            assert "install g++" in str(error), error
        else:
            raise SystemExit("backend='cpu' ran without the extension")
    """)
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_importing_the_package_is_light() -> None:
    script = "import sys, fused_attn, fused_attn.nn; print(sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(result.stdout))
    # The compiler alone takes as long to import as the rest of torch.
    assert not loaded & {*OPTIONAL, "torch._dynamo"}
