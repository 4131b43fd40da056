"""Backend names, what is available here, and the choice for one call.

Every op module lists its backends in a dictionary from name to module. A backend module has
``unsupported_reasons(...)``, which takes the call's tensors and flags and returns sentences; it
looks at device, dtype, head size or width, flags and the need of a gradient, never at batch or
length, so that dynamic shapes add no guards. Importing a backend module loads nothing; Triton
and the compiled library load in functions.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from torch import Tensor

from fused_attn import _extension

from ._fastest import fastest

BACKENDS = ("cpu", "cuda", "triton", "reference")

# Tried in this order when the caller names none; `reference` is the last resort.
_PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}


def _constant_under_compile(function: Callable[..., str]) -> Callable[..., str]:
    """Let torch.compile take the function's result as a constant instead of tracing it.

    This is ``torch.compiler.assume_constant_result`` without its import of the compiler, which
    would double the time that ``import fused_attn`` takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_under_compile
def unavailable_reason(backend: str, device_type: str) -> str:
    """Why the backend cannot run on this device type in this installation; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        if device_type != "cpu":
            return f"runs on cpu tensors only, got {device_type}"
        return _extension.load() or ""
    if backend == "cuda":
        if device_type == "cpu":
            return _extension.load_cuda_host() or ""
        if device_type != "cuda":
            return f"runs on cuda tensors only, got {device_type}"
        return _extension.load() or _extension.cuda_unavailable_reason()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'fused_attn[triton]'"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on GPU tensors (on cpu tensors only under TRITON_INTERPRET=1)"
        return ""
    raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")


def substitute(backend: str, device_type: str) -> str:
    """What stands in for the GPU where a GPU backend runs on this device type; empty for none."""
    if device_type != "cpu":
        return ""
    return {"cuda": "executed on the host", "triton": "interpreted"}.get(backend, "")


@_constant_under_compile
def _requested(backend: str | None) -> str:
    return backend or os.environ.get("FUSED_ATTN_BACKEND") or ""


def resolve(
    op: str,
    backends: Mapping[str, ModuleType],
    backend: str | None,
    tensor: Tensor,
    reasons: Callable[[ModuleType], Sequence[str]],
    describe: Callable[[], str],
) -> str:
    """Name of the backend that runs this call.

    Args:
        op: Name of the op, for messages.
        backends: The op's backend modules by name.
        backend: The caller's choice. None takes ``FUSED_ATTN_BACKEND`` if that is set, else the
            first backend in the device's order that can run the call, beginning with the fastest
            where that was measured. A named one never falls back.
        tensor: The call's first tensor: its device, dtype and last dimension decide.
        reasons: Calls a backend module's ``unsupported_reasons`` with this call's arguments.
        describe: The call in a line, for messages.

    Raises:
        ValueError: There is no backend of that name.
        NotImplementedError: The named backend cannot run this call.
    """
    name = _requested(backend)
    device_type = tensor.device.type
    if name == "":
        order = _PREFERENCE.get(device_type, ())
        if device_type == "cuda" and (measured := fastest(op, tensor)):
            order = (measured, *order)
        for candidate in order:
            if (
                candidate in backends
                and unavailable_reason(candidate, device_type) == ""
                and not reasons(backends[candidate])
            ):
                return candidate
        return "reference"
    if name not in backends:
        raise ValueError(
            f"{op}: unknown backend {name!r}, expected one of {', '.join(sorted(backends))}"
        )
    unavailable = unavailable_reason(name, device_type)
    why = [unavailable] if unavailable != "" else list(reasons(backends[name]))
    if why:
        usable = [
            other
            for other in backends
            if unavailable_reason(other, device_type) == "" and not reasons(backends[other])
        ]
        lines = [f"{op}: backend {name!r} cannot run this call:", f"  {describe()}"]
        lines += [f"  - {reason}" for reason in why]
        lines.append(f"  available here: {', '.join(usable)}")
        raise NotImplementedError("\n".join(lines))
    return name


def describe_tensor(name: str, tensor: Tensor) -> str:
    """``query [2, 8, 128, 320] bfloat16 cuda:0``, as error messages show a tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {list(tensor.shape)} {dtype} {tensor.device}"
