"""Runs a step, on a GPU out of a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

# Steps that run eagerly before one is captured: kernels are compiled and workspaces allocated.
_WARM_UP = 2


class Runnable(Protocol):
    """What is run: a step that changes tensors in place, and the state that it changes."""

    model: Any
    state: Any
    slots: Any
    device: torch.device

    def step(self) -> None:
        """Run it."""
        ...


class StepRunner:
    """Calls ``engine.step()``, or replays what it did where that can be captured.

    That is so on a CUDA device for a model with ``decodes_on_static_shapes``. The graph holds for
    the tensors that it was captured with; when the room doubles, or places go, another is made.
    """

    def __init__(self, engine: Runnable) -> None:
        self._engine = engine
        self._captures = engine.device.type == "cuda" and bool(
            getattr(engine.model, "decodes_on_static_shapes", False)
        )
        self._graph: Any = None
        self._addresses: list[tuple[int, torch.Size]] = []
        self._warm = 0

    def begin(self, capacity: int) -> None:
        """The batch has changed: places were taken or given up, or there is room for more steps."""
        if not self._captures:
            return
        model = self._engine.model
        if model.max_length is not None:
            capacity = min(capacity, model.max_length)
        self._engine.state = model.reserve(self._engine.state, capacity)
        if self._graph is not None and self._addresses == list(_addresses(self._engine)):
            return
        self._graph, self._warm = None, 0

    def run(self) -> None:
        """One step."""
        if self._graph is not None:
            self._graph.replay()
            return
        if not self._captures or self._warm < _WARM_UP:
            self._warm += 1
            self._engine.step()
            return
        self._graph = self._capture()
        self._addresses = list(_addresses(self._engine))
        self._graph.replay()

    def _capture(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._engine.step()
        return graph


def _addresses(engine: Runnable) -> Iterator[tuple[int, torch.Size]]:
    """Where the tensors are that a step reads and changes, and their shapes."""
    for holder in (engine.slots, engine.state):
        yield from _tensors(holder)


def _tensors(value: Any) -> Iterator[tuple[int, torch.Size]]:
    if isinstance(value, Tensor):
        yield value.data_ptr(), value.shape
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
