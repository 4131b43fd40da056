"""The commands on recurrent models, as a user calls them."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from fused_attn.cli import main
from fused_attn.training.checkpoint import list_checkpoints
from fused_attn.training.synthetic_copy import copy_words, generate_copy_pairs
from fused_attn.training.synthetic_speech import SyntheticSpeech

from .test_train import fails

SMALL = [
    "--model=rnn",
    "--vocab-type=word",
    f"--vocab-size={len(copy_words()) + 4}",
    "--hidden=16",
    "--embedding=16",
    "--encoder-layers=1",
    "--decoder-layers=1",
    "--max-tokens=400",
    "--lr=1e-2",
    "--warmup=4",
    "--checkpoint-every=4",
    "--valid-beam=0",
]
COPYING = ["--output=pointer_generator", "--extra-tokens=5", "--coverage", "--coverage-loss=0.5"]
SAMPLING = ["--sampling=linear", "--sampling-decay=10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pairs = generate_copy_pairs(150)
    for name, chosen in (("train", pairs[:130]), ("test", pairs[130:])):
        (folder / f"{name}.en").write_text("".join(f"{source}\n" for source, _ in chosen))
        (folder / f"{name}.de").write_text("".join(f"{target}\n" for _, target in chosen))
    for name, count in (("train", 40), ("test", 6)):
        frames, texts = SyntheticSpeech(shortest=3, longest=6).generate(count)
        frames.save(folder / f"{name}.npz")
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
    return folder


def train(data, out, *options: str) -> int:
    files = [f"--src={data}/train.en", f"--tgt={data}/train.de", f"--out={out}"]
    return main(["train", *files, *SMALL, *options])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A copying model that has hardly begun to learn."""
    out = tmp_path_factory.mktemp("run")
    valid = [f"--valid-src={data}/test.en", f"--valid-tgt={data}/test.de"]
    assert train(data, out, *COPYING, *SAMPLING, *valid, "--steps=8", "--log-every=4") == 0
    return out


def test_resuming_gives_the_bits_of_not_stopping(run, data, tmp_path) -> None:
    options = [*COPYING, *SAMPLING]
    assert train(data, tmp_path, *options, "--steps=4") == 0
    assert train(data, tmp_path, *options, "--steps=8", "--resume") == 0
    file = "checkpoints/step-00000008/model.safetensors"
    whole, parts = load_file(run / file), load_file(tmp_path / file)
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_the_log_has_each_loss_apart(run) -> None:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first, second = (record for record in records if "loss" in record)
    sampled = [record["sampling_probability"] for record in (first, second)]
    assert sampled == pytest.approx([0.3, 0.7])
    assert 0 < first["coverage_loss"] < 1
    assert "guided_attention" not in first
    losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    assert losses[1] < losses[0]
    config = json.loads((run / "model" / "config.json").read_text())["model"]
    assert (config["type"], config["output"], config["extra_tokens"]) == (
        "rnn",
        "pointer_generator",
        5,
    )
    assert config["tie_embeddings"] == "all"


