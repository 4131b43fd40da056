"""What the pictures of the results show, and that every kind of them can be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures
from benchmarks.comparisons import comparisons
from benchmarks.results import Row, Run

from .rows import ROOF, machine, providers


def runs(*rows: list[Row], **fields: Any) -> list[Run]:
    every = [row for some in rows for row in some]
    return [Run(Path("some-avx2/2026-01-02-0123456.jsonl"), machine(**fields), every)]


def turns(ms: float) -> list[float]:
    return [ms * 1e-3] * 5


def main_case(**times: float) -> list[Row]:
    """Of the first picture."""
    seconds = {name: turns(ms) for name, ms in times.items()}
    return providers("full_512", seconds, direction="forward+backward")


def scaling_rows(provider: str, **fields: Any) -> list[Row]:
    head = {"suite": "scaling", "op": "attention", "dimension": "T", "dtype": "float32"}
    head |= {"direction": "forward", "provider": provider}
    times = ("p20_ms", "p50_ms", "p80_ms", "floor_ms", "peak_bytes")
    sizes = (1024, 64, 256)
    return [{**head, "value": T, **dict.fromkeys(times, T), **fields} for T in sizes]


def test_the_fastest_peer_comes_first() -> None:
    data = figures.headline(runs(main_case(fused_attn=1.0, sdpa=3.0, compile=0.8, copy=0.1)))
    assert data is not None
    [row] = data["rows"]
    assert (row["family"], row["label"]) == ("attention", "full")
    assert [(p["name"], p["times"]) for p in row["peers"]] == [
        ("torch.compile", pytest.approx(0.8)),
        ("SDPA", pytest.approx(3.0)),
    ]


def test_of_two_backends_the_faster_is_shown() -> None:
    data = figures.headline(runs(main_case(triton=2.0, cuda=1.0, sdpa=3.0)))
    assert data is not None
    assert data["rows"][0]["peers"] == [{"name": "SDPA", "times": pytest.approx(3.0)}]
    shares = figures.shares(*newest(runs(main_case(triton=2.0, cuda=1.0, sdpa=4.0))))
    assert shares is not None
    [row] = shares["panels"]["forward+backward"]
    assert row["ours"] == pytest.approx(0.5)  # the floor is half a millisecond
    assert row["peers"] == {"SDPA": pytest.approx(0.125)}


def newest(some: list[Run]) -> tuple[Run, list[Row]]:
    return some[0], some[0].rows


def test_points_under_the_roof_are_of_both_directions() -> None:
    both = main_case(fused_attn=1.0, sdpa=4.0)
    forward = providers("full_512", {"fused_attn": turns(0.3), "sdpa": turns(1.0)})
    data = figures.roofline(runs([ROOF], forward, both))
    assert data is not None
    assert data["memory"] == pytest.approx(26.8e9, rel=1e-2)
    assert data["cache"] == pytest.approx(65.5e9, rel=1e-2)
    [point] = data["ops"]["attention"]
    assert point["intensity"] == pytest.approx(1.5)  # operations a byte
    assert point["ours"] == pytest.approx(3e9)
    assert point["peer"] == pytest.approx(0.75e9)


def test_nothing_to_show() -> None:
    assert figures.headline(runs([ROOF])) is None
    assert figures.roofline(runs(main_case(fused_attn=1.0, sdpa=2.0))) is None
    assert figures.roofline(runs([ROOF])) is None


def test_sizes_ascend() -> None:
    some = runs(scaling_rows("fused_attn", held_bytes=64), scaling_rows("eager"))
    [panel] = figures.scaling(*newest(some))["panels"]
    assert {name: [p["value"] for p in line] for name, line in panel["lines"].items()} == {
        "fused_attn": [64, 256, 1024],
        "eager": [64, 256, 1024],
    }


def test_absent_and_failed_have_no_time() -> None:
    absent = [{**main_case(sdpa=1.0)[0], "provider": "liger", "absent": "not installed"}]
    absent[0].pop("p50_ms")
    [one] = comparisons([*main_case(fused_attn=1.0, sdpa=3.0), *absent])
    assert set(one.rows) == {"fused_attn", "sdpa", "liger"}
    assert set(one.peers) == {"sdpa"}


def test_a_picture_carries_a_hash_of_its_data(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    slower = figures.headline(runs(main_case(fused_attn=1.0, sdpa=3.0, compile=0.8)))
    grows = figures.scaling(*newest(runs(scaling_rows("fused_attn"), scaling_rows("eager"))))
    alone = figures.shares(*newest(runs(main_case(fused_attn=1.0))))
    for kind, data in {"headline": slower, "scaling": grows, "shares": alone}.items():
        assert data is not None
        saved = plots.save(kind, data, tmp_path / kind)
        assert [path.name for path in saved] == [f"{kind}.svg", f"{kind}.png"]
        for path in saved:
            assert figures.stamp(data).encode() in path.read_bytes()
    assert plots.save("scaling", grows, tmp_path / "scaling") == []  # the same to the byte
    assert figures.stamp(grows) != figures.stamp({**grows, "device": "another"})
