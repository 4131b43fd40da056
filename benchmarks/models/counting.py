"""What a call launches, which does not depend on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that make a tensor without computing what is in it, or only look at one.
# fmt: off
_FREE = frozenset({
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand",
    "flatten", "is_same_size", "narrow", "lift_fresh", "new_empty", "new_empty_strided",
    "permute", "reshape", "select", "slice", "split", "split_with_sizes", "t", "squeeze",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "_local_scalar_dense",
    "_reshape_alias", "_unsafe_view",
})
# fmt: on
_HOST_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")


class CountOperators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        self.count += name not in _FREE
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object], device: str) -> dict[str, int]:
    """``launches``: kernels that a call runs; on a CPU, its operators that compute something.

    On a GPU also ``host_launches``: how often the host launches a kernel or a whole graph of them.
    """
    if device == "cpu":
        with CountOperators() as operators:
            call()
        return {"launches": operators.count}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = list(profile.events())
    kernels = [
        e.name
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    host = [e.name for e in events if e.name.startswith(_HOST_LAUNCHES)]
    return {
        "launches": sum(not name.startswith(("Memcpy", "Memset")) for name in kernels),
        "host_launches": len(host),
    }
