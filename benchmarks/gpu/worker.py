"""``python -m benchmarks.gpu.worker``: does tasks for `benchmarks.gpu`, one after another.

A task is a line of standard input, a JSON object whose ``kind`` is a name of :data:`KINDS`. A line
of standard output is a message: ``ready`` when the process has begun, ``at`` with what it is at,
``row`` with a row of results, ``exhausted`` when a task is done, with whether the process can do no
more. The process takes seconds to begin, so it does many tasks; when it dies, its parent knows of
what.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_attn.ops._cases import Case
from fused_attn.validation import case_inputs, check, op_cases, run_case

from .. import operators
from ..peers import peers_of
from ..roofs import from_row, measure_roof, to_row

Send = Callable[[dict[str, Any]], None]


def _validate(task: dict[str, Any], device: str, send: Send) -> bool:
    case, dtype = _case(task), getattr(torch, task["dtype"])
    found = check(case.op, task["backend"], case, dtype, device)
    send({"row": {"suite": "validate", **found.as_json()}})
    _require_gpu(device)
    return False


def _prepare(task: dict[str, Any], device: str, send: Send) -> bool:
    """Check a benchmark case and its peers, and have compiled what is compiled."""
    case, dtype = _case(task), getattr(torch, task["dtype"])
    operators.check(
        case,
        dtype,
        device,
        announce=lambda name: send({"at": name}),
        emit=lambda row: send({"row": row}),
        only=_names(task, device),
    )
    # Others need the memory: several of these processes share the GPU.
    operators.forget()
    if device == "cuda":
        torch.cuda.empty_cache()
    return False


def _time(task: dict[str, Any], device: str, send: Send) -> bool:
    case, dtype = _case(task), getattr(torch, task["dtype"])
    try:
        rows = operators.measure(
            case,
            dtype,
            task["direction"],
            device,
            from_row(task["roof"]),
            task["rounds"],
            only=_names(task, device),
            checked=task["checked"],
            announce=lambda name: send({"at": name}),
        )
    except operators.LostProcessError as error:
        for row in error.rows:
            send({"row": row})
        raise
    for row in rows:
        send({"row": row})
    _require_gpu(device)
    # A capture that failed leaves the allocator of the process in no state to be relied upon.
    return any("graph_error" in row for row in rows)


def _roof(task: dict[str, Any], device: str, send: Send) -> bool:
    send({"row": to_row(measure_roof(device))})
    return False


def _run(task: dict[str, Any], device: str, send: Send) -> bool:
    """A call and its gradients, for a tool that watches."""
    case, dtype = _case(task), getattr(torch, task["dtype"])
    run_case(case, case_inputs(case, dtype, device), task["backend"])
    torch.cuda.synchronize()
    print(f"ran {case.op} {task['backend']} {case.name} {task['dtype']}", file=sys.stderr)
    return False


def _require_gpu(device: str) -> None:
    """End the process where a failure has made the GPU useless to it: its parent counts that."""
    if operators.is_lost(device):
        raise RuntimeError("the GPU refuses this process any further work")


KINDS: dict[str, Callable[[dict[str, Any], str, Send], bool]] = {
    "validate": _validate,
    "prepare": _prepare,
    "time": _time,
    "roof": _roof,
    "run": _run,
}
"""What can be done; the result says whether the process can do no more."""


def _names(task: dict[str, Any], device: str) -> list[str]:
    """The providers that take part."""
    names = [*operators.our_providers(task["op"], device), *peers_of(task["op"], device)]
    return [name for name in names if name not in task["without"]]


def _case(task: dict[str, Any]) -> Case:
    return next(case for case in op_cases(task["op"]) if case.name == task["case"])


def main(argv: Sequence[str] | None = None) -> int:
    """Do tasks until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tasks", help="a JSON list to do, in place of standard input")
    parser.add_argument("--memory", type=float, default=1.0, help="of the GPU's, what it may have")
    arguments = parser.parse_args(argv)
    # A parent asks by the first where a task hangs; the others tell where it crashes.
    faulthandler.register(signal.SIGUSR1)
    faulthandler.enable()
    # Messages have the standard output to themselves: what anybody prints goes to the log.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    if arguments.device == "cuda" and arguments.memory < 1.0:
        torch.cuda.set_per_process_memory_fraction(arguments.memory)
    send({"ready": True})
    tasks = json.loads(arguments.tasks) if arguments.tasks else map(json.loads, sys.stdin)
    for task in tasks:
        exhausted = KINDS[task["kind"]](task, arguments.device, send)
        send({"exhausted": exhausted})
        if exhausted:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
