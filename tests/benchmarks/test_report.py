"""Pages made from results: what stays, what is replaced, and whether the committed are fresh."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report as module
from benchmarks.report import Report, ReportError, committed, fill_page, main
from benchmarks.tables import number

from .rows import ROOF, machine, providers, write

OLD, NEW = "2026-01-02-0123456.jsonl", "2026-02-03-89abcde.jsonl"


def turns(ms: float) -> list[float]:
    """Of which the second and the fourth are p20 and p80."""
    return [ms * share * 1e-3 for share in (0.98, 0.99, 1.0, 1.01, 1.02)]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A device with two runs: attention in the first, beam search in both."""
    folder = tmp_path / "results" / "some-avx2"
    absent = {
        "suite": "operators",
        "op": "attention",
        "case": "full_512",
        "dtype": "float32",
        "direction": "forward",
        "provider": "liger",
        "absent": "liger-kernel is not installed",
    }
    failed = {**absent, "provider": "flex", "failed": "Traceback\n  line\nRuntimeError: a | b\n"}
    failed.pop("absent")
    sdpa = [t * r for t, r in zip(turns(1), (2.5, 2.5, 3.0, 3.5, 3.5), strict=True)]
    attention = providers("full_512", {"fused_attn": turns(1), "sdpa": sdpa, "copy": turns(0.2)})
    del attention[1]["peak_bytes"]
    beam = {"op": "beam_search", "floor": 0.1e-3}
    both = {"fused_attn": turns(2), "eager": turns(20), "sum": turns(0.1)}
    rows = [ROOF, *attention, absent, failed, *providers("B16", both, **beam)]
    write(folder / OLD, [machine(), *rows])
    new = machine(commit="89abcdef" * 5, started="2026-02-03T00:00:00Z")
    faster = {"fused_attn": turns(1), "eager": turns(20)}
    write(folder / NEW, [new, ROOF, *providers("B16", faster, **beam)])
    dirty = machine(started="2026-03-04T00:00:00Z", changed=True)
    write(folder / "2026-03-04-changed.jsonl", [dirty, *providers("B16", both, **beam)])
    return tmp_path / "results"


def block(words: str) -> str:
    return f"<!-- results: {words} -->\n<!-- end of results -->\n"


def filled(results: Path, words: str) -> str:
    return fill_page(block(words), "page.md", Report(committed(results)), "images")


def test_tables_of_an_op(results: Path) -> None:
    lines = filled(results, "operators attention").splitlines()
    head = "| case | direction | ours ms (p20–p80) | floor ms | ours / floor | sdpa / ours |"
    row = lines[lines.index(head) + 2]
    assert row == "| full_512 | forward | 1.00 (0.990–1.01) | 0.500 | 2.00 | **3.00** (2.50–3.50) |"
    assert "| full_512 | forward | 2.0 | 0.00300 | memory | 1.5 | – | 1.0e-06 | 25% |" in lines
    assert "- `liger` absent: liger-kernel is not installed" in lines
    assert "- `flex` failed: RuntimeError: a \\| b" in lines
    assert "<sub>some-avx2, 2026-01-02, 0123456, 5 turns of each</sub>" in lines


def test_the_newest_run_that_has_rows_of_the_op(results: Path) -> None:
    lines = filled(results, "operators beam_search")
    assert "some-avx2, 2026-02-03, 89abcde" in lines
    assert "| B16 | forward | 1.00 (" in lines
    assert "2026-01-02" in filled(results, "operators attention")
    assert "2026-03" not in filled(results, "operators")  # of a tree with changes


def test_yardsticks_are_no_peers(results: Path) -> None:
    (results / "some-avx2" / NEW).unlink()
    lines = filled(results, "operators beam_search")
    assert "| eager / ours |" in lines
    assert "sum" not in lines.replace("summary>", "")
    assert "copy" not in filled(results, "operators attention")


def test_what_is_not_measured(results: Path) -> None:
    for words in ("operators recurrent_cell", "operators on nvidia-h200", "models", "scaling"):
        assert "Not measured yet." in filled(results, words)
    assert "Not measured" not in filled(results, "operators attention on some-avx2")


def test_prose_stays_and_filling_again_changes_nothing(results: Path) -> None:
    report = Report(committed(results))
    text = f"# Title\n\nBefore.\n\n{block('machines')}\nBetween.\n\n{block('operators')}\nAfter.\n"
    once = fill_page(text, "page.md", report, "images")
    assert fill_page(once, "page.md", report, "images") == once
    for prose in ("# Title", "Before.", "Between.", "After."):
        assert once.splitlines().count(prose) == 1
    assert "| 65.5 GB/s | 26.8 GB/s | 0.400 TFLOP/s |" in once
    stale = once.replace("Some CPU", "Another CPU").replace("| B16 |", "| B17 |")
    assert stale != once
    assert fill_page(stale, "page.md", report, "images") == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n<!-- results: speed -->\n", r"page\.md:2: unknown block 'speed'; known: headline, "),
        ("<!-- results: operators atention -->\n", r"page\.md:1: unknown op 'atention'"),
        ("<!-- results: machines all -->\n", r"page\.md:1: a block 'machines' takes nothing"),
        ("\n\n<!-- results: machines -->\n", r"page\.md:3: this block is not closed"),
        (f"<!-- results: models -->\n{block('models')}", r"page\.md:1: this block is not closed"),
        (f"{block('models')}<!-- end of results -->\n", r"page\.md:3: the end of a block"),
    ],
)
def test_blocks_that_cannot_be_filled(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        fill_page(text, "page.md", Report({}), "images")


def test_fenced_blocks_are_examples() -> None:
    text = f"```md\n{block('nothing')}```\n"
    assert fill_page(text, "page.md", Report({}), "images") == text


def test_command(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "performance.md"
    page.write_text(block("roofline") + block("operators beam_search"))
    (tmp_path / "README.md").write_text(block("headline"))
    call = ["--results", str(results), "--docs", str(docs)]
    assert main([*call, "--check"]) == 1
    assert main(call) == 0
    assert "no block shows some-avx2 operators attention" in capsys.readouterr().out
    assert main([*call, "--check"]) == 0
    images = sorted(path.name for path in (docs / "images" / "performance").iterdir())
    names = ("beam_search", "roofline")
    assert images == [f"{name}-some-avx2.{end}" for name in names for end in ("png", "svg")]
    capsys.readouterr()
    assert main(call) == 0  # again: the same to the byte
    assert "written" not in capsys.readouterr().out

    picture = docs / "images" / "performance" / images[0]
    before = picture.read_bytes()
    picture.write_bytes(b"another picture")
    assert main([*call, "--check"]) == 1
    assert f"{images[0]}: is not what the results give" in capsys.readouterr().out
    picture.write_bytes(before)

    newest = results / "some-avx2" / NEW
    newest.write_text(newest.read_text().replace('"flop": 3000000', '"flop": 4000000'))
    assert main([*call, "--check"]) == 1
    assert "roofline-some-avx2.svg" in capsys.readouterr().out
    page.write_text("<!-- results: models -->\n")
    assert main([*call, "--check"]) == 2
    assert "not closed" in capsys.readouterr().err


def test_committed_pages_are_what_the_committed_results_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.000012345, "0.0000123"),
        (0.5, "0.500"),
        (9.996, "10.0"),
        (99.97, "100"),
        (12345.6, "12,346"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_every_block_kind_is_in_the_guide() -> None:
    guide = (module.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for kind in module._RENDERERS:
        assert f"`{kind}`" in guide
