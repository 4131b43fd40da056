"""Stacked recurrent layers: whole sequences at once, or one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fused_attn.ops import recurrent_cell

_GATES = {"lstm": 4, "gru": 3, "tanh": 1}


class RecurrentState(NamedTuple):
    """What layers carry from step to step."""

    hidden: Tensor
    """``[L, B, H]``, both directions side by side."""
    cell: Tensor | None
    """``[L, B, H]`` of an LSTM."""

    def map(self, function: Callable[[Tensor], Tensor]) -> RecurrentState:
        """A function of each tensor."""
        cell = self.cell
        return RecurrentState(function(self.hidden), None if cell is None else function(cell))

    def copy_(self, other: RecurrentState) -> None:
        """Write what another state holds into these tensors."""
        self.hidden.copy_(other.hidden)
        if self.cell is not None and other.cell is not None:
            self.cell.copy_(other.cell)

    def top(self) -> Tensor:
        """``[B, H]``: the hidden state of the last layer."""
        return self.hidden[-1]


class Recurrence(nn.Module):
    """L layers of LSTM, GRU or tanh cells.

    Args:
        kind: ``"lstm"``, ``"gru"`` or ``"tanh"``.
        input_size: I.
        hidden_size: H, of both directions together.
        num_layers: L.
        bidirectional: Half of H is read in each direction.
        dropout: Between layers.
    """

    def __init__(
        self,
        kind: Literal["lstm", "gru", "tanh"],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kind: Literal["lstm", "gru", "tanh"] = kind
        self.num_layers, self.gates = num_layers, _GATES[kind]
        self.directions = 2 if bidirectional else 1
        layers: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN}
        self.layers: Any = layers[kind](
            input_size,
            hidden_size // self.directions,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
        )

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """Read sequences ``[B, T, I]``.

        Args:
            x: The inputs.
            state: What to begin with. Default: zeros.
            lengths: ``[B]``. Default: all T.

        Returns:
            ``[B, T, H]``, 0 behind a length, and the state at each sequence's end; a sequence of
            length 0 ends with zeros.
        """
        begin: Any = None
        if state is not None:
            begin = state.hidden if state.cell is None else (state.hidden, state.cell)
        if lengths is None:
            outputs, end = self.layers(x, begin)
            return outputs, self._state(end)
        packed: PackedSequence = pack_padded_sequence(
            x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        packed_outputs, end = self.layers(packed, begin)
        outputs, _ = pad_packed_sequence(packed_outputs, batch_first=True, total_length=x.size(1))
        is_empty = lengths == 0
        final = self._state(end)
        return (
            outputs.masked_fill(is_empty[:, None, None], 0.0),
            final.map(lambda part: part.masked_fill(is_empty[:, None], 0.0)),
        )

    def input_gates(self, x: Tensor, first: int = 0, *, bias: bool = True) -> Tensor:
        """``[..., G]``: what some columns of the input add to the first layer's gates.

        Args:
            x: ``[..., n]``: columns first..first+n-1 of the input.
            first: Of the columns.
            bias: Whether to add the bias, which is to be added once.
        """
        weight = self.layers.weight_ih_l0[:, first : first + x.size(-1)]
        return F.linear(x, weight, self.layers.bias_ih_l0 if bias else None)

    def step(self, gates: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One step of one direction.

        Args:
            gates: ``[N, G]``: of the first layer, from ``input_gates``.
            state: Of N rows.

        Returns:
            The top layer's hidden state ``[N, H]``, and all states.
        """
        hidden_states: list[Tensor] = []
        cells: list[Tensor] = []
        for index in range(self.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = (
                getattr(self.layers, f"{name}_l{index}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            hidden = state.hidden[index]
            if index > 0:
                below = F.dropout(hidden_states[-1], self.layers.dropout, self.training)
                gates = F.linear(below, weight_ih, bias_ih)
            cell = None if state.cell is None else state.cell[index]
            hidden, cell = recurrent_cell(
                gates, F.linear(hidden, weight_hh, bias_hh), hidden, cell, kind=self.kind
            )
            hidden_states.append(hidden)
            if self.kind == "lstm":
                cells.append(cell)
        return hidden_states[-1], RecurrentState(
            torch.stack(hidden_states), torch.stack(cells) if cells else None
        )

    def _state(self, end: Any) -> RecurrentState:
        hidden, cell = end if isinstance(end, tuple) else (end, None)
        return RecurrentState(hidden, cell).map(self._merge)

    def _merge(self, state: Tensor) -> Tensor:
        """``[L * directions, B, h] -> [L, B, H]``."""
        if self.directions == 1:
            return state
        L, B, h = self.num_layers, state.size(1), state.size(2)
        return state.view(L, 2, B, h).transpose(1, 2).reshape(L, B, 2 * h)
