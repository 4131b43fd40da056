"""Named cases of ``recurrent_cell`` and ``recurrent_layer``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._cases import ELEMENTARY, Case
from .api import recurrent_cell
from .contract import GATES
from .layer import recurrent_layer

Kind = Literal["lstm", "gru", "tanh", "relu"]

# Operations of an element's step, and of its backward with the gates again.
#   lstm: 5 functions, 4 sums of gates, f c + i g 3, o tanh(c) 1; functions, sums and cell again,
#         then 5 for the cell's gradient, 4 for each of 4 gates, 1 for the old cell's.
#   gru:  3 functions, sums 4, n + z (h - n) 3; functions and sums again, then z 5, n 5, r 4, and 1
#         for its product.
_FLOPS = {
    "lstm": (5 * ELEMENTARY + 8, 5 * ELEMENTARY + 7 + 22),
    "gru": (3 * ELEMENTARY + 7, 3 * ELEMENTARY + 4 + 15),
    "tanh": (ELEMENTARY + 1, ELEMENTARY + 4),
    "relu": (2, 2),
}


@dataclass(frozen=True, kw_only=True)
class RecurrentCellCase(Case):
    """``recurrent_cell`` with states ``[*leading, hidden_size]``."""

    op: ClassVar[str] = "recurrent_cell"
    differentiable: ClassVar[tuple[str, ...]] = ("input_gates", "hidden_gates", "hidden", "cell")

    leading: tuple[int, ...]
    hidden_size: int
    cell_kind: Kind = "lstm"
    fp32_state: bool = False
    scale: float = 1.0
    """Of the elements of the gates."""
    layout: Literal["contiguous", "transposed", "sliced", "columns_first", "expanded"] = (
        "contiguous"
    )
    """``transposed``: leading dimensions; ``sliced``: a step of the gates of many, ``[B, T, G H]``;
    ``expanded``: one row many times."""

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Normal gates, a hidden state within (-1, 1) and a normal cell."""
        columns = GATES[self.cell_kind] * self.hidden_size

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        call: dict[str, Any] = {"kind": self.cell_kind}
        for name in ("input_gates", "hidden_gates"):
            gates = draw(*self.leading, columns) * self.scale
            call[name] = self._lay_out(gates.to(device, dtype))
        wide = self.fp32_state and dtype != torch.float64
        state_dtype = torch.float32 if wide else dtype
        state = draw(*self.leading, self.hidden_size)
        if self.cell_kind == "lstm":
            call["cell"] = self._lay_out(state.to(device, state_dtype))
        if self.cell_kind == "gru":
            call["hidden"] = self._lay_out(state.tanh().to(device, state_dtype))
        return call

    def _lay_out(self, tensor: Tensor) -> Tensor:
        if self.layout == "transposed":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "sliced":
            return torch.stack((tensor, torch.zeros_like(tensor)), dim=-2).select(-2, 0)
        if self.layout == "columns_first":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if self.layout == "expanded":
            return tensor[..., :1, :].expand_as(tensor)
        return tensor

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """New hidden state, and an LSTM's new cell."""
        new_hidden, new_cell = recurrent_cell(**inputs, backend=backend)
        return (new_hidden, new_cell) if self.cell_kind == "lstm" else (new_hidden,)

    @property
    def _elements(self) -> int:
        return math.prod(self.leading) * self.hidden_size

    def flops(self, backward: bool = False) -> int:
        """The gates, and backward the gates again and their derivatives."""
        return self._elements * _FLOPS[self.cell_kind][int(backward)]

    def bytes_moved(self, itemsize: int, backward: bool = False) -> int:
        """Each tensor once.

        Forward reads both gates and the state and writes the new states. Backward reads the same
        and the gradients of the new states, and writes the gradients of the gates (one for both
        but for a GRU) and of the state.
        """
        gates = GATES[self.cell_kind]
        state = 4 if self.fp32_state else itemsize
        # Old and new states that have their own dtype; the rest have that of the gates.
        states = {"lstm": 2 * state + itemsize, "gru": 2 * state}.get(self.cell_kind, itemsize)
        moved = 2 * gates * itemsize + states
        if backward:
            moved += gates * (2 if self.cell_kind == "gru" else 1) * itemsize
            moved += state if self.cell_kind in ("lstm", "gru") else 0
        return moved * self._elements


