"""Files of results: written at once, read to the last of each row, found by device and time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.results import Row, Writer, describe, device_folder, file_name, newest, read


def machine(**changes: Any) -> Row:
    return {
        "suite": "machine",
        "device": "cpu",
        "name": "AMD EPYC 7B13 64-Core Processor",
        "our_instructions": "avx2",
        "commit": "0123456789abcdef",
        "changed": False,
        "started": "2026-11-28T13:29:34Z",
        **changes,
    }


def operator(provider: str, **more: Any) -> Row:
    return {"suite": "operators", "op": "attention", "case": "a", "provider": provider, **more}


def test_a_row_is_there_as_soon_as_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with Writer(path, machine()) as writer:
        writer.add(operator("fused_attn", p50_ms=1.0))
        first, second = path.read_text().splitlines()
        assert json.loads(first) == machine()
        assert json.loads(second)["p50_ms"] == 1.0
        with pytest.raises(ValueError, match="must have a suite"):
            writer.add({"p50_ms": 1.0})
    assert [row["provider"] for row in read(path).suite("operators")] == ["fused_attn"]


def test_an_error_names_files_of_the_repository_and_not_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Writer(path, machine()) as writer:
        writer.add(operator("eager", failed=f'File "{results.ROOT}/benchmarks/timing.py", line 1'))
    [row] = read(path).suite("operators")
    assert row["failed"] == 'File "benchmarks/timing.py", line 1'


def test_a_later_row_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Writer(path, machine()) as writer:
        writer.add(operator("fused_attn", p50_ms=1.0))
        writer.add(operator("eager", p50_ms=2.0))
    with Writer(path, machine(started="2026-11-28T14:00:00Z", clocks="other")) as writer:
        writer.add(operator("fused_attn", p50_ms=3.0))
        writer.add(operator("fused_attn", p50_ms=4.0, direction="backward"))
    found = read(path)
    assert [(row["provider"], row["p50_ms"]) for row in found.rows] == [
        ("fused_attn", 3.0),
        ("eager", 2.0),
        ("fused_attn", 4.0),
    ]
    assert path.read_text().count('"machine"') == 1  # nothing of it that lasts has changed


def test_the_machine_is_said_again_where_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Writer(path, machine()).close()
    Writer(path, machine(torch="2.14")).close()
    assert path.read_text().count('"machine"') == 2
    assert read(path).machine["torch"] == "2.14"


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Writer(path, machine()) as writer:
        writer.add(operator("fused_attn"))
        writer.add(operator("eager"))
    path.write_text(path.read_text()[:-9])
    assert [row["provider"] for row in read(path).rows] == ["fused_attn"]


def test_other_files_are_an_error_with_file_and_line(tmp_path: Path) -> None:
    for text in ("", '{"suite": "operators"}\n'):
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: results begin with a row of suite"):
            read(path)


@pytest.mark.parametrize(
    ("row", "folder"),
    [
        (machine(), "amd-epyc-7b13-64-core-avx2"),
        (
            machine(name="Intel(R) Xeon(R) CPU @ 2.20GHz", our_instructions="avx512"),
            "intel-xeon-avx512",
        ),
        (machine(device="cuda", name="NVIDIA H200"), "nvidia-h200"),
    ],
)
def test_a_device_has_a_folder(row: Row, folder: str) -> None:
    assert device_folder(row) == folder


def test_a_file_is_named_for_day_and_commit() -> None:
    assert file_name(machine()) == "2026-11-28-0123456.jsonl"
    assert file_name(machine(changed=True)) == "2026-11-28-0123456-changed.jsonl"
    assert file_name(machine(commit=None)) == "2026-11-28-unknown.jsonl"


def test_the_newest_run_of_each_device_comes_first(tmp_path: Path) -> None:
    for folder, name, day in (
        ("gpu", "b", "2026-11-02"),
        ("gpu", "a", "2026-11-03"),
        ("gpu", "c", "2026-10-31"),
        ("cpu", "d", "2026-01-01"),
    ):
        Writer(tmp_path / folder / f"{name}.jsonl", machine(started=day)).close()
    (tmp_path / "static.jsonl").write_text("{}")
    (tmp_path / "empty").mkdir()
    found = newest(tmp_path)
    assert list(found) == ["cpu", "gpu"]
    assert [run.path.stem for run in found["gpu"]] == ["a", "b", "c"]


def test_this_machine_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = describe("cpu")
    assert row["suite"] == "machine"
    assert row["folder"] == device_folder(row)
    assert row["threads"] >= 1
    assert row["numpy"] == results.version("numpy")
    json.dumps(row)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.writer("cpu").close()
    assert read(tmp_path / row["folder"] / file_name(row)).machine["name"] == row["name"]
    results.writer("cpu", tmp_path / "other").close()
    assert (tmp_path / "other" / file_name(row)).exists()