def give(monkeypatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_names_come_out_as_they_went_in(run, monkeypatch, capfd) -> None:
    line = "zork met quux in blip ."
    give(monkeypatch, f"{line}\n\n{line}\n".encode())
    command = ["translate", f"--model={run}", "--beam=3", "--n-best=3"]
    assert main(command) == 0
    rows = [row.split("\t") for row in capfd.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["1", "1", "1", "3", "3", "3"]
    assert rows[0][1:] == rows[3][1:]
    said = {word for row in rows for word in row[2].split()}
    # An untrained pointer-generator says what it sees; words of other sentences it cannot know.
    assert said & {"zork", "quux", "blip"}
    assert said <= {*copy_words(), "zork", "quux", "blip", "\u2047"}


@pytest.mark.parametrize(
    "options",
    [
        ("--sample", "--seed=3", "--top-k=5"),
        ("--beam=2", "--coverage-penalty=0.5", "--no-repeat-ngram=1"),
        ("--beam=1", "--repetition-penalty=2"),
    ],
)
def test_every_search_runs(run, data, tmp_path, options) -> None:
    words = ["translate", f"--model={run}", f"--input={data}/test.en", f"--output={tmp_path}/out"]
    assert main([*words, *options]) == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 20


def test_evaluation_scores_translations(run, data, capsys) -> None:
    words = ["evaluate", f"--model={run}", f"--src={data}/test.en", f"--ref={data}/test.de"]
    assert main([*words, "--beam=1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("BLEU = ")
    assert "of 20 sentences" in out


@pytest.mark.parametrize(
    "options",
    [
        ("--output=copynet", "--cell=gru", "--attention=general", "--input-feeding"),
        ("--attention=none", "--context=every_step", "--reverse-source", "--unidirectional"),
        ("--attention=location", "--attention-heads=2", "--guided-attention=1", "--bridge=mean"),
        (
            "--monotonic",
            "--cell=tanh",
            "--embedding=8",
            "--initialization=he",
            "--decoder-layers=2",
        ),
        ("--separate-vocab", "--attention=dot", "--label-smoothing=0.2", "--decoder-layers=2"),
    ],
)
def test_every_form_trains_and_translates(options, data, tmp_path) -> None:
    assert train(data, tmp_path, "--steps=1", "--vocab-size=40", *options) == 0
    words = ["translate", f"--model={tmp_path}", f"--input={data}/test.en", "--beam=2"]
    assert main([*words, f"--output={tmp_path}/out"]) == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 20


def test_a_preset_gives_defaults(data, tmp_path) -> None:
    options = ["--preset=see2017", "--cell=gru", "--no-input-feeding", "--steps=1"]
    assert train(data, tmp_path, *options) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())["model"]
    expected = {
        "output": "pointer_generator",  # the preset's
        "coverage": True,
        "bridge": "linear",
        "extra_tokens": 100,
        "bidirectional": True,
        "cell": "gru",  # the command line's
        "input_feeding": False,
        "hidden_size": 16,
        "attention_heads": 1,  # nobody's
    }
    assert {name: config[name] for name in expected} == expected


def test_a_pointer_network_puts_words_in_order(tmp_path, capfd) -> None:
    lines = ["b a c", "c a", "zork b a"]
    (tmp_path / "src").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "tgt").write_text("".join(" ".join(sorted(line.split())) + "\n" for line in lines))
    files = [f"--src={tmp_path}/src", f"--tgt={tmp_path}/tgt", f"--out={tmp_path}/out"]
    small = [option for option in SMALL if not option.startswith("--vocab-size")]
    options = ["--vocab-size=7", "--output=pointer", "--input-feeding", "--steps=1"]
    assert main(["train", *files, *small, *options]) == 0
    words = ["translate", f"--model={tmp_path}/out", f"--input={tmp_path}/src", "--beam=1"]
    assert main(words) == 0
    for line, out in zip(lines, capfd.readouterr().out.splitlines(), strict=True):
        assert set(out.split()) <= set(line.split())
    (tmp_path / "tgt").write_text("a b c\na c\na b y\n")
    line = fails(capfd, "train", *files[:2], f"--out={tmp_path}/other", *small, *options)
    assert "tgt:3: a pointer network's target must consist of words of its source" in line
    assert "got 'y' once too often" in line


def test_frames_are_trained_and_translated(data, tmp_path, capsys) -> None:
    files = [f"--src={data}/train.npz", f"--tgt={data}/train.txt", f"--out={tmp_path}"]
    files += [f"--valid-src={data}/test.npz", f"--valid-tgt={data}/test.txt", "--valid-beam=1"]
    options = ["--vocab-type=char", "--vocab-size=30", "--time-reduction=2", "--steps=2"]
    options += ["--guided-attention=1", "--front-end=convolution"]
    assert main(["train", *files, *SMALL, *options, "--valid-beam=1"]) == 0
    report = capsys.readouterr().err
    assert "40 pairs (0 with an empty line and 0 over 256 tokens skipped), " in report
    assert "  guided attention 0." in report
    words = ["translate", f"--model={tmp_path}", f"--input={data}/test.npz", "--n-best=2"]
    assert main([*words, f"--output={tmp_path}/out", "--beam=2"]) == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 12
    words = ["evaluate", f"--model={tmp_path}", f"--ref={data}/test.txt"]
    assert main([*words, f"--src={data}/test.npz", "--beam=1"]) == 0
    assert "exact match = 0.0 % of 6 sentences" in capsys.readouterr().out
    line = fails(capsys, *words, f"--src={data}/test.txt")
    assert "test.txt: the model reads frames (.npz), got text" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model=rnn", "--d-model=8"), "--d-model needs --model transformer, got rnn"),
        (("--model=rnn", "--norm-first"), "--norm-first needs --model transformer, got rnn"),
        (("--preset=see2017",), "--preset needs --model rnn, got transformer"),
        (("--cell=gru",), "--cell needs --model rnn, got transformer"),
        (("--coverage",), "--coverage needs --model rnn, got transformer"),
        (("--guided-attention=1",), "--guided-attention needs --model rnn, got transformer"),
        (
            ("--model=rnn", "--output=copynet", "--label-smoothing=0.1"),
            "--label-smoothing must be 0 with --output copynet, got 0.1",
        ),
        (
            ("--model=rnn", "--output=copynet", "--separate-vocab"),
            "--output copynet needs one vocabulary for both sides",
        ),
        (
            ("--model=rnn", "--attention=none", "--guided-attention=1"),
            "guided_attention and coverage_loss must be 0 for a model without attention",
        ),
        (
            ("--model=rnn", "--attention=none", "--input-feeding"),
            "input_feeding must be False with attention 'none'",
        ),
        (
            ("--model=rnn", "--encoder-layers=2", "--decoder-layers=1", "--bridge=last"),
            "num_decoder_layers must equal num_encoder_layers = 2 with bridge 'last'",
        ),
        (("--model=rnn", "--extra-tokens=4"), "extra_tokens must be 0 with output 'generate'"),
        (("--sampling=linear", "--sampling-limit=2"), "limit must be in [0, 1], got 2"),
        (("--sampling-decay=0", "--sampling=linear"), "decay must be positive, got 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, message, tmp_path, capsys) -> None:
    (tmp_path / "src").write_text("a b\nb a\n")
    files = (f"--src={tmp_path}/src", f"--tgt={tmp_path}/src", f"--out={tmp_path}/out")
    line = fails(capsys, "train", *files, "--vocab-type=char", "--steps=1", *options)
    assert message in line
    assert not list_checkpoints(tmp_path / "out" / "checkpoints")


def test_what_is_wrong_with_frames_is_said(data, tmp_path, capsys) -> None:
    out = f"--out={tmp_path}/out"
    source, target = f"--src={data}/train.npz", f"--tgt={data}/train.txt"
    line = fails(capsys, "train", source, target, out)
    assert "train.npz: frames need --model rnn, got transformer" in line
    line = fails(capsys, "train", source, f"--tgt={data}/test.txt", out, "--model=rnn")
    assert "train.npz: has 40 sources and " in line
    (tmp_path / "empty").write_text("a\n" * 7 + "\n" + "b\n" * 32)
    line = fails(capsys, "train", source, f"--tgt={tmp_path}/empty", out, "--model=rnn")
    assert "empty:8: the line is empty" in line
    valid = (f"--valid-src={data}/test.en", f"--valid-tgt={data}/test.de")
    line = fails(capsys, "train", source, target, out, "--model=rnn", *valid)
    assert "--src and --valid-src must both be frames (.npz), or both text" in line


def test_what_a_model_is_not_for_is_said(run, data, capsys) -> None:
    source = f"--input={data}/test.en"
    line = fails(capsys, "translate", f"--model={run}", source, "--int8")
    assert "an 8-bit copy can be made of a Transformer alone" in line
    line = fails(capsys, "translate", f"--model={run}", f"--input={data}/test.npz")
    assert "test.npz: the model reads text, got frames (.npz)" in line
