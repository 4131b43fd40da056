"""Lines as they arrive: read in a thread of their own, so that nobody waits for more of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any, Protocol


class Arrivals(Protocol):
    """Lines that are there, and those to come."""

    count: int
    """How many have been taken."""
    have_ended: bool
    """Whether all have been taken."""
    error: Exception | None
    """What reading has ended with."""

    def take(self, most: int, *, wait: bool) -> list[Any]:
        """The next lines: those that are there, and at least one if that is to be waited for.

        Args:
            most: No more than that many.
            wait: Wait until there is a line, or none will come. Only after the last is the list
                then empty.
        """

    def close(self) -> None:
        """Read no more."""


def arrivals(lines: Iterable[Any], size: int) -> Arrivals:
    """Lines of a sequence, all of which are there, or of what yields them in its own time.

    Args:
        lines: The lines.
        size: How many may be read and not taken.
    """
    return _Present(lines) if isinstance(lines, Sequence) else _Reader(lines, size)


class _Present:
    def __init__(self, lines: Sequence[Any]) -> None:
        self._lines = lines
        self.error: Exception | None = None
        self.count = 0
        self.have_ended = not lines

    def take(self, most: int, *, wait: bool) -> list[Any]:
        taken = list(self._lines[self.count : self.count + most])
        self.count += len(taken)
        self.have_ended = self.count == len(self._lines)
        return taken

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _End:
    error: Exception | None


class _Reader:
    def __init__(self, lines: Iterable[Any], size: int) -> None:
        self._queue: Queue[Any] = Queue(size)
        self._lines = lines
        self.error: Exception | None = None
        self._is_closed = False
        self.count = 0
        self.have_ended = False
        # A daemon, since nothing can stop it while it waits for a line.
        threading.Thread(target=self._read, name="lines", daemon=True).start()

    def _read(self) -> None:
        try:
            for line in self._lines:
                self._queue.put(line)
                if self._is_closed:
                    return
        except Exception as error:
            self._queue.put(_End(error))
        else:
            self._queue.put(_End(None))

    def take(self, most: int, *, wait: bool) -> list[Any]:
        taken: list[Any] = []
        while len(taken) < most and not self.have_ended:
            try:
                item = self._queue.get(block=wait and not taken)
            except Empty:
                break
            if isinstance(item, _End):
                self.have_ended, self.error = True, item.error
            else:
                taken.append(item)
        self.count += len(taken)
        return taken

    def close(self) -> None:
        self._is_closed = True
        # The thread may wait for room.
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                break
