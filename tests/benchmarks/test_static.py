"""``python -m benchmarks.static``: occupancy, the table and the page, what it says and returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.static import command, cuda, page, table, triton
from benchmarks.static.command import Job
from benchmarks.static.table import Row
from benchmarks.static.targets import occupancy

# Of NVIDIA's CUDA C++ Best Practices Guide, "Calculating Occupancy", whose multiprocessor has as
# many registers and warps: 37 registers in blocks of 128 and of 320 threads, 32 registers for all
# threads.
PUBLISHED = [(128, 37, 12, 0.75), (320, 37, 4, 0.625), (256, 32, 8, 1.0)]


@pytest.mark.parametrize(("threads", "registers", "blocks", "share"), PUBLISHED)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_occupancy_is_what_nvidia_publishes(
    target: str, threads: int, registers: int, blocks: int, share: float
) -> None:
    found = occupancy(target, threads, registers, 0)
    assert (found.blocks, found.share) == (blocks, share)
    assert found.bound == ("warps" if share == 1.0 else "registers")


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "columns", "expected"),
    [
        ("sm_90", 256, 64, 0, 0, (4, 32, 0.5, "registers")),
        # 168 registers are 5376 of a warp; a quarter of the registers has room for three.
        ("sm_90", 384, 168, 0, 0, (1, 12, 0.1875, "registers")),
        ("sm_90", 1024, 65, 0, 0, (0, 0, 0.0, "registers")),
        # Two blocks with the KiB that the system takes of each, and one byte too many.
        ("sm_90", 128, 32, 113 << 10, 0, (2, 8, 0.125, "shared memory")),
        ("sm_90", 128, 32, (113 << 10) + 1, 0, (1, 4, 0.0625, "shared memory")),
        ("sm_80", 128, 32, 163 << 10, 0, (1, 4, 0.0625, "shared memory")),
        ("sm_90", 32, 16, 0, 0, (32, 32, 0.5, "blocks")),
        ("sm_100", 128, 64, 0, 256, (2, 8, 0.125, "tensor memory")),
        # Each of four SIMDs has 512 registers a lane, in steps of 8.
        ("gfx942", 256, 128, 0, 0, (4, 16, 0.5, "registers")),
        ("gfx942", 256, 256, 0, 0, (2, 8, 0.25, "registers")),
        ("gfx942", 256, 257, 0, 0, (1, 4, 0.125, "registers")),
        ("gfx942", 128, 32, 0, 0, (16, 32, 1.0, "warps")),
        ("gfx942", 64, 32, 0, 0, (32, 32, 1.0, "warps")),
        ("gfx942", 256, 32, 24 << 10, 0, (2, 8, 0.25, "shared memory")),
    ],
)
def test_occupancy(
    target: str,
    threads: int,
    registers: int,
    shared: int,
    columns: int,
    expected: tuple[int, int, float, str],
) -> None:
    assert occupancy(target, threads, registers, shared, columns) == expected


def test_the_table_has_every_job_and_no_other() -> None:
    _, rows = table.read()
    assert {table.scope(row) for row in rows} == {job.place for job in command.jobs()}
    assert {job.place for job in command.jobs(is_quick=True)} < {table.scope(row) for row in rows}
    assert table.problems(rows) == []
    assert table.differences(rows, rows) == []


def test_the_page_is_the_table() -> None:
    assert page.PATH.read_text("utf-8") == page.text(*table.read())


def test_each_call_has_a_name_of_its_own() -> None:
    places = [job.place for job in command.jobs()]
    assert len(places) == len(set(places))


# --- the command, on rows that nobody compiles --------------------------------------------------

ARGUMENTS = ["--op", "recurrent_cell", "--target", "sm_90", "--quick"]
Change = Callable[[list[Row]], Any]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command where compiling gives the committed rows, once changed; its status and words."""
    paths = (tmp_path / "static.jsonl", tmp_path / "static.md")
    versions = {**table.read()[0], **table.versions()}
    table.write(versions, table.read()[1], paths[0])

    def run_command(
        change: Change = lambda rows: None,
        arguments: Sequence[str] = ARGUMENTS,
        failed: Sequence[str] = (),
    ) -> tuple[int, str]:
        def compile_all(wanted: Sequence[Job], *_: object) -> tuple[list[Row], list[str]]:
            places = {job.place for job in wanted}
            rows = [copy.deepcopy(r) for r in table.read()[1] if table.scope(r) in places]
            change(rows)
            return rows, list(failed)

        status = command.main(arguments, paths, compile_all)
        return status, capsys.readouterr().out

    run_command.paths = paths
    return run_command


def test_no_difference_is_success(run: Callable[..., tuple[int, str]]) -> None:
    status, words = run()
    assert status == 0
    assert "0 rows differ" in words
    assert "recurrent_cell  Triton    sm_90" in words


