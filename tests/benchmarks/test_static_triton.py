"""The Triton kernels of benchmarks/static's quick calls, compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.static import launches, table
from benchmarks.static.table import Row
from benchmarks.static.targets import LIMITS
from benchmarks.static.triton import Compiler
from fused_attn.ops.add_layer_norm import triton as add_layer_norm
from fused_attn.validation import OPS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("target", launches.QUICK_TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_as_the_table_says(compiler: Compiler, op: str, target: str) -> None:
    calls = launches.calls(op, target, is_quick=True)
    rows = {call.name: table.triton_rows(compiler, op, target, call) for call in calls}
    found = [row for of_call in rows.values() for row in of_call]
    assert table.problems(found) == []
    assert all(row["registers"] > 0 and row["threads"] > 0 for row in found)
    for call in calls:
        for row in rows[call.name]:
            CHECKS[op](call.arguments, row)
        assert kernels_of(rows[call.name]) == EXPECTED[op](call.arguments), call.name
    versions, committed = table.read()
    if versions["triton"] == table.versions()["triton"]:
        places = {table.scope(row) for row in found}
        before = [row for row in committed if table.scope(row) in places]
        update = f"python -m benchmarks.static --op {op} --update"
        assert "\n".join(table.differences(before, found)) == "", f"if this is meant: {update}"


def test_the_table_is_of_this_triton() -> None:
    there, here = table.read()[0]["triton"], table.versions()["triton"]
    if there != here:
        pytest.skip(f"the table is of triton {there}, this is {here}: rows are not compared")


def kernels_of(rows: list[Row]) -> list[str]:
    """Names, sorted, without ``_kernel`` and the op's prefix being cut."""
    return sorted(row["kernel"].split(" ")[0].removesuffix("_kernel") for row in rows)


def wide(row: Row, access: str) -> bool:
    """A thread moves 16 bytes an instruction, somewhere."""
    return row[access].get("128", 0) > 0


# --- what kernels a call launches ---------------------------------------------------------------


def add_layer_norm_kernels(call: dict[str, Any]) -> list[str]:
    kinds = ["backward", "forward"]
    if call["width"] > tile_of(call, "backward").BLOCK_N:
        kinds.append("means")
    return [*(f"add_layer_norm_{kind}" for kind in kinds), "reduce_partials"]


def additive_attention_kernels(call: dict[str, Any]) -> list[str]:
    kinds = ["context", "pair_gradient", "query_gradient", "score_gradient", "scores"]
    has_features = call.get("F", 0) > 0
    kinds += ["value_gradient"] + ["feature_gradient"] * has_features
    # Of the weights of scores, and of features.
    return sorted([f"additive_{kind}" for kind in kinds] + ["reduce_partials"] * (1 + has_features))


def attention_kernels(call: dict[str, Any]) -> list[str]:
    if "forward_launch" in call:
        return ["attention_forward"]
    kinds = ["forward", "key_gradient", "query_gradient"]
    kinds += ["bias_gradient"] * (call["features"] != "causal")
    return sorted(f"attention_{kind}" for kind in kinds)


def beam_search_kernels(call: dict[str, Any]) -> list[str]:
    # Edits and a list of tokens are marked.
    marks = ["mark"] * (2 if call.get("options") == "everything" else 0)
    return [*marks, "rank", "scan", "select"]


EXPECTED: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "add_layer_norm": add_layer_norm_kernels,
    "additive_attention": additive_attention_kernels,
    "attention": attention_kernels,
    "beam_search": beam_search_kernels,
    "bias_activation_dropout": lambda _: [
        "bias_activation_dropout_backward",
        "bias_activation_dropout_forward",
        "reduce_partials",
    ],
    "copy_distribution": lambda _: [
        *["copied_words", "log_probs", "log_probs_backward", "nll", "nll_backward"],
        *["scan", "scan"],
    ],
    "decode_attention": lambda _: ["decode_attention", "decode_attention_merge"],
    "recurrent_cell": lambda _: ["recurrent_cell_backward", "recurrent_cell_forward"],
}


# --- what is asked of a kernel ------------------------------------------------------------------


def check_attention(call: dict[str, Any], row: Row) -> None:
    assert row["tensor_core"] != {}, row
    if row["target"] != "sm_90" or "bias" in row["kernel"]:
        return
    assert row["tensor_core"].get("wgmma", 0) > 0, row
    assert "is_serialized" not in row, row
    if call["features"] == "causal" and "key" not in row["kernel"]:
        # Rows come through descriptors.
        assert row["bulk_copies"] > 0, row
    assert ("is_specialized" in row) == ("forward_launch" in call), row


def check_rows_are_wide(call: dict[str, Any], row: Row) -> None:
    width = call["width"] if "width" in call else call["size"]
    if row["kernel"] != "reduce_partials_kernel" and width % 16 == 0:
        assert wide(row, "loads"), row
        assert wide(row, "stores"), row


def check_beam_search(call: dict[str, Any], row: Row) -> None:
    assert wide(row, "loads") or row["kernel"] != "scan_kernel", row


def check_copy_distribution(call: dict[str, Any], row: Row) -> None:
    kernel = row["kernel"].split(" ")[0].removesuffix("_kernel")
    if kernel in ("scan", "log_probs", "nll_backward", "log_probs_backward"):
        assert wide(row, "loads"), row
        assert wide(row, "stores") or kernel == "scan", row


