"""README.md's examples print what they say, and its commands and links exist."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused_attn.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", README, re.DOTALL)
SHELL = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
LINES = [line.strip() for line in SHELL.splitlines() if line.strip()]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take minutes over small matrices on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("source", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_prints_what_it_says(source: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "README.md", "exec"), {})
    assert printed.getvalue() == output


def test_every_python_block_is_an_example() -> None:
    assert len(EXAMPLES) == README.count("```python") >= 3


def test_begins_with_the_two_commands() -> None:
    assert [line.split("#")[0].strip() for line in LINES[:2]] == ["make demo", "make test"]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z]+)", SHELL):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    "words",
    [
        shlex.split(part, comments=True)[1:]
        for line in LINES
        for part in line.split("|")
        if part.split()[:1] == ["fused-attn"]
    ],
    ids=" ".join,
)
def test_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    assert words[0] in COMMANDS
    module = importlib.import_module(f"fused_attn.cli.{words[0]}")
    monkeypatch.setattr(module, "run", lambda arguments: seen.append(arguments) or 0)
    assert main([word for word in words if word != ">"]) == 0
    assert seen


def test_links_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
