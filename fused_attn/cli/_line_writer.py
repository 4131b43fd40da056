"""Lines that are written as they come, of which Ctrl-C finds none half written."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

from fused_attn.training.errors import InputError


class LineWriter:
    """A file or standard output, to which lines are written one by one, each at once.

    A file is written beside its place, as ``.NAME.partial``, and put there by ``finish``. While
    the writer is open, Ctrl-C interrupts whatever runs but a write, after which it takes effect:
    what was written are whole lines, and ``count`` says how many times ``write`` was called.

    Args:
        path: The file, or ``-`` for standard output.

    Raises:
        InputError: The file cannot be written; so says ``write``.
    """

    def __init__(self, path: str) -> None:
        self.count = 0
        self._path = path
        self._partial: Path | None = None
        self._is_writing = False
        self._was_interrupted = False
        self._handles_interrupts = False
        if path == "-":
            self._file = sys.stdout.buffer
            return
        self._target = Path(path).resolve()
        place = self._target
        # What is no file, such as a terminal or /dev/null, is written and not replaced.
        if place.is_file() or not place.exists():
            place = self._partial = place.with_name(f".{place.name}.partial")
        try:
            self._file = place.open("wb")
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> LineWriter:
        # A process that ignores Ctrl-C, as one in the background does, goes on ignoring it.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._interrupt)
            self._handles_interrupts = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handles_interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._path != "-":
            self._file.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def write(self, text: str) -> None:
        """Write whole lines, their ends included.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile.
            BrokenPipeError: Whoever reads standard output has closed it.
        """
        self._is_writing = True
        try:
            self._file.write(text.encode())
            self._file.flush()
            self.count += 1
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._cannot_write(error) from error
        finally:
            self._is_writing = False
        if self._was_interrupted:
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Put the file in its place, with the lines that it has. Ctrl-C does not matter any more.

        Raises:
            InputError: That cannot be done.
        """
        if self._handles_interrupts:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._partial is None:
            return
        try:
            self._file.close()
            self._partial.replace(self._target)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._partial = None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # A second time it interrupts a write too: it may wait for a reader that never reads.
        was_interrupted, self._was_interrupted = self._was_interrupted, True
        if was_interrupted or not self._is_writing:
            raise KeyboardInterrupt

    def _cannot_write(self, error: OSError) -> InputError:
        name = "<stdout>" if self._path == "-" else self._path
        return InputError(f"{name}: cannot write: {error.strerror}")
