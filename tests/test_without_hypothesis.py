"""The stand-in for hypothesis, by which tests on a borrowed machine do without it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_property_tests_are_skipped_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests import without_hypothesis\nwithout_hypothesis.install()\n"
    )
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent("""
        import pytest
        from hypothesis import HealthCheck, assume, given, settings
        from hypothesis import strategies as st

        LENGTHS = st.lists(st.integers(1, 5), min_size=1).map(tuple)

        @st.composite
        def pairs(draw):
            return draw(LENGTHS), draw(st.integers())

        @pytest.mark.parametrize("size", [1, 2])
        @settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(pairs(), number=st.integers())
        def test_property(size, pair, number):
            raise AssertionError

        def test_plain(tmp_path):
            assert tmp_path.exists()
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["--rootdir", str(tmp_path), "-p", "no:hypothesispytest"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "1 passed, 2 skipped" in result.stdout, result.stdout + result.stderr
    assert "hypothesis is not installed" in result.stdout
