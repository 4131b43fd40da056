"""Processes that may fail, hang or crash, and what is kept of them: rows, a log, an error.

:func:`run` is for one command. A :class:`Pool` gives tasks to workers (`benchmarks.gpu.worker`),
which do one after another, since a process takes seconds to begin; one that dies of a task, or
takes too long for it, is replaced, and the next task goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..results import ROOT, Row

ERROR_LINES = 40
"""Enough of a traceback to act on, when the machine is gone."""
ERROR_CHARACTERS = 4000
START_SECONDS = 90.0
"""For a worker to import torch and begin."""
_LINE_CHARACTERS = 2000
_FAILED_STARTS = 2
_EXIT_SECONDS = 5.0
_END_SECONDS = 10.0

Task = dict[str, Any]
"""What a worker is told in a line of JSON; ``kind`` names what to do."""


class Log:
    """One file of text for what all processes print; of a stage that prints much, both ends."""

    def __init__(self, path: Path, head_bytes: int = 1 << 20, tail_bytes: int = 1 << 18) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # That of an earlier run into this file goes on, unless it has grown large.
        long = path.exists() and path.stat().st_size > 2 * head_bytes
        self._file = path.open("w" if long else "a", encoding="utf-8", errors="replace")
        self._lock = threading.Lock()
        self._head_bytes, self._tail_bytes = head_bytes, tail_bytes
        self.path = path
        self.begin("")

    def begin(self, stage: str) -> None:
        """What follows is of this stage."""
        self._left = self._head_bytes
        self._tail: deque[str] = deque()
        self._held = self._dropped = 0
        if stage:
            self._file.write(f"\n=== {stage}\n")

    def write(self, label: str, line: str) -> None:
        """A line of a process."""
        text = f"{label}| {line.rstrip()[:_LINE_CHARACTERS]}\n" if label else f"{line.rstrip()}\n"
        with self._lock:
            self._left -= len(text)
            if self._left >= 0:
                self._file.write(text)
                self._file.flush()
                return
            self._tail.append(text)
            self._held += len(text)
            while self._held > self._tail_bytes:
                self._held -= len(self._tail.popleft())
                self._dropped += 1

    def end(self) -> None:
        """Write what was held back of the stage."""
        with self._lock:
            if self._dropped:
                self._file.write(f"... {self._dropped} lines left out ...\n")
            self._file.writelines(self._tail)
            self._file.flush()
        self.begin("")

    def close(self) -> None:
        """Close the file."""
        self.end()
        self._file.close()


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    status: str
    """``passed``, ``failed`` or ``timed out``."""
    exit_code: int | None
    """Negative: the signal that ended it. None: ended for taking too long."""
    seconds: float
    last_line: str
    """Of what it printed, apart from rows."""
    error: str
    """The end of what it printed, where it did not pass."""


_LIVE: set[subprocess.Popen[str]] = set()


def end_all() -> None:
    """End every process that still runs: they are in sessions of their own and would outlive us."""
    for process in list(_LIVE):
        _end(process)


def side_by_side(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    """The function's results, each from a thread of its own.

    The threads do not keep a process alive that is told to end.

    Raises:
        BaseException: What the first of them raised.
    """
    results: dict[int, Any] = {}
    mistakes: list[BaseException] = []

    def serve(i: int) -> None:
        try:
            results[i] = function(values[i])
        except BaseException as mistake:
            mistakes.append(mistake)

    threads = [threading.Thread(target=serve, args=(i,), daemon=True) for i in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if mistakes:
        raise mistakes[0]
    return [results[i] for i in range(len(values))]


def as_row(line: str) -> Row | None:
    """A line that is a JSON object with a suite; None for any other."""
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "suite" in row else None


def run(
    command: Sequence[str],
    seconds: float,
    log: Log,
    label: str,
    on_row: Callable[[Row], None] = lambda row: None,
    on_line: Callable[[str], None] = lambda line: None,
    environment: Mapping[str, str] | None = None,
) -> Ending:
    """Run a command for at most so many seconds.

    Args:
        command: Its arguments.
        seconds: Then it is ended, and so are its children.
        log: Receives its lines.
        label: What its lines in the log begin with.
        on_row: Receives rows: lines of its standard output that are JSON objects with a suite.
        on_line: Receives every other line.
        environment: Variables beside our own.
    """
    last: deque[str] = deque(maxlen=ERROR_LINES)
    started = time.monotonic()
    try:
        process = _start(command, environment)
    except OSError as error:
        return Ending("failed", None, 0.0, str(error), str(error))

    def read(lines: IO[str]) -> None:
        for line in lines:
            row = as_row(line)
            if row is not None:
                on_row(row)
                continue
            log.write(label, line)
            if line.strip():
                last.append(line.rstrip()[:_LINE_CHARACTERS])
            on_line(line)

    assert process.stdin is not None
    process.stdin.close()
    readers = _readers(process, read, read)
    try:
        code: int | None = process.wait(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        # The whole group: a compiler's workers, too, must not slow down what comes next.
        _end(process)
    for reader in readers:
        reader.join(timeout=5)
    status = "timed out" if code is None else "passed" if code == 0 else "failed"
    text = "" if status == "passed" else tail("\n".join(last))
    return Ending(status, code, time.monotonic() - started, last[-1] if last else "", text)


def tail(text: str) -> str:
    """The end of a text, as a row keeps it."""
    return text[-ERROR_CHARACTERS:]


@dataclass(frozen=True)
class Failure:
    """What became of a task whose worker did not finish it."""

    at: str
    """What the worker was at, as it announced; empty if it did not say."""
    error: str
    """The end of what it printed."""
    took_too_long: bool = False


class Worker:
    """A process that does tasks; see `benchmarks.gpu.worker`."""

    def __init__(
        self, command: Sequence[str], log: Log, label: str, environment: Mapping[str, str]
    ) -> None:
        self._process = _start(command, environment)
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._last: deque[str] = deque(maxlen=ERROR_LINES)
        self._log, self._label = log, label
        self._readers = _readers(self._process, self._read_messages, self._read_lines)
        self.exhausted = False
        """Whether it has said that it can do no more."""

    def wait_until_ready(self, seconds: float) -> bool:
        """Whether it has begun within its time."""
        try:
            return self._messages.get(timeout=max(seconds, 0.0)) is not None
        except queue.Empty:
            return False

    def do(self, task: Task, seconds: float, on_row: Callable[[Row], None]) -> Failure | None:
        """Have a task done, and hand over its rows; None when it was finished."""
        self._last.clear()
        at, reason, took_too_long = "", "", False
        deadline = time.monotonic() + seconds
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            while True:
                message = self._messages.get(timeout=max(deadline - time.monotonic(), 0.0))
                if message is None:
                    break
                if "row" in message:
                    on_row(message["row"])
                elif "at" in message:
                    at = message["at"]
                else:
                    self.exhausted = message["exhausted"]
                    return None
        except queue.Empty:
            took_too_long = True
            # Where it hangs is told by faulthandler.
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
            reason = f"not done within {seconds:.0f} s"
        except OSError as error:
            reason = str(error)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):  # for its exit code
                self._process.wait(timeout=_EXIT_SECONDS)
        self.end()
        reason = reason or f"the process ended with {_how(self._process.returncode)}"
        return Failure(at, tail("\n".join([*self._last, reason])), took_too_long)

    def end(self) -> None:
        """End it."""
        _end(self._process)
        for reader in self._readers:
            reader.join(timeout=5)

    def last_lines(self) -> str:
        """The end of what it printed."""
        return tail("\n".join(self._last))

    def _read_messages(self, lines: IO[str]) -> None:
        for line in lines:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                self._note(line)
                continue
            self._messages.put(message)
        self._messages.put(None)

    def _read_lines(self, lines: IO[str]) -> None:
        for line in lines:
            self._note(line)

    def _note(self, line: str) -> None:
        self._log.write(self._label, line)
        if line.strip():
            self._last.append(line.rstrip()[:_LINE_CHARACTERS])


class Pool:
    """Workers that share tasks until these, or the time, are at an end."""

    def __init__(
        self,
        command: Sequence[str],
        log: Log,
        label: str,
        task_seconds: float,
        on_row: Callable[[Row], None],
        on_failure: Callable[[Task, Failure], Task | None],
        before: Callable[[Task], Task | None] = lambda task: task,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare; :meth:`work` begins.

        Args:
            command: Starts a worker.
            log: Receives what workers print.
            label: What their lines in the log begin with.
            task_seconds: Limit of a task.
            on_row: Receives their rows, a thread at a time.
            on_failure: Is told of a task that was not finished; returns what to try instead.
            before: Is shown a task before it begins; returns it, perhaps changed, or None to
                leave it out.
            environment: Variables of the workers beside our own.
        """
        self._command, self._log, self._label = command, log, label
        self._task_seconds = task_seconds
        self._on_row, self._on_failure, self._before = on_row, on_failure, before
        self._environment = environment or {}
        self._lock = threading.Lock()
        self._tasks: deque[Task] = deque()
        self._unfinished = self._failed_starts = 0
        self.start_error = ""
        """Why workers did not begin, where they did not."""

    def work(self, tasks: Iterable[Task], count: int, deadline: float) -> int:
        """Have the tasks done by ``count`` workers.

        Args:
            tasks: Most valuable first.
            count: Processes at a time.
            deadline: On the clock of ``time.monotonic``; a task in flight then is given up.

        Returns:
            How many tasks were neither finished nor failed.
        """
        self._tasks = deque(tasks)
        self._unfinished = 0
        count = min(count, len(self._tasks))
        side_by_side(lambda number: self._serve(number, deadline), range(count))
        return len(self._tasks) + self._unfinished

    def _serve(self, number: int, deadline: float) -> None:
        worker: Worker | None = None
        label = f"{self._label} {number}"
        try:
            while time.monotonic() < deadline:
                task = self._next()
                if task is None:
                    return
                if worker is None:
                    worker = self._begin(label, deadline)
                if worker is None:
                    self._put_back(task)
                    return
                left = deadline - time.monotonic()
                failure = worker.do(task, min(self._task_seconds, left), self._emit)
                if failure is None:
                    if worker.exhausted:
                        worker.end()
                        worker = None
                    continue
                worker = None
                if left < self._task_seconds and time.monotonic() >= deadline:
                    with self._lock:
                        self._unfinished += 1
                    return
                with self._lock:
                    again = self._on_failure(task, failure)
                    if again is not None:
                        self._tasks.appendleft(again)
        finally:
            if worker is not None:
                worker.end()

    def _begin(self, label: str, deadline: float) -> Worker | None:
        while time.monotonic() < deadline and self._failed_starts < _FAILED_STARTS:
            worker = Worker(self._command, self._log, label, self._environment)
            left = deadline - time.monotonic()
            if worker.wait_until_ready(min(START_SECONDS, left)):
                return worker
            worker.end()
            if time.monotonic() < deadline:
                with self._lock:
                    self._failed_starts += 1
                    self.start_error = worker.last_lines() or "a worker did not begin"
        return None

    def _next(self) -> Task | None:
        with self._lock:
            while self._tasks:
                task = self._before(self._tasks.popleft())
                if task is not None:
                    return task
        return None

    def _put_back(self, task: Task) -> None:
        with self._lock:
            self._tasks.appendleft(task)

    def _emit(self, row: Row) -> None:
        with self._lock:
            self._on_row(row)


def _start(command: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _LIVE.add(process)
    return process


def _readers(
    process: subprocess.Popen[str],
    read_output: Callable[[IO[str]], None],
    read_errors: Callable[[IO[str]], None],
) -> list[threading.Thread]:
    assert process.stdout is not None
    assert process.stderr is not None
    threads = [
        threading.Thread(target=read_output, args=(process.stdout,), daemon=True),
        threading.Thread(target=read_errors, args=(process.stderr,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    return threads


def _end(process: subprocess.Popen[str]) -> None:
    # Its session, not its group: ninja gives each compiler a group of its own. A process that a
    # driver does not let go cannot be waited for.
    deadline = time.monotonic() + _END_SECONDS
    while (members := _session_members(process.pid)) and time.monotonic() < deadline:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    _LIVE.discard(process)


def _session_members(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name in parentheses: state, parent, group, session.
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # has ended
            continue
        if int(of) == session and state not in "ZX":
            members.append(int(path.parent.name))
    return members


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
