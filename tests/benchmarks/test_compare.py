"""What `benchmarks.compare` calls slower: changes of the code, not of the machine or by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as module
from benchmarks.compare import UnusableError, compare, lines, resolve
from benchmarks.results import Run

from .rows import ROOF, machine, noisy_run, providers, write

CASES = 100


def steady(ours: float = 1.0, **peers: float) -> dict[str, list[float]]:
    """Turns without noise, in milliseconds."""
    return {name: [ms * 1e-3] * 5 for name, ms in {"fused_attn": ours, **peers}.items()}


def run(rows: list[dict[str, Any]], **fields: Any) -> Run:
    return Run(Path("some.jsonl"), machine(**fields), rows)


@pytest.mark.parametrize("speed", [1.0, 1.3], ids=["same machine", "1.3 times slower"])
@pytest.mark.parametrize(
    ("turns", "within", "between"), [(15, 0.03, 0.01), (15, 0.1, 0.03), (5, 0.05, 0.03)]
)
def test_two_runs_of_the_same_code(turns: int, within: float, between: float, speed: float) -> None:
    noise = {"cases": CASES, "turns": turns, "within": within, "between": between}
    alarms = []
    for seed in range(4):
        before, after = noisy_run(2 * seed, **noise), noisy_run(2 * seed + 1, **noise, speed=speed)
        result = compare(before, after)
        assert result.machine == pytest.approx(speed, rel=0.02)
        alarms.append(len(result.slower))
    assert sum(alarms) <= 1, alarms  # of 400 rows


@pytest.mark.parametrize("speed", [1.0, 1.3, 0.7])
def test_a_slowdown_is_found(speed: float) -> None:
    before = noisy_run(1, CASES)
    after = noisy_run(2, CASES, slow=1.2, slow_cases=20, speed=speed)
    result = compare(before, after)
    found = {verdict.name.split()[2] for verdict in result.slower}
    slow = {f"case_{number}" for number in range(20)}
    assert len(found & slow) >= 19
    assert not found - slow
    back = compare(after, before)
    assert len(back.faster) >= 19
    assert not back.slower


def test_power_is_lost_to_noise_and_not_certainty() -> None:
    """Runs that differ by chance by more than the change: not found, but nothing else either."""
    before = noisy_run(1, CASES, within=0.1, between=0.1)
    after = noisy_run(2, CASES, within=0.1, between=0.1, slow=1.2, slow_cases=20)
    result = compare(before, after)
    assert result.limit > 1.3
    assert list(lines(result))[-1].endswith(f"; noise hides changes below {result.limit:.2f}")
    assert len(result.slower) <= 1


def test_the_limit_is_the_threshold_where_peers_stay() -> None:
    before, after = noisy_run(1, CASES, between=0.002), noisy_run(2, CASES, between=0.002)
    assert compare(before, after, threshold=1.5).limit == 1.5
    slower = noisy_run(3, CASES, between=0.002, slow=1.3, slow_cases=CASES)
    assert not compare(before, slower, threshold=1.5).slower
    assert len(compare(before, slower, threshold=1.2).slower) == CASES


def test_without_peers_the_time_alone_counts() -> None:
    before = run(providers("full", steady(1.0)))
    assert not compare(before, run(providers("full", steady(1.05)))).slower
    [verdict] = compare(before, run(providers("full", steady(1.2)))).slower
    assert verdict.change == pytest.approx(1.2)
    assert [witness.name for witness in verdict.witnesses] == ["time"]


def test_a_change_of_one_peer_is_none_of_ours() -> None:
    peers = {"compile": 2.0, "copy": 0.5}
    before = [
        row for i in range(9) for row in providers(f"case_{i}", steady(1.0, eager=3, **peers))
    ]
    after = [row for i in range(8) for row in providers(f"case_{i}", steady(1.0, eager=3, **peers))]
    after += providers("case_8", steady(1.0, eager=1.5, **peers))
    result = compare(run(before), run(after))
    assert len(result.verdicts) == 9
    assert not result.slower
    assert not result.faster


def test_peers_of_another_version_are_no_witnesses() -> None:
    before = run(providers("full", steady(1.0, eager=3.0, ctranslate2=3.0)), ctranslate2="4.0")
    rows = providers("full", steady(1.0, eager=1.5, ctranslate2=3.0))
    after = run(rows, torch="2.14.0", ctranslate2="4.0")
    [verdict] = compare(before, after).verdicts
    assert [witness.name for witness in verdict.witnesses] == ["ctranslate2", "time"]
    assert not verdict.slower


def test_what_does_not_vary_is_told() -> None:
    before = [
        *providers("grows", steady(), peak_bytes=1_000_000, error=1e-6),
        *providers("goes", steady()),
        *providers("fails", steady()),
    ]
    after = [
        *providers("grows", steady(), peak_bytes=1_100_000, error=2e-6),
        *providers("comes", steady()),
        {**providers("fails", steady())[0], "failed": "RuntimeError: no"},
    ]
    after[-1].pop("p50_ms")
    result = compare(run(before), run(after))
    head = "operators attention"
    assert result.notes == {
        "failed now": [f"{head} fails float32 forward fused_attn"],
        "gone": [f"{head} goes float32 forward fused_attn"],
        "new": [f"{head} comes float32 forward fused_attn"],
        "more memory": [f"{head} grows float32 forward fused_attn: 1.00 MB to 1.10 MB"],
        "larger error": [f"{head} grows float32 forward fused_attn: 1e-06 to 2e-06"],
    }
    assert result.worse  # for what fails


def test_a_run_of_a_part_has_no_long_list_of_the_rest() -> None:
    rows = [row for i in range(30) for row in providers(f"case_{i:02}", steady())]
    text = list(lines(compare(run(rows), run(providers("case_00", steady())))))
    assert sum(line.startswith("- operators") for line in text) == 10
    assert "- and 19 more" in text
    assert text[-1].endswith("29 gone")


def test_growth_of_memory_alone_is_not_worse() -> None:
    before = run(providers("full", steady(), peak_bytes=1_000_000))
    after = run(providers("full", steady(), peak_bytes=9_000_000))
    assert not compare(before, after).worse


@pytest.mark.parametrize("field", ["name", "cpu", "our_instructions", "threads", "device"])
def test_different_machines_are_not_compared(field: str) -> None:
    rows = providers("full", steady())
    with pytest.raises(UnusableError, match=f"different machines: {field} "):
        compare(run(rows), run(rows, **{field: "another"}))


# --- command -------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two runs of one device, one of another."""
    rows = [ROOF, *providers("full", steady(1.0, eager=3.0)), *providers("causal", steady(2.0))]
    slow = [ROOF, *providers("full", steady(1.3, eager=3.0)), *providers("causal", steady(3.0))]
    old, new = machine(commit="aaaa0" * 8), machine(commit="bbbb0" * 8, started="2026-02-03T00Z")
    other = machine(commit="bbbb0" * 8, folder="other", name="Other")
    write(tmp_path / "some-avx2" / "2026-01-02-aaaa0aa.jsonl", [old, *rows])
    write(tmp_path / "some-avx2" / "2026-02-03-bbbb0bb.jsonl", [new, *slow])
    write(tmp_path / "other" / "2026-01-02-bbbb0bb.jsonl", [other, *slow])
    return tmp_path


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("aaaa", "bbbb0bb"),
        ("some-avx2/2026-01", "some-avx2/2026-02-03"),
        ("some-avx2/2026-01-02-aaaa0aa", "bbbb0"),
    ],
)
def test_runs_are_found(results: Path, a: str, b: str) -> None:
    found = resolve(a, b, results)
    assert [one.path.name for one in found] == [
        "2026-01-02-aaaa0aa.jsonl",
        "2026-02-03-bbbb0bb.jsonl",
    ]
    assert {one.path.parent.name for one in found} == {"some-avx2"}