def test_a_difference_is_shown_and_no_failure(run: Callable[..., tuple[int, str]]) -> None:
    status, words = run(lambda rows: rows[0].update(registers=200))
    kernel = "recurrent_cell sm_90 recurrent_cell_backward_kernel bfloat16 gru size=512 fp32_state"
    assert status == 0
    assert "1 rows differ" in words
    assert f"  {kernel}: registers " in words
    assert " -> 200\n" in words
    status, words = run(lambda rows: rows.pop(0))
    assert (status, f"  {kernel}: gone\n" in words) == (0, True)
    status, words = run(lambda rows: rows.append(rows[0] | {"kernel": "another_kernel"}))
    assert (status, "another_kernel bfloat16 gru size=512 fp32_state: added" in words) == (0, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 8}, "8 bytes of registers are spilled"),
        ({"shared": 232449}, "232449 bytes of shared memory; a block may have 232448"),
        ({"occupancy": {"blocks": 0, "bound": "registers", "share": 0.0}}, "no block fits"),
    ],
)
def test_what_must_not_be_fails(
    run: Callable[..., tuple[int, str]], change: Row, message: str
) -> None:
    status, words = run(lambda rows: rows[0].update(change))
    assert status == 1
    wrong = [line for line in words.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1
    assert message in wrong[0]
    assert "recurrent_cell sm_90 recurrent_cell_backward_kernel bfloat16 gru" in wrong[0]


def test_an_allowed_spill_is_shown_with_its_reason(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("recurrent_cell", "sm_90", "recurrent_cell_backward_kernel")
    monkeypatch.setitem(table.ALLOWED_SPILLS, key, "outside of the loop")
    status, words = run(lambda rows: rows[0].update(spills=8))
    assert status == 0
    assert "size=512 fp32_state: 8 bytes spilled: outside of the loop" in words


def test_what_does_not_compile_fails_and_is_not_written(
    run: Callable[..., tuple[int, str]],
) -> None:
    before = run.paths[0].read_bytes()
    status, words = run(arguments=[*ARGUMENTS, "--update"], failed=["x for sm_90 does not compile"])
    assert status == 1
    assert "WRONG x for sm_90 does not compile" in words
    assert run.paths[0].read_bytes() == before


def test_update_writes_what_changed_and_the_page(run: Callable[..., tuple[int, str]]) -> None:
    before = run.paths[0].read_bytes()
    run(arguments=[*ARGUMENTS, "--update"])
    assert run.paths[0].read_bytes() == before
    run(lambda rows: rows[0].update(registers=200), [*ARGUMENTS, "--update"])
    old, new = table.read()[1], table.read(run.paths[0])[1]
    assert [a["kernel"] for a, b in zip(old, new, strict=True) if a != b] == [
        "recurrent_cell_backward_kernel"
    ]
    assert "200" in run.paths[1].read_text("utf-8")


def test_a_part_is_not_written_among_rows_of_other_compilers(
    run: Callable[..., tuple[int, str]],
) -> None:
    versions, rows = table.read(run.paths[0])
    table.write({**versions, "triton": "1.0.0"}, rows, run.paths[0])
    status, words = run(arguments=[*ARGUMENTS, "--update"])
    assert status == 1
    assert f"the table is of triton 1.0.0, this is {table.versions()['triton']}" in words
    assert "not updated" in words
    assert table.read(run.paths[0])[0]["triton"] == "1.0.0"


def test_absent_nvcc_is_reported(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    status, words = run(arguments=["--op", "beam_search", "--quick"])
    assert status == 0
    assert "no cuda kernels are compiled: nvcc is not installed" in words
    assert "0 rows differ" in words
    assert "nvcc " not in words.split("compiled:")[1].split("installed")[1]


# --- reading what compilers print ---------------------------------------------------------------


def test_accesses_of_ptx() -> None:
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p2 ld.global.L1::evict_first.v2.b64 { %rd3, %rd4 }, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
    st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
    """
    assert triton._ptx_accesses(ptx) == {
        "loads": {"16": 1, "32": 1, "128": 3},
        "stores": {"64": 1},
    }


def test_instructions_of_ptx() -> None:
    ptx = """
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 1;
    wgmma.wait_group.sync.aligned 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%r1];
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1], [%r2];
    cp.async.bulk.commit_group;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
    cp.async.commit_group;
    """
    assert triton._instructions(ptx) == {
        "tensor_core": {"mma": 1, "tcgen05": 1, "wgmma": 1},
        "async_copies": 1,
        "bulk_copies": 1,
    }


def test_accesses_of_machine_code() -> None:
    code = """
        /*0000*/  @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/      LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0020*/      LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/      LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0040*/      STG.E.64 desc[UR4][R2.64], R4 ;
    """
    assert triton.sass_accesses(code) == {
        "loads": {"16": 1, "32": 1, "128": 2},
        "stores": {"64": 1},
    }
