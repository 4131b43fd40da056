"""The examples in docs/ print what they say, and its pictures are those that the code draws."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = [
    pytest.param(page, *example, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, example in enumerate(
        re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", page.read_text(), re.DOTALL)
    )
]


@pytest.mark.parametrize(("page", "source", "output"), EXAMPLES)
def test_example(page: Path, source: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(page), "exec"), {})
    assert printed.getvalue() == output


@pytest.mark.parametrize(("name", "count"), [("modules", 3), ("attention", 2)])
def test_there_are_examples(name: str, count: int) -> None:
    assert sum(parameters.id.startswith(f"{name}-") for parameters in EXAMPLES) == count


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_what_is_drawn(pictures: ModuleType) -> None:
    shown = re.findall(r"!\[[^]]*\]\(images/(\w+)\.png\)", (DOCS / "attention.md").read_text())
    assert sorted(shown) == sorted(pictures.PICTURES)
    assert sorted(path.stem for path in (DOCS / "images").glob("*.png")) == sorted(shown)


def test_committed_pictures_are_up_to_date(pictures: ModuleType, tmp_path: Path) -> None:
    from matplotlib import image

    for name in pictures.PICTURES:
        drawn = torch.from_numpy(image.imread(pictures.draw(name, tmp_path)))
        committed = torch.from_numpy(image.imread(DOCS / "images" / f"{name}.png"))
        assert drawn.shape == committed.shape, name
        # Fonts may differ by a version; masks may not.
        assert (drawn - committed).abs().mean() < 0.01, name