def test_files_are_found(results: Path) -> None:
    files = sorted(str(path) for path in (results / "some-avx2").iterdir())
    assert [str(one.path) for one in resolve(files[0], files[1], results / "nowhere")] == files


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("aaaa", "cccc", "'cccc' is no file, nor name nor commit"),
        ("aaaa", "aa", "'aa' is no file, nor name nor commit"),
        ("aaaa", "other/2026", "are both of no device"),
        ("bbbb", "bbbb", "are both of other, some-avx2"),
    ],
)
def test_names_that_mean_nothing(
    results: Path, a: str, b: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main([a, b, "--results", str(results)]) == 2
    assert message in capsys.readouterr().err


def test_command(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(results)]
    assert module.main(["aaaa", "bbbb", *where]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "WORSE: of 2 rows 2 slower, 0 faster"
    assert printed.index("causal") < printed.index("full")  # the slowest first
    assert "| 1.50 | 2.00 | 3.00 | 1 of 1: time 1.50 |" in printed
    assert module.main(["bbbb", "aaaa", *where]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok: of 2 rows 0 slower, 2 faster"
    assert module.main(["aaaa", "bbbb", "--threshold", "1.6", *where]) == 0
    assert module.main(["aaaa", "bbbb", "--op", "beam_search", *where]) == 2
    assert "no row of ours" in capsys.readouterr().err
    assert module.main(["aaaa", "aaaa", *where]) == 2
    assert "are both" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        module.main(["aaaa", "bbbb", "--threshold", "0.9", *where])
