"""The command translate, as a user calls it; where a process matters, in one of its own."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.cli._line_writer import LineWriter
from tests.training.tiny_translator import save_tiny_model, some_lines

LINES = some_lines(24)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder / "tiny")
    return f"--model={folder}/tiny"


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> list[str]:
    """What the lines are translated to, each in a call of its own."""
    folder = tmp_path_factory.mktemp("alone")
    texts = []
    for line in LINES:
        (folder / "in").write_text(f"{line}\n")
        words = ["translate", model, "--beam=2", f"--input={folder}/in", f"--output={folder}/out"]
        assert main(words) == 0
        texts.append((folder / "out").read_text())
    assert len(set(texts)) > 20
    return texts


def give(monkeypatch, text: bytes) -> None:
    """Make a text the standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def start(*words: str, **streams: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fused_attn", "translate", "--threads=1", *words]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, **streams)


def test_order_is_kept_and_an_empty_line_gives_an_empty_one(
    model, expected, tmp_path, monkeypatch, capfdbinary
) -> None:
    text = "\r\n".join([*LINES[:20], "", *LINES[20:]])
    wanted = "".join([*expected[:20], "\n", *expected[20:]])
    give(monkeypatch, text.encode())
    assert main(["translate", model, "--beam=2", "--batch-size=4"]) == 0
    captured = capfdbinary.readouterr()
    assert captured.out.decode() == wanted
    assert captured.err == b""
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with (tmp_path / "in").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        words = ["translate", model, "--beam=2", f"--output={tmp_path}/out", "--progress"]
        assert main(words) == 0
    assert (tmp_path / "out").read_text() == wanted
    assert b"25/25" in capfdbinary.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_pipe_may_be_compressed(
    is_damaged, model, expected, tmp_path, monkeypatch, capfd
) -> None:
    data = gzip.compress(("\n".join(LINES) + "\n").encode())
    read, write = os.pipe()
    with os.fdopen(write, "wb") as pipe:
        pipe.write(data[:-8] if is_damaged else data)  # its length and its checksum
    with os.fdopen(read) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        words = ["translate", model, "--beam=2", f"--output={tmp_path}/out"]
        assert main(words) == (2 if is_damaged else 0)
    assert (tmp_path / "out").read_text() == "".join(expected)
    if is_damaged:
        lines = capfd.readouterr().err.splitlines()
        assert lines[0] == f"stopped: 24 lines translated; {tmp_path}/out holds the first 24"
        assert lines[1].startswith("fused-attn translate: <stdin>: damaged gzip file: ")


def test_a_progress_bar_is_for_a_terminal(model, monkeypatch, tmp_path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (tmp_path / "in").write_text("abc\n")
    words = ["translate", model, f"--input={tmp_path}/in", f"--output={tmp_path}/out"]
    for option, is_shown in (((), True), (("--no-progress",), False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert main([*words, *option]) == 0
        assert ("1/1" in sys.stderr.getvalue()) is is_shown


def test_a_line_that_fails_is_named_and_the_others_go_on(model, expected, tmp_path, capfd) -> None:
    lines = [line.encode() for line in LINES]
    lines[1], lines[3] = b"ab\xff", b"a" * 64
    (tmp_path / "in").write_bytes(b"\n".join(lines))
    assert main(["translate", model, f"--input={tmp_path}/in", "--beam=2"]) == 1
    captured = capfd.readouterr()
    assert captured.out == "".join([expected[0], "\n", expected[2], "\n", *expected[4:]])
    name = f"fused-attn translate: {tmp_path}/in"
    assert captured.err.splitlines() == [
        f"{name}:2: not UTF-8: byte 0xff at position 3 of the line",
        f"{name}:4: the sentence has 64 tokens, over the model's limit of 63",
    ]


def test_several_translations_of_a_line(model, expected, monkeypatch, capfd) -> None:
    give(monkeypatch, f"{LINES[0]}\n\n{LINES[1]}\n".encode())
    assert main(["translate", model, "--beam=2", "--n-best=2"]) == 0
    rows = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["1", "1", "3", "3"]
    assert [f"{row[2]}\n" for row in rows[::2]] == expected[:2]
    scores = [float(row[1]) for row in rows]
    assert scores[0] >= scores[1]
    assert scores[2] >= scores[3]


def test_samples_repeat_with_their_seed(model, monkeypatch, capfd) -> None:
    def sample(*options: str) -> str:
        give(monkeypatch, "\n".join(LINES[:8]).encode())
        assert main(["translate", model, "--sample", *options]) == 0
        return capfd.readouterr().out

    once = sample("--seed=3", "--n-best=2", "--batch-size=3")
    assert once.count("\n") == 16
    assert sample("--seed=3", "--n-best=2") == once
    assert sample("--seed=4", "--n-best=2") != once
    assert sample() != sample()
    assert sample("--top-k=1") == sample("--temperature=1e-4") == sample("--top-p=1e-6")


def test_options_reach_the_search(model, expected, monkeypatch, capfd) -> None:
    def found(*options: str) -> list[list[str]]:
        give(monkeypatch, "\n".join(LINES[:8]).encode())
        assert main(["translate", model, *options]) == 0
        return [line.split("\t") for line in capfd.readouterr().out.splitlines()]

    base = found("--beam=2", "--n-best=1")
    assert [f"{row[2]}\n" for row in base] == expected[:8]
    for option in (
        "--length-penalty=0.3",
        "--length-normalization=gnmt",
        "--coverage-penalty=0.5",
        "--temperature=2",
        "--repetition-penalty=1.5",
        "--no-repeat-ngram=2",
    ):
        assert found("--beam=2", "--n-best=1", option) != base, option
    assert found("--beam=1") == [row[2:] for row in found("--beam=1", "--n-best=1")]


def test_an_8_bit_copy_says_nearly_the_same(model, monkeypatch, capfd) -> None:
    def score(*options: str) -> float:
        give(monkeypatch, LINES[0].encode())
        assert main(["translate", model, "--beam=1", "--n-best=1", *options]) == 0
        return float(capfd.readouterr().out.split("\t")[1])

    rounded, exact = score("--int8"), score()
    assert rounded != exact
    assert abs(rounded - exact) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--n-best=5",), "--n-best 5 needs --beam 5 or more, got 4"),
        (("--top-k=3",), "--top-k needs --sample"),
        (("--seed=3",), "--seed needs --sample"),
        (("--sample", "--beam=3"), "--beam is of beam search and does not go with --sample"),
        (("--sample", "--top-p=2"), "sample: top_p must be in (0, 1], got 2.0"),
        (("--coverage-penalty=-1",), "beam_search: coverage_penalty must be at least 0, got -1.0"),
        (("--beam=99",), "beam_search: beam_size must be at most V = 16"),
        (("--output=absent/out",), "absent/out: cannot write: No such file or directory"),
        (("--input=absent",), "absent: cannot read: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options, message, model, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    give(monkeypatch, b"abc\n")
    assert main(["translate", model, *options]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fused-attn translate: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_written_and_not_replaced(model, expected, tmp_path, capfd) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "in").write_text("\n".join(LINES))
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    words = ["translate", model, "--beam=2", f"--input={tmp_path}/in", f"--output={tmp_path}/pipe"]
    assert main(words) == 0
    reader.join()
    assert read == ["".join(expected)]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    # A link stays one, too.
    (tmp_path / "link").symlink_to(tmp_path / "out")
    words[-1] = f"--output={tmp_path}/link"
    assert main(words) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out").read_text() == "".join(expected)


def test_a_pipe_gets_each_answer_before_the_next_line_is_sent(model, expected) -> None:
    process = start(model, "--beam=2", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    for line, answer in zip(LINES[:4], expected, strict=False):
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        assert process.stdout.readline().decode() == answer
    # It waits for a line now.
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"interrupted: 4 lines translated\n")


def test_interrupted_it_leaves_the_first_lines(model, expected, tmp_path) -> None:
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in LINES * 800))
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    output.write_text("of before\n")
    process = start(model, "--beam=2", f"--input={tmp_path}/in", f"--output={output}")
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.stat().st_size < 2000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert output.read_text() == "of before\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert not partial.exists()
    lines = output.read_text().splitlines(keepends=True)
    count, total = len(lines), len(LINES) * 800
    assert 0 < count < total
    assert lines == list(itertools.islice(itertools.cycle(expected), count))
    reached = f"{count} of {total} lines translated; {output} holds the first {count}"
    assert err.decode() == f"interrupted: {reached}\n"


def test_a_reader_that_has_enough_ends_it_quietly(model, expected, tmp_path) -> None:
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in LINES * 800))
    process = start(model, "--beam=2", f"--input={tmp_path}/in", stdout=subprocess.PIPE)
    head = subprocess.run(["head", "-1"], stdin=process.stdout, capture_output=True, check=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert head.stdout.decode() == expected[0]
    assert process.stderr is not None
    assert process.stderr.read() == b""


@pytest.fixture
def writer(tmp_path) -> Iterator[LineWriter]:
    with LineWriter(str(tmp_path / "out")) as output:
        yield output


def test_no_line_is_half_written(writer, tmp_path) -> None:
    class Interrupted:
        """A file during whose writing Ctrl-C is pressed."""

        def __init__(self, file) -> None:
            self.file = file

        def write(self, text: bytes) -> None:
            self.file.write(text[:1])
            signal.raise_signal(signal.SIGINT)
            self.file.write(text[1:])

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    writer.write("a\n")
    writer._file = Interrupted(writer._file)
    with pytest.raises(KeyboardInterrupt):
        writer.write("bcd\n")
    assert writer.count == 2
    # Pressed once more, it does not wait for a write that may never end; nor does it stop this.
    with pytest.raises(KeyboardInterrupt):
        writer.write("efg\n")
    assert writer.count == 2
    writer.finish()
    signal.raise_signal(signal.SIGINT)
    assert (tmp_path / "out").read_text() == "a\nbcd\ne"


def test_outside_of_a_write_it_is_interrupted_at_once(writer, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    # Should that get lost, as it does in a destructor, the next line says so.
    with pytest.raises(KeyboardInterrupt):
        writer.write("a\n")
    assert writer.count == 1


def test_what_was_ignored_goes_on_being_ignored(tmp_path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with LineWriter(str(tmp_path / "out")) as output:
            signal.raise_signal(signal.SIGINT)
            output.write("a\n")
            output.finish()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "out").read_text() == "a\n"
