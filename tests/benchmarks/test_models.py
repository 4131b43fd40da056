"""Whole models beside other libraries, at a size that takes seconds."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import __main__ as command
from benchmarks.models import comparison, rnn, transformer_step, translation
from benchmarks.models.comparison import AbsentError, DisagreementError, ModelCase, Provider
from benchmarks.models.counting import launches
from benchmarks.models.sizes import BASE, TINY
from benchmarks.timing import Times, peak_bytes
from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig, TransformerConfig, rnn_decoding

Row = dict[str, Any]
IDENTITY = ("model", "task", "case", "dtype", "provider")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[Row]]:
    """The status and the rows of a tiny run, which prints nothing else."""
    status = command.main(["--size=tiny", "--rounds=2", "--json", *options])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refuse(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("no compiler here")


# --- the command ----------------------------------------------------------------------------


def test_every_case_is_a_row_for_each_of_its_providers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("ctranslate2")
    # Compiling takes half a minute; so it also is the peer that fails, and the rest goes on.
    monkeypatch.setattr(torch, "compile", refuse)
    status, rows = run(capsys)
    assert status == 0
    found = [tuple(row[name] for name in IDENTITY) for row in rows]
    expected = [
        (case.model, case.task, case.name, case.dtype, provider)
        for case in command.plan(TINY, "cpu", list(command.GROUPS))
        for provider in case.shown()
    ]
    assert sorted(found) == sorted(expected)
    assert len(set(found)) == len(found)
    for row in rows:
        assert row["suite"] == "models"
        if row["provider"] == "torch_compile":
            assert "no compiler here" in row["failed"]
            assert "p50_ms" not in row
            continue
        assert "failed" not in row
        assert "absent" not in row
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["rounds"] == 2
        assert row["tokens_per_s"] > 0
        assert ("ratio" in row) == (row["provider"] != "fused_attn")
        if row["task"] == "training_step":
            assert row["launches"] > 0
            assert row["peak_bytes"] > 0
    of_searches = [row for row in rows if "agreement" in row]
    assert {row["provider"] for row in of_searches} == {"hugging_face", "ctranslate2", "torch"}
    assert all(row["agreement"] == 1.0 for row in of_searches if row["dtype"] == "float32")


def test_absent_peers_are_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, rows = run(capsys, "--only", "translation", "--case", "greedy batch_2 float32")
    assert status == 0
    by_provider = {row["provider"]: row for row in rows}
    assert sorted(by_provider) == ["ctranslate2", "fused_attn", "hugging_face"]
    assert by_provider["fused_attn"]["p50_ms"] > 0
    for peer in ("ctranslate2", "hugging_face"):  # the former reads the latter's weights
        assert by_provider[peer]["absent"].startswith("transformers: ")
        assert "p50_ms" not in by_provider[peer]


def test_without_time_every_case_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(capsys, "--seconds=0")
    assert status == 3
    cases = command.plan(TINY, "cpu", list(command.GROUPS))
    assert len(rows) == sum(len(case.shown()) for case in cases)
    assert {row["absent"] for row in rows} == {"no time left"}


def test_a_line_for_the_screen_and_a_row_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        command.GROUPS, "rnn", lambda size, device: [case(), case("b", ours=refuse)]
    )
    path = tmp_path / "rows.jsonl"
    assert command.main(["--only", "rnn", "--rounds=2", "--out", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "toy guess a float32 theirs: " in printed
    assert "toy guess b float32 fused_attn: failed, RuntimeError: no compiler here" in printed
    machine, *rows = map(json.loads, path.read_text().splitlines())
    assert machine["suite"] == "machine"
    assert [(row["case"], row["provider"]) for row in rows] == [
        ("a", "fused_attn"),
        ("a", "theirs"),
        ("b", "fused_attn"),
        ("b", "theirs"),
    ]


def test_needs_two_rounds_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--rounds=1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device=cuda"]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err


def test_plan_for_a_gpu() -> None:
    cases = command.plan(BASE, "cuda", list(command.GROUPS))
    assert [case.rank for case in cases] == sorted(case.rank for case in cases)
    searches = {
        (case.task, case.name, case.dtype): case.providers
        for case in cases
        if case.group == "translation"
    }
    batches = [f"batch_{n}" for n in (1, 8, 32, 128)]
    wanted = itertools.product(("greedy", "beam_4"), batches, ("bfloat16", "float32"))
    assert searches.keys() == set(wanted)
    assert set(searches.values()) == {("fused_attn", "fused_attn_eager", "hugging_face")}
    steps = [case for case in cases if case.group == "training_step"]
    assert {case.dtype for case in steps} == {"bfloat16"}
    assert {case.providers for case in steps} == {
        ("fused_attn", "torch"),
        ("fused_attn", "torch_compile"),
    }


# --- a case ---------------------------------------------------------------------------------


def compare(ours: int, theirs: int) -> Row:
    if ours != theirs:
        raise DisagreementError(f"{ours} is not {theirs}")
    return {"agreement": 1.0}


def case(name: str = "a", **providers: Callable[[], Provider]) -> ModelCase:
    """Finds a number; ``providers`` replace ``ours`` and ``theirs``."""
    made: dict[str, Callable[[], Provider]] = {
        "fused_attn": providers.get("ours", lambda: Provider(lambda: time.sleep(1e-4), 1)),
        "theirs": providers.get("theirs", lambda: Provider(lambda: time.sleep(3e-3), 1)),
    }
    return ModelCase(
        group="toy",
        rank=0,
        model="toy",
        task="guess",
        name=name,
        dtype="float32",
        shape="small",
        tokens=5,
        providers=tuple(made),
        prepare=lambda provider: made[provider](),
        compare=compare,
        counts=False,
    )


def rows_of(toy: ModelCase) -> dict[str, Row]:
    return {row["provider"]: row for row in comparison.rows_of(toy, "cpu", 3)}


def test_times_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"fused_attn": Times([0.001, 0.002, 0.004]), "theirs": Times([0.002, 0.008, 0.004])}
    monkeypatch.setattr(comparison, "interleaved", lambda *args, **options: taken)
    rows = rows_of(case())
    assert rows["theirs"] == {
        **case().row("theirs"),
        "p20_ms": 2.0,
        "p50_ms": 4.0,
        "p80_ms": 8.0,
        "rounds": 3,
        "tokens_per_s": 1250.0,
        "shape": "small",
        "agreement": 1.0,
        "ratio": [1.0, 2.0, 4.0],
    }
    assert rows["fused_attn"]["p50_ms"] == 2.0


def test_ours_that_fails_leaves_the_peers_their_times() -> None:
    rows = rows_of(case(ours=refuse))
    assert "no compiler here" in rows["fused_attn"]["failed"]
    assert rows["theirs"]["p50_ms"] >= 3.0
    assert "ratio" not in rows["theirs"]


def test_what_finds_something_else_gets_no_time() -> None:
    rows = rows_of(case(theirs=lambda: Provider(lambda: None, 2)))
    assert rows["theirs"]["failed"] == "1 is not 2"
    assert rows["theirs"]["disagrees"]
    assert "p50_ms" not in rows["theirs"]
    assert "p50_ms" in rows["fused_attn"]


def test_what_fails_while_it_is_timed_is_a_row() -> None:
    rows = rows_of(case(theirs=lambda: Provider(refuse, 1)))
    assert "no compiler here" in rows["theirs"]["failed"]


def test_the_budget_stops_new_cases_and_not_the_one_that_runs() -> None:
    def slow() -> Provider:
        time.sleep(0.2)
        return Provider(lambda: None, 1)

    rows = list(command.measure([case(ours=slow), case("b")], "cpu", 2, 0.1))
    assert all("p50_ms" in row for row in rows if row["case"] == "a")
    assert [row["absent"] for row in rows if row["case"] == "b"] == ["no time left"] * 2


def test_a_case_that_needs_more_than_is_left_is_not_begun() -> None:
    rows = command.measure([replace(case(), needs_seconds=60.0), case("b")], "cpu", 2, 30.0)
    assert [(row["case"], "absent" in row) for row in rows] == [
        ("a", True),
        ("a", True),
        ("b", False),
        ("b", False),
    ]


def test_known_cases_are_left_out_and_those_without_time_are_not(tmp_path: Path) -> None:
    rows: list[Row] = [{"suite": "machine"}]
    rows += [case("timed").row(name, p50_ms=1.0) for name in ("fused_attn", "theirs")]
    rows += [case("late").row(name, absent="no time left") for name in ("fused_attn", "theirs")]
    rows.append(case("half").row("fused_attn", p50_ms=1.0))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = [case(name) for name in ("timed", "late", "half", "other")]
    assert command.without_known(cases, path) == cases[1:]
    assert command.without_known(cases, tmp_path / "none.jsonl") == cases


def test_what_a_peer_prints_is_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loud() -> Provider:
        print("Setting `pad_token_id`")
        return Provider(lambda: None, 1)

    monkeypatch.setitem(command.GROUPS, "rnn", lambda size, device: [case(theirs=loud)])
    assert len(run(capsys, "--only", "rnn")[1]) == 2


def test_sentences_agree() -> None:
    agree = comparison.sentences_agree
    assert agree([[1, 2], [3, 4]], [[1, 2], [3, 5]], exact=False) == {"agreement": 0.75}
    assert agree([[1, 2]], [[2]], exact=False) == {"agreement": 0.0}
    with pytest.raises(DisagreementError, match="1 of 2 sentences differ"):
        agree([[1, 2], [3, 4]], [[1, 2], [3, 5]], exact=True)
    many = [[i] for i in range(64)]
    assert agree(many, [[9], *many[1:]], exact=True) == {"agreement": 63 / 64}
    with pytest.raises(DisagreementError):
        agree(many, [[9], [9], *many[2:]], exact=True)


# --- the models -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_step_launches_and_holds_less_than_torchs(norm_first: bool) -> None:
    config = TransformerConfig(
        source_vocab_size=100,
        target_vocab_size=100,
        d_model=64,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=128,
        attention_dropout=0.1,
        activation="gelu" if norm_first else "relu",
        norm_first=norm_first,
        tie_embeddings="all",
    )
    batch = transformer_step.make_batch(100, 32, 32, "cpu")
    prepare = partial(transformer_step.prepared, config, batch=batch, device="cpu", autocast=False)
    _compare_steps(prepare("fused_attn"), prepare("torch"), launched=0.7, held=0.85)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_rnn_step_launches_and_holds_less_than_torchs(cell: str) -> None:
    step = rnn._step(replace(TINY, sentences=2), "cpu", cell, 0)
    _compare_steps(step.prepare("fused_attn"), step.prepare("torch"), launched=0.5, held=1.0)


def _compare_steps(ours: Provider, theirs: Provider, launched: float, held: float) -> None:
    comparison.same_loss(ours.outcome, theirs.outcome)
    counts = [launches(side.call, "cpu")["launches"] for side in (ours, theirs)]
    assert 0 < counts[0] < launched * counts[1]
    sizes = [peak_bytes(side.call) for side in (ours, theirs)]
    assert 0 < sizes[0] < held * sizes[1]


def test_other_weights_find_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_step.Plain, "copy_weights", lambda self, model: None)
    step = transformer_step.cases(TINY, "cpu")[0]
    ours, theirs = step.prepare("fused_attn"), step.prepare("torch")
    with pytest.raises(DisagreementError, match="different losses"):
        step.compare(ours.outcome, theirs.outcome)


def test_a_search_without_its_graph_finds_the_same() -> None:
    model = translation.build(TINY)
    assert model.decodes_on_static_shapes
    eager = comparison.WithoutGraph(model)
    assert not eager.decodes_on_static_shapes
    source = torch.randint(3, TINY.vocabulary, (2, 4))
    for beam_size in (1, 4):
        found = [translation.our_search(m, source, 4, beam_size)() for m in (model, eager)]
        assert found[0] == found[1]


def test_translation_in_16_bits() -> None:
    """As on a GPU."""
    pytest.importorskip("transformers")
    translators = translation.Translators(TINY, "cpu")
    search = translation._case(translators, "bfloat16", 4, 2, 0)
    ours, theirs = search.prepare("fused_attn"), search.prepare("hugging_face")
    assert [len(sentence) for sentence in theirs.outcome] == [TINY.tokens] * 2
    assert search.compare(ours.outcome, theirs.outcome)["agreement"] > 0


def test_absent_is_said_by_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(AbsentError, match="ctranslate2: "):
        translation.ctranslate2_translator(None, "", "float32")


def test_counts_what_computes() -> None:
    x = torch.randn(10, 25)
    assert launches(lambda: (x.view(25, 10).t() + 1.0).relu(), "cpu") == {"launches": 2}


@pytest.mark.parametrize(("feeds", "most"), [(False, 19), (True, 21)])
def test_a_step_of_decoding_is_few_launches(
    feeds: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of LSTM with additive attention, through the modules, as on a GPU."""
    monkeypatch.setattr(rnn_decoding, "_packs", lambda model: False)
    sizes = {"embedding_size": 16, "hidden_size": 16, "input_feeding": feeds}
    config = RNNSeq2SeqConfig(source_vocab_size=30, target_vocab_size=30, **sizes)
    model = RNNSeq2Seq(config).eval()
    state = model.start(torch.randint(4, 30, (3, 5)), torch.tensor([5, 2, 4]), 4)
    tokens = torch.randint(4, 30, (3, 4))
    assert 0 < launches(lambda: model.step(tokens, state), "cpu")["launches"] <= most