@dataclass(frozen=True, kw_only=True)
class RecurrentLayerCase(Case):
    """``recurrent_layer`` over sequences of these lengths, the longest first."""

    op: ClassVar[str] = "recurrent_cell"
    differentiable: ClassVar[tuple[str, ...]] = ("input_gates", "hidden", "cell", "weight", "bias")

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    lengths: tuple[int, ...]
    hidden_size: int
    cell_kind: Kind = "lstm"
    bias: bool = True
    reverse: bool = False
    transposed_weight: bool = False

    def inputs(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> dict[str, Any]:
        """Normal gates and states; weights that keep the states' size."""
        B, H, columns = (
            len(self.lengths),
            self.hidden_size,
            GATES[self.cell_kind] * self.hidden_size,
        )

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        longest = max(self.lengths, default=0)
        sizes = [sum(length > s for length in self.lengths) for s in range(longest)]
        weight = draw(columns, H) * H**-0.5
        return {
            "input_gates": draw(sum(self.lengths), columns),
            "batch_sizes": torch.tensor(sizes, dtype=torch.int64),
            "hidden": draw(B, H).tanh(),
            "cell": draw(B, H) if self.cell_kind == "lstm" else None,
            "weight": weight.t().contiguous().t() if self.transposed_weight else weight,
            "bias": draw(columns) if self.bias else None,
            "kind": self.cell_kind,
            "reverse": self.reverse,
        }

    def run(self, inputs: Mapping[str, Any], backend: str | None) -> tuple[Tensor, ...]:
        """Output, final hidden state, and an LSTM's final cell."""
        results = recurrent_layer(**inputs, backend=backend)
        return results if self.cell_kind == "lstm" else results[:2]


def _edge(name: str, kind: Kind, leading: tuple[int, ...], size: int, **flags: Any) -> Any:
    return RecurrentCellCase(
        name=f"{kind}_{name}",
        kind="edge",
        cell_kind=kind,
        leading=leading,
        hidden_size=size,
        **flags,
    )


def _benchmark(kind: Kind, rows: int, size: int, **flags: Any) -> RecurrentCellCase:
    return RecurrentCellCase(
        name=f"{kind}_{rows}x{size}",
        kind="benchmark",
        cell_kind=kind,
        leading=(rows,),
        hidden_size=size,
        **flags,
    )


def _layer(name: str, cell_kind: Kind, lengths: tuple[int, ...], size: int, **flags: Any) -> Any:
    return RecurrentLayerCase(
        name=f"layer_{cell_kind}_{name}",
        cell_kind=cell_kind,
        lengths=lengths,
        hidden_size=size,
        **flags,
    )


_KINDS: tuple[Kind, ...] = ("lstm", "gru", "tanh", "relu")

CASES: tuple[RecurrentCellCase | RecurrentLayerCase, ...] = (
    *(
        RecurrentCellCase(
            name=f"{kind}_typical", kind="typical", cell_kind=kind, leading=(9,), hidden_size=48
        )
        for kind in _KINDS
    ),
    *(_edge("smooth", kind, (2, 3), 5, gradcheck=True) for kind in ("lstm", "gru", "tanh")),
    *(_edge("prime", kind, (3,), 131) for kind in _KINDS),
    *(_edge("sliced_step", kind, (5,), 24, layout="sliced") for kind in _KINDS),
    *(_edge("fp32_state", kind, (4,), 37, fp32_state=True) for kind in ("lstm", "gru")),
    # Where most gates are 0 or 1 to the last bit, and where e^x overflows: among many numbers, of
    # which some have a gradient.
    *(_edge("saturated", kind, (6,), 40, scale=30.0) for kind in _KINDS),
    *(_edge("large", kind, (16,), 65, scale=300.0) for kind in _KINDS),
    # Where 2 sigmoid(2x) - 1, or a ratio of exponentials, would have no digit of tanh.
    *(_edge("tiny", kind, (4,), 40, scale=1e-3) for kind in ("lstm", "gru", "tanh")),
    _edge("no_rows", "lstm", (0, 4), 16),
    _edge("no_rows", "gru", (0,), 16),
    _edge("one_vector", "lstm", (), 31),
    _edge("size_1", "lstm", (7,), 1),
    _edge("size_1", "gru", (7,), 1),
    _edge("transposed", "lstm", (3, 4), 24, layout="transposed"),
    _edge("transposed", "gru", (3, 4), 24, layout="transposed", fp32_state=True),
    _edge("columns_first", "lstm", (4, 5), 24, layout="columns_first"),
    _edge("expanded", "gru", (3, 4), 20, layout="expanded"),
    _edge("wide", "lstm", (2,), 1031),
    _edge("many_rows", "gru", (1100,), 5),
    *(_layer("typical", kind, (5, 3, 3, 1), 24, kind="typical") for kind in _KINDS),
    *(_layer("reverse", kind, (5, 3, 3, 1), 24, reverse=True, kind="edge") for kind in _KINDS),
    *(
        _layer("smooth", kind, (3, 2), 4, kind="edge", gradcheck=True)
        for kind in ("lstm", "gru", "tanh")
    ),
    _layer("smooth_reverse", "gru", (3, 1), 4, reverse=True, kind="edge", gradcheck=True),
    _layer("no_bias", "lstm", (4, 4), 17, bias=False, kind="edge"),
    _layer("one_sequence", "gru", (6,), 33, kind="edge"),
    _layer("one_step", "lstm", (1, 1, 1), 16, kind="edge"),
    _layer("sequences_without_steps", "lstm", (3, 0, 0), 16, kind="edge"),
    _layer("sequences_without_steps", "gru", (3, 1, 0), 16, reverse=True, kind="edge"),
    _layer("no_steps", "lstm", (0, 0), 16, kind="edge"),
    _layer("no_sequences", "gru", (), 16, kind="edge"),
    _layer("size_1", "gru", (4, 2), 1, kind="edge"),
    _layer("transposed_weight", "lstm", (4, 2), 20, transposed_weight=True, kind="edge"),
    _layer("many_rows", "gru", (3,) * 100, 40, kind="edge"),
    _benchmark("lstm", 64, 512),
    _benchmark("gru", 64, 512),
    _benchmark("tanh", 64, 512),
    _benchmark("lstm", 4096, 512),
    _benchmark("gru", 4096, 512),
    *(
        _benchmark(kind, 16384, 1024, gpu_only=True, dtypes=(torch.bfloat16,))
        for kind in ("lstm", "gru")
    ),
)
