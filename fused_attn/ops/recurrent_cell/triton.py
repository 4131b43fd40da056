"""The ``triton`` backend: launchers. The kernels are in ``triton_kernels.py``, loaded on use."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._check import FLOATING
from .._triton import Rows, ceil_div, device_guard, next_power_of_2, rows_of, target
from .contract import GATES

_THREADS = 128
"""Of a program."""
# A thread's share of each gate, in bytes: one access of 16.
_BYTES_PER_THREAD = 16
# Columns of a tile: the widest of these whose last tile leaves little empty.
_BLOCKS = (1024, 512, 256, 128)
# Of a thread: four programs run on a multiprocessor, three where each element has an address.
_REGISTERS, _MORE_REGISTERS = 128, 168


class Tiling(NamedTuple):
    """How a kernel covers rows of a hidden size."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


def tiling(hidden_size: int, itemsize: int) -> Tiling:
    """The tile of a state for rows of this size."""
    elements = _THREADS * _BYTES_PER_THREAD // itemsize
    block_n = next_power_of_2(hidden_size)
    if block_n > _BLOCKS[-1]:
        spare = hidden_size // 10
        fitting = (n for n in _BLOCKS if n <= elements and -hidden_size % n <= spare)
        block_n = next(fitting, _BLOCKS[-1])
    return Tiling(elements // block_n, block_n, _THREADS // target().warp_size)


def unsupported_reasons(input_gates: Tensor) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    if input_gates.dtype not in FLOATING:
        return [f"dtype {input_gates.dtype}: float32, float16 or bfloat16 only"]
    return []


def layer_unsupported_reasons(input_gates: Tensor) -> list[str]:
    """This backend runs no whole layer."""
    return ["has no kernel of a whole layer: torch.nn's layers, by cuDNN, are made of one"]


def forward(
    input_gates: Tensor, hidden_gates: Tensor, state: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """New hidden state and cell."""
    from .triton_kernels import recurrent_cell_forward_kernel

    hidden_size = input_gates.size(-1) // GATES[kind]
    shape = (*input_gates.shape[:-1], hidden_size)
    num_rows = input_gates.shape[:-1].numel()
    like = state if kind == "gru" and state is not None else input_gates
    new_hidden = like.new_empty(shape)
    new_cell = input_gates.new_empty(0)
    if kind == "lstm" and state is not None:
        new_cell = state.new_empty(shape)
    if num_rows == 0:
        return new_hidden, new_cell

    rows = rows_of(input_gates, hidden_gates, state)
    grid, options = _launch(num_rows, hidden_size, input_gates, kind, rows)
    with device_guard(new_hidden):
        recurrent_cell_forward_kernel[grid](
            *rows.tensors, new_hidden, new_cell, num_rows, *rows.numbers, **options
        )
    return new_hidden, new_cell


def backward(
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: Tensor | None,
    kind: str,
    need_grad_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates, of a GRU's hidden gates, and of the state."""
    from .triton_kernels import recurrent_cell_backward_kernel

    hidden_size = input_gates.size(-1) // GATES[kind]
    num_rows = input_gates.shape[:-1].numel()
    grad_gates = input_gates.new_empty(input_gates.shape)
    grad_hidden_gates = input_gates.new_empty(input_gates.shape if kind == "gru" else (0,))
    grad_state = input_gates.new_empty(0)
    if state is not None and need_grad_state:
        grad_state = state.new_empty(state.shape)
    if num_rows == 0:
        return grad_gates, grad_hidden_gates, grad_state

    rows = rows_of(grad_hidden, grad_cell, input_gates, hidden_gates, state)
    grid, options = _launch(num_rows, hidden_size, input_gates, kind, rows)
    with device_guard(grad_gates):
        recurrent_cell_backward_kernel[grid](
            *rows.tensors,
            grad_gates,
            grad_hidden_gates,
            grad_state,
            num_rows,
            *rows.numbers,
            HAS_GRAD_HIDDEN=grad_hidden is not None,
            HAS_GRAD_CELL=grad_cell is not None,
            NEED_STATE=grad_state.numel() > 0,
            **options,
        )
    return grad_gates, grad_hidden_gates, grad_state


def _launch(
    num_rows: int, hidden_size: int, gates: Tensor, kind: str, rows: Rows
) -> tuple[tuple[int], dict[str, object]]:
    """Grid, and the constants of either kernel."""
    tile = tiling(hidden_size, gates.element_size())
    grid = (ceil_div(num_rows, tile.BLOCK_M) * ceil_div(hidden_size, tile.BLOCK_N),)
    return grid, {
        "KIND": kind,
        "WIDTH": hidden_size,
        **tile._asdict(),
        **rows.flags,
        **target().register_options(_MORE_REGISTERS if hidden_size % 4 else _REGISTERS),
    }
