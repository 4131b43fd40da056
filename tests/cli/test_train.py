"""The commands train, translate and evaluate, as a user calls them."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from fused_attn.cli import main
from fused_attn.training.checkpoint import list_checkpoints
from fused_attn.training.synthetic import generate_pairs

SMALL = [
    "--vocab-size=150",
    "--separate-vocab",
    "--vocab-type=char",
    "--d-model=32",
    "--heads=2",
    "--encoder-layers=1",
    "--decoder-layers=1",
    "--feedforward=64",
    "--dropout=0.1",
    "--max-tokens=1024",
    "--lr=5e-3",
    "--warmup=20",
    "--checkpoint-every=6",
    "--valid-beam=0",
]


def write_pairs(folder, name: str, pairs: list[tuple[str, str]]) -> None:
    (folder / f"{name}.en").write_text("".join(f"{source}\n" for source, _ in pairs))
    text = "".join(f"{target}\n" for _, target in pairs)
    (folder / f"{name}.zh.gz").write_bytes(gzip.compress(text.encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pairs = generate_pairs(260, seed=1)
    write_pairs(folder, "train", pairs[:200])
    write_pairs(folder, "test", pairs[200:])
    return folder


def train(data, out, *options: str) -> int:
    files = [f"--src={data}/train.en", f"--tgt={data}/train.zh.gz", f"--out={out}"]
    return main(["train", *files, *SMALL, *options])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    valid = [f"--valid-src={data}/test.en", f"--valid-tgt={data}/test.zh.gz"]
    assert train(data, out, "--steps=12", "--average=2", *valid) == 0
    return out


def test_training_leaves_a_model_checkpoints_and_a_log(run) -> None:
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-00000006", "step-00000012"]
    assert (run / "model").resolve().name == "average-step-00000012"
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    assert len(losses) == 3
    assert losses[1] < losses[0]


@pytest.mark.parametrize("norm", ["rms_norm", "power_norm", "batch_norm"])
def test_any_norm_is_trained_averaged_and_loaded(norm, data, tmp_path, monkeypatch, capfd) -> None:
    """Running statistics are averaged with the parameters."""
    options = [f"--norm={norm}", "--activation=geglu", "--steps=12", "--average=2"]
    options += ["--sampling=exponential", "--sampling-decay=5"]
    assert train(data, tmp_path, *options) == 0
    states = [
        load_file(path / "model.safetensors") for path in list_checkpoints(tmp_path / "checkpoints")
    ]
    average = load_file((tmp_path / "model").resolve() / "model.safetensors")
    for name, tensor in average.items():
        values = [state[name] for state in states]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (values[0] + values[1]) / 2.0)
        else:
            assert tensor.item() == values[1].item() > values[0].item(), name
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"seven\n")))
    assert main(["translate", f"--model={tmp_path}"]) == 0
    assert capfd.readouterr().out.count("\n") == 1


def test_evaluation_prints_bleu_its_signature_and_exact_match(run, data, tmp_path, capsys) -> None:
    words = ["evaluate", f"--model={run}", f"--src={data}/test.en", f"--ref={data}/test.zh.gz"]
    output = tmp_path / "out"
    assert main([*words, "--tokenize=zh", "--beam=1", f"--output={output}"]) == 0
    out = capsys.readouterr().out
    assert "nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|version:" in out
    assert "exact match = 0.0 % of 60 sentences" in out
    assert len(output.read_text().splitlines()) == 60
    (tmp_path / "long").write_text("a\n" + "b " * 600 + "\n")
    words = ["evaluate", f"--model={run}", f"--src={tmp_path}/long", f"--ref={tmp_path}/long"]
    line = fails(capsys, *words)
    assert "long:2: the sentence has 1200 tokens, over the model's limit of 1023" in line


def test_resuming_gives_the_bits_of_not_stopping(run, data, tmp_path) -> None:
    assert train(data, tmp_path, "--steps=6") == 0
    assert train(data, tmp_path, "--steps=12", "--resume") == 0
    file = "checkpoints/step-00000012/model.safetensors"
    whole, parts = load_file(run / file), load_file(tmp_path / file)
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def fails(capsys, *words: str) -> str:
    """Return the last line that a command prints when it exits with status 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        (b"a\nb\n", b"c\n", (), "tgt:2: the file ends, but "),
        (b"a\n\n", b"c\nd\n", (), "src:2: the line is empty"),
        (b"a\nb\n", b"c\n\xff\n", (), "tgt:2: not UTF-8: byte 0xff at position 1"),
        (b"a\nb b b\n", b"c\nd\n", ("--max-length=4",), "src:2: the sentence has 6 tokens"),
        (b"a\n", b"b\n", ("--vocab-type=bpe",), "cannot learn a bpe vocabulary of 8000 ids"),
        (b"a\n", b"b\n", ("--d-model=30", "--heads=4"), "d_model must be a multiple of"),
        (b"a\n", b"b\n", ("--lr=-1",), "learning_rate must be positive"),
        (b"a\n", b"b\n", ("--device=cuda:99",), "--device cuda:99: cannot be used here"),
        (b"a\n", b"b\n", ("--valid-src=x",), "--valid-src and --valid-tgt go together"),
        (b"a\n", b"b\n", ("--patience=2",), "--patience needs --valid-src and --valid-tgt"),
        (b"a\n", b"b\n", ("--resume",), "holds no checkpoint to resume from"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path, capsys, source, target, options, message
) -> None:
    (tmp_path / "src").write_bytes(source)
    (tmp_path / "tgt").write_bytes(target)
    files = (f"--src={tmp_path}/src", f"--tgt={tmp_path}/tgt", f"--out={tmp_path}/out")
    line = fails(capsys, "train", *files, "--vocab-type=char", "--steps=1", *options)
    assert line.startswith("fused-attn train: ")
    assert message in line
    assert not list_checkpoints(tmp_path / "out" / "checkpoints")


