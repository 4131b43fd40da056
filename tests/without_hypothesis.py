"""Stands in for hypothesis where it is not installed: property tests are skipped, and say so.

A borrowed machine with a GPU may lack it and have no network. The tests that need the GPU are in
the same files as property tests, and must run there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """A strategy, or a function that makes one: any attribute and any call gives itself."""

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        return _attribute(name)


def _attribute(name: str) -> _Anything:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()


def given(*arguments: Any, **named: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Skip the test; parameters that hypothesis would give are no fixtures."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def skipped(*_: Any, **__: Any) -> None:
            pytest.skip("hypothesis is not installed")

        parameters = [p for p in inspect.signature(test).parameters.values() if p.name not in named]
        # Positional strategies fill the last parameters.
        left = parameters[: len(parameters) - len(arguments)]
        skipped.__signature__ = inspect.Signature(left)  # type: ignore[attr-defined]
        return skipped

    return decorate


def settings(*_: Any, **__: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Change nothing."""
    return lambda test: test


def install() -> None:
    """Let `import hypothesis` find this."""
    module, strategies = ModuleType("hypothesis"), ModuleType("hypothesis.strategies")
    strategies.__getattr__ = module.__getattr__ = _attribute  # type: ignore[method-assign]
    module.given, module.settings = given, settings  # type: ignore[attr-defined]
    module.strategies = strategies  # type: ignore[attr-defined]
    sys.modules.update({"hypothesis": module, "hypothesis.strategies": strategies})