def check_decode_attention(call: dict[str, Any], row: Row) -> None:
    if "merge" in row["kernel"]:
        return
    assert wide(row, "loads"), row
    is_product = call["form"] == "shared" or "group" in call
    assert (row["tensor_core"] != {}) == is_product, row


def check_additive_attention(call: dict[str, Any], row: Row) -> None:
    # With one query, context and gradient of the scores are no matrix products.
    products = ["value_gradient"] + ["context", "score_gradient"] * (call.get("T") != 1)
    if row["kernel"].removeprefix("additive_").removesuffix("_kernel") in products:
        assert row["tensor_core"] != {}, row


ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def check_add_layer_norm(call: dict[str, Any], row: Row) -> None:
    """Where 16 bytes divide a row, its tensors move 16 bytes an instruction.

    A thread has as many such instructions as its share of a tile takes, at least; and none that
    moves 16 bits, as only an element of a row or a parameter in half precision would.
    """
    kernel = row["kernel"].split("_")[-2]
    size = ITEMSIZE[call["dtype"]]
    if kernel == "partials" or call["width"] * size % 16 != 0:
        return
    if row["target"].startswith("gfx"):
        assert wide(row, "loads"), row
        assert wide(row, "stores") or kernel == "means", row
        return
    loads, stores = bytes_an_element(call, kernel)
    if kernel == "means":
        share = add_layer_norm.MEANS_BLOCK // add_layer_norm.THREADS
    else:
        tile = tile_of(call, kernel)
        share = tile.BLOCK_M * tile.BLOCK_N // row["threads"]
    assert row["loads"].get("128", 0) >= share * loads // 16, row
    assert row["stores"].get("128", 0) >= share * stores // 16, row
    for narrow in ("8", "16"):
        assert narrow not in row["loads"], row
        assert narrow not in row["stores"], row


def tile_of(call: dict[str, Any], kernel: str) -> add_layer_norm.Tiling:
    """The tile of the forward or the backward kernel."""
    width, size, has_dropout = call["width"], max(row_sizes(call)), "dropout_p" in call
    if kernel == "forward":
        return add_layer_norm.forward_tiling(width, size, has_dropout)
    sums = 1 + (not call.get("is_rms", False)) + call.get("x_bias", False)
    return add_layer_norm.backward_tiling(width, size, has_dropout, sums)


def bytes_an_element(call: dict[str, Any], kernel: str) -> tuple[int, int]:
    """What a kernel loads and stores of rows."""
    size, residual, total = row_sizes(call)
    source = total if "return_sum" in call else size + residual
    if kernel == "forward":
        return size + residual, size + total
    if kernel == "means":
        return size + source, 0
    is_separate = residual > 0 and ("dropout_p" in call or residual != size)
    return size + source + total, size + is_separate * residual


def row_sizes(call: dict[str, Any]) -> tuple[int, int, int]:
    """Item sizes of x, of the residual and of the sum; 0 where there is none."""
    size = ITEMSIZE[call["dtype"]]
    residual = 4 if call.get("fp32_residual", False) else size
    total = 4 if call.get("fp32_sum", False) else residual
    return size, residual * call.get("residual", True), total * call.get("return_sum", False)


CHECKS: dict[str, Callable[[dict[str, Any], Row], None]] = {
    "add_layer_norm": check_add_layer_norm,
    "additive_attention": check_additive_attention,
    "attention": check_attention,
    "beam_search": check_beam_search,
    "bias_activation_dropout": check_rows_are_wide,
    "copy_distribution": check_copy_distribution,
    "decode_attention": check_decode_attention,
    "recurrent_cell": check_rows_are_wide,
}


# --- the compilation itself ---------------------------------------------------------------------


@pytest.mark.slow
def test_lengths_compile_nothing_anew(compiler: Compiler) -> None:
    lengths = [{"B": 8, "T": 64, "S": 96}, {"B": 3, "T": 17, "S": 1}, {"B": 1, "T": 255, "S": 1001}]
    call = {"dtype": "bfloat16", "E": 96, "D": 48, "F": 3, "masked": True}
    first, *others = (
        compiler.compile("sm_90", "additive_attention", {**call, **length}) for length in lengths
    )
    known = {report["hash"] for report in first}
    assert len(known) >= 7
    anew = {r["kernel"] for reports in others for r in reports if r["hash"] not in known}
    # Sums of partial gradients have tiles that fit the number of programs.
    assert anew <= {"reduce_partials_kernel"}


def test_what_does_not_fit_is_a_problem(compiler: Compiler) -> None:
    def compiled(forward_launch: str) -> list[Row]:
        arguments = {"dtype": "bfloat16", "head_size": 64, "features": "causal"}
        call = launches.Call({**arguments, "forward_launch": forward_launch}, False, ())
        return table.triton_rows(compiler, "attention", "sm_90", call)

    (spilling,) = table.problems(compiled("128x128 4w 1s 128r"))
    assert spilling.endswith("bytes of registers are spilled")
    (too_large,) = table.problems(compiled("128x128 8w 8s tma"))
    assert too_large.endswith(f"a block may have {LIMITS['sm_90'].block_shared}")


def test_what_does_not_compile_says_so(compiler: Compiler) -> None:
    with pytest.raises(RuntimeError, match="recurrent_cell for sm_90 does not compile: KeyError"):
        compiler.compile("sm_90", "recurrent_cell", {"dtype": "float32", "kind": "x", "size": 1})