def test_bad_pairs_can_be_skipped(tmp_path, capsys) -> None:
    (tmp_path / "src").write_text("a b\n\nc d e f g\nb a\n")
    (tmp_path / "tgt").write_text("x y\nz\nz\ny x\n")
    files = [f"--src={tmp_path}/src", f"--tgt={tmp_path}/tgt", f"--out={tmp_path}/out"]
    options = ["--bad-pairs=skip", "--max-length=5", "--steps=1"]
    assert main(["train", *files, *SMALL, *options]) == 0
    report = capsys.readouterr().err
    assert "2 pairs (1 with an empty line and 1 over 5 tokens skipped)" in report


def test_a_run_is_not_overwritten_nor_resumed_as_another_model(run, data, capsys) -> None:
    files = (f"--src={data}/train.en", f"--tgt={data}/train.zh.gz", f"--out={run}")
    line = fails(capsys, "train", *files, *SMALL)
    assert "holds a training run already (step-00000012): give --resume" in line
    line = fails(capsys, "train", *files, *SMALL, "--resume", "--d-model=16")
    assert "config.json: checkpoint of another model: d_model is 32 there and 16 here" in line


def test_what_is_no_model_is_named(run, data, tmp_path, capsys) -> None:
    source = f"--input={data}/test.en"
    line = fails(capsys, "translate", f"--model={tmp_path}", source)
    assert "neither a checkpoint nor the directory of a training run" in line
    shutil.copytree(run / "model", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = fails(capsys, "translate", f"--model={tmp_path}/broken", source)
    assert "broken/model.safetensors: cannot read" in line
    shutil.copy(run / "model" / "model.safetensors", weights)
    config = tmp_path / "broken" / "config.json"
    config.write_text(config.read_text().replace('"d_model": 32', '"d_model": 64'))
    line = fails(capsys, "translate", f"--model={tmp_path}/broken", source)
    assert "broken/model.safetensors: checkpoint of another model: " in line
    assert "there and [" in line
