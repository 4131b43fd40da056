"""A case of a model: its providers are prepared, compared in what they find, and timed in turns.

Whatever goes wrong with one of them is a row: the others, and the next case, go on.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..results import Row
from ..timing import Times, interleaved, peak_bytes, ratio, summary, times_row
from .counting import launches

OURS = "fused_attn"
OURS_EAGER = "fused_attn_eager"
"""On a GPU: our search without its CUDA graph."""
NO_TIME = "no time left"
"""Why a case that was not begun is absent."""
SEARCH_ROUNDS = {"cuda": 3, "cpu": 5}
"""On a GPU a search of a peer's is most of a second of the host's, and the GPU is lent."""
# Seconds that a turn lasts at least, by repeating the call: on a GPU a step takes milliseconds.
_TURN_SECONDS = {"cuda": 0.2, "cpu": 0.0}
# Enough of a traceback to act on, when the machine is gone.
ERROR_CHARACTERS = 3000


class AbsentError(Exception):
    """A provider that is not here, or has nothing to offer for the case."""


class DisagreementError(Exception):
    """A provider finds something else than ours, so its time would mean nothing."""


@dataclass(frozen=True)
class Provider:
    """One side of a comparison."""

    call: Callable[[], object]
    """What is timed. On a GPU it may return before the device is done."""
    outcome: Any
    """What it finds, to be compared with what ours finds."""


@dataclass(frozen=True)
class ModelCase:
    """What is measured together."""

    group: str
    """What ``--only`` names."""
    rank: int
    """Of its value: 0 first."""
    model: str
    task: str
    name: str
    dtype: str
    shape: str
    """The model and its input in words."""
    tokens: int
    """Of targets, in a call."""
    providers: tuple[str, ...]
    """Ours first."""
    prepare: Callable[[str], Provider]
    """Makes a provider; raises :class:`AbsentError`."""
    compare: Callable[[Any, Any], Row]
    """From outcomes of ours and of another to what is said of it; raises
    :class:`DisagreementError`."""
    counts: bool = True
    """Whether launches are worth counting, which on a GPU takes seconds, and memory on a CPU."""
    shows_ours: bool = True
    """False where another case has the row of ours."""
    rounds: int = 5
    """Turns of each provider, where nobody says."""
    needs_seconds: float = 0.0
    """With less time left the case is not begun."""

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.model} {self.task} {self.name} {self.dtype}"

    def row(self, provider: str, **fields: Any) -> Row:
        """A row of this case."""
        return {
            "suite": "models",
            "model": self.model,
            "task": self.task,
            "case": self.name,
            "dtype": self.dtype,
            "provider": provider,
            **fields,
        }

    def shown(self) -> tuple[str, ...]:
        """The providers that have a row."""
        return self.providers if self.shows_ours else self.providers[1:]


def rows_of(case: ModelCase, device: str, rounds: int) -> Iterator[Row]:
    """One row a provider, as soon as it is known."""
    try:
        yield from _compare(case, device, rounds)
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _compare(case: ModelCase, device: str, rounds: int) -> Iterator[Row]:
    calls: dict[str, Callable[[], object]] = {}
    said: dict[str, Row] = {}
    outcome: Any = None
    for name in case.providers:
        try:
            provider = case.prepare(name)
            said[name] = {}
            if name == OURS:
                outcome = provider.outcome
            elif outcome is not None:
                said[name] = case.compare(outcome, provider.outcome)
            calls[name] = synchronized(provider.call, device)
        except AbsentError as reason:
            yield from _if_shown(case, name, absent=str(reason))
        except DisagreementError as error:
            yield from _if_shown(case, name, failed=str(error), disagrees=True)
        except Exception:
            yield from _if_shown(case, name, failed=_error())
    if not any(name in calls for name in case.shown()):
        return
    try:
        times = interleaved(calls, rounds, seconds=_TURN_SECONDS[device])
    except Exception:
        for name in calls:
            yield from _if_shown(case, name, failed=_error())
        return
    rows = {name: _timed(case, name, times, said[name]) for name in calls}
    if device == "cuda" and case.counts:
        # A profiler may end the process; a later row replaces these.
        yield from (row for name, row in rows.items() if name in case.shown())
    for name, row in rows.items():
        if name in case.shown():
            yield row | _counted(case, name, calls[name], device)


def _timed(case: ModelCase, name: str, times: dict[str, Times], said: Row) -> Row:
    fields: Row = {
        **times_row(times[name].seconds),
        "tokens_per_s": case.tokens / summary(times[name].seconds).median,
        "shape": case.shape,
        **said,
    }
    if OURS in times and name != OURS:
        r = ratio(times[name].seconds, times[OURS].seconds)
        fields["ratio"] = [r.q25, r.median, r.q75]
    return case.row(name, **fields)


def _counted(case: ModelCase, name: str, call: Callable[[], object], device: str) -> Row:
    """Memory and launches; a profiler that fails takes no time away."""
    found: Row = {}
    if name == "ctranslate2" or not (case.counts or device == "cuda"):
        return found  # torch sees nothing of the former
    try:
        found["peak_bytes"] = peak_bytes(call, device)
        # Of compiled code on a CPU, kernels are no operators.
        if case.counts and not (name == "torch_compile" and device == "cpu"):
            found |= launches(call, device)
    except Exception:
        found["uncounted"] = _error()
    return found


def is_ready(device: str) -> bool:
    """Whether the device is here; on a GPU, fp32 is then fp32 on all sides."""
    if device == "cpu":
        return True
    if not torch.cuda.is_available():
        return False
    # By default PyTorch's recurrent layers round to TF32, and its products do not.
    torch.backends.cudnn.allow_tf32 = False
    return True


class WithoutGraph:
    """A decoder whose steps are not captured in a CUDA graph.

    Args:
        model: A decoder; see ``fused_attn.generation.Decoder``.
    """

    decodes_on_static_shapes = False

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def synchronized(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call and the device's work for it: the clock of the host then measures both."""
    if device == "cpu":
        return call

    def run() -> object:
        result = call()
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        return result

    return run


def sentences_agree(ours: list[list[int]], theirs: list[list[int]], exact: bool) -> Row:
    """The share of equal tokens at equal places.

    Args:
        ours: Tokens of each sentence.
        theirs: Likewise.
        exact: Whether they must be equal, as in fp32. Rounding may decide between candidates that
            are as good as equal, so that of every 64 sentences one may differ.

    Raises:
        DisagreementError: They must be and are not.
    """
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=False)]
    share = sum(a == b for a, b in pairs) / max(1, sum(map(len, ours)))
    different = sum(x != y for x, y in zip(ours, theirs, strict=True))
    if exact and different > len(ours) // 64:
        raise DisagreementError(
            f"{different} of {len(ours)} sentences differ ({share:.1%} of the tokens are equal), "
            "so it is not timed"
        )
    return {"agreement": share}


def same_loss(ours: float, theirs: float) -> Row:
    """Both losses, which must be the same.

    Raises:
        DisagreementError: They are not.
    """
    if not abs(ours - theirs) <= 1e-4 * abs(ours):
        raise DisagreementError(f"the models find different losses, {ours} and {theirs}: not timed")
    return {"loss": theirs}


def _if_shown(case: ModelCase, name: str, **fields: Any) -> Iterator[Row]:
    if name in case.shown():
        yield case.row(name, **fields)


def _error() -> str:
    return traceback.format_exc(limit=-4)[-ERROR_CHARACTERS:]
