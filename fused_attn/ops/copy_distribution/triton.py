"""The ``triton`` backend: launchers. The kernels are in ``triton_kernels.py``, loaded on use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import FLOATING
from .._triton import (
    ceil_div,
    contiguous,
    device_guard,
    next_power_of_2,
    rows_of,
    strided_rows,
    target,
)

# Words that a program takes; where a row's sum is cut depends on the row alone.
_CHUNK = 4096
_THREADS = 128
# Words at a time, and threads, of a program that goes through a row.
_ROW_CHUNK = 4096
_ROW_THREADS = 256
# Positions at a time, of which every two are compared.
_MIN_POSITIONS = 16
_MAX_POSITIONS = 64


def unsupported_reasons(logits: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    reasons = []
    if logits.dtype not in FLOATING:
        reasons.append(f"dtype {logits.dtype}: float32, float16 or bfloat16 only")
    return reasons


class _Call:
    """What all kernels are told of a call."""

    def __init__(
        self,
        logits: Tensor,
        copy: Tensor,
        source_tokens: Tensor,
        gate: Tensor | None,
        source_lengths: Tensor | None,
        targets: Tensor | None,
    ) -> None:
        rows = rows_of(logits)
        (self.logits,) = rows.tensors
        self.logits_numbers = rows.numbers
        self.unit = rows.flags["STRIDE_UNIT"]
        self.tokens, layout = strided_rows(source_tokens.expand(copy.shape))
        self.copy = copy.contiguous()
        self.gate = contiguous(gate)
        self.lengths = contiguous(source_lengths)
        self.targets = contiguous(targets)
        self.rows = logits.shape[:-1].numel()
        self.vocabulary = logits.size(-1)
        self.width_unit = _unit(self.vocabulary)
        self.positions = copy.size(-1)
        self.source = (self.copy, self.tokens, self.gate, self.lengths)
        self.source_numbers = (
            *layout,
            self.rows // max(logits.size(0), 1),
            self.positions,
        )
        self.flags: dict[str, Any] = {
            "HAS_GATE": gate is not None,
            "HAS_LENGTHS": source_lengths is not None,
            "STRIDE_UNIT": self.unit,
            "BLOCK_S": min(max(next_power_of_2(self.positions), _MIN_POSITIONS), _MAX_POSITIONS),
        }


def _unit(size: int) -> int:
    """What rows of this size begin at multiples of, in elements; at most 16."""
    return min(size & -size, 16)


def _warps(threads: int) -> int:
    return threads // target().warp_size


def forward(
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    extended_size: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, or with targets their negative log-probabilities, and lse."""
    from .triton_kernels import copied_words_kernel, log_probs_kernel, nll_kernel, scan_kernel

    shape = logits.shape[:-1]
    lse = logits.new_empty(shape, dtype=torch.float32)
    output = logits.new_empty(
        (*shape, extended_size) if targets is None else shape, dtype=torch.float32
    )
    if lse.numel() == 0:
        return output, lse
    call = _Call(logits, copy, source_tokens, gate, source_lengths, targets)
    chunks = ceil_div(call.vocabulary, _CHUNK)
    sums = lse.new_empty((call.rows, 2, chunks))
    warps = _warps(_THREADS)
    with device_guard(logits):
        scan_kernel[(call.rows, chunks)](
            call.logits,
            call.targets,
            sums,
            *call.logits_numbers,
            call.vocabulary // call.width_unit,
            ignore_index,
            chunks,
            HAS_TARGETS=targets is not None,
            STRIDE_UNIT=call.unit,
            WIDTH_UNIT=call.width_unit,
            CHUNK=_CHUNK,
            num_warps=warps,
        )
        if targets is not None:
            nll_kernel[(call.rows,)](
                call.logits,
                *call.source,
                call.targets,
                sums,
                output,
                lse,
                *call.logits_numbers,
                *call.source_numbers,
                call.vocabulary,
                ignore_index,
                chunks,
                **call.flags,
                CHUNKS=next_power_of_2(chunks),
                num_warps=1,
            )
            return output, lse
        unit = _unit(extended_size)
        log_probs_kernel[(call.rows, ceil_div(extended_size, _CHUNK))](
            call.logits,
            *call.source,
            sums,
            output,
            lse,
            *call.logits_numbers,
            *call.source_numbers,
            call.vocabulary // call.width_unit,
            extended_size // unit,
            chunks,
            **call.flags,
            WIDTH_UNIT=call.width_unit,
            OUTPUT_UNIT=unit,
            CHUNKS=next_power_of_2(chunks),
            CHUNK=_CHUNK,
            num_warps=warps,
        )
        copied_words_kernel[(call.rows,)](
            call.logits,
            *call.source,
            lse,
            output,
            *call.logits_numbers,
            *call.source_numbers,
            call.vocabulary,
            extended_size,
            **call.flags,
            num_warps=_warps(_ROW_THREADS),
        )
    return output, lse


def backward(
    grad_output: Tensor,
    logits: Tensor,
    copy: Tensor,
    source_tokens: Tensor,
    gate: Tensor | None,
    source_lengths: Tensor | None,
    targets: Tensor | None,
    lse: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, copy and gate."""
    from .triton_kernels import log_probs_backward_kernel, nll_backward_kernel

    grad_logits = logits.new_empty(logits.shape)
    grad_copy = copy.new_empty(copy.shape, dtype=torch.float32)
    grad_gate = logits.new_empty((0,) if gate is None else gate.shape, dtype=torch.float32)
    results = (grad_logits, grad_copy, grad_gate)
    if lse.numel() == 0:
        return results
    call = _Call(logits, copy, source_tokens, gate, source_lengths, targets)
    lse = lse.contiguous()
    with device_guard(logits):
        if targets is not None:
            nll_backward_kernel[(call.rows, ceil_div(call.vocabulary, _CHUNK))](
                grad_output.contiguous(),
                call.logits,
                *call.source,
                call.targets,
                lse,
                *results,
                *call.logits_numbers,
                *call.source_numbers,
                call.vocabulary // call.width_unit,
                ignore_index,
                **call.flags,
                WIDTH_UNIT=call.width_unit,
                CHUNK=_CHUNK,
                num_warps=_warps(_THREADS),
            )
            return results
        grad = rows_of(grad_output)
        log_probs_backward_kernel[(call.rows,)](
            *grad.tensors,
            call.logits,
            *call.source,
            lse,
            *results,
            *grad.numbers,
            *call.logits_numbers,
            *call.source_numbers,
            call.vocabulary // call.width_unit,
            grad_output.size(-1),
            **call.flags,
            GRAD_UNIT=grad.flags["STRIDE_UNIT"],
            WIDTH_UNIT=call.width_unit,
            CHUNK=_ROW_CHUNK,
            num_warps=_warps(_ROW_THREADS),
        )
    return results
