"""A recurrent model's modules for generation on a CPU, with packed weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused_attn.nn import RecurrentAttention, RecurrentLayers
from fused_attn.nn import packed as layers
from fused_attn.ops import recurrent_cell

from .rnn_decoder import Bridge, RNNDecoder
from .rnn_encoder import FrontEnd, RecurrentState, RNNEncoder
from .rnn_output import CopyScores, EndProjection, GenerationGate

Module = TypeVar("Module", bound=nn.Module)


class PackedRows(nn.Module):
    """``nn.Linear`` with a packed weight: each row's bits depend on that row alone.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._product = layers.PackedLinear(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        rows = self._product(x.reshape(-1, x.size(-1)))
        return rows.view(*x.shape[:-1], -1)


class PackedRecurrence(nn.Module):
    """``RecurrentLayers`` with packed weights, without dropout.

    Args:
        module: The layers.
        steps: Whether they go step by step, where input and state of a layer are one product.
    """

    def __init__(self, module: RecurrentLayers, steps: bool) -> None:
        super().__init__()
        self.kind, self.hidden_size = module.kind, module.hidden_size
        self.num_layers = module.num_layers
        self.directions = 2 if module.bidirectional else 1
        # In a GRU the two products do not just add up.
        self._joins = steps and self.kind != "gru"
        self._cells: list[tuple[PackedRows, PackedRows | None]] = []
        for layer in range(self.num_layers):
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: self.directions]:
                weight_ih, weight_hh, bias_ih, bias_hh = (
                    getattr(module, name + suffix).detach()
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                if self._joins:
                    weight = torch.cat([weight_ih, weight_hh], dim=1)
                    self._cells.append((PackedRows(weight, bias_ih + bias_hh), None))
                else:
                    from_input = PackedRows(weight_ih, bias_ih)
                    self._cells.append((from_input, PackedRows(weight_hh, bias_hh)))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Read ``[B, T, I]``; see ``RecurrentLayers``."""
        B, T, _ = x.shape
        is_inside = torch.ones(B, T, dtype=torch.bool, device=x.device)
        if lengths is not None:
            is_inside = torch.arange(T, device=x.device) < lengths[:, None]
        ends: list[RecurrentState] = []
        for layer in range(self.num_layers):
            outputs = x.new_zeros(B, T, self.directions, self.hidden_size)
            for direction in range(self.directions):
                from_input, from_hidden = self._cells[layer * self.directions + direction]
                assert from_hidden is not None
                gates = from_input(x)
                state = self._zeros(B, x)
                steps = range(T) if direction == 0 else range(T - 1, -1, -1)
                for t in steps:
                    new = self._cell(gates[:, t], from_hidden(state[0]), state)
                    now = is_inside[:, t, None]
                    outputs[:, t, direction] = new[0].masked_fill(~now, 0.0)
                    state = tuple(torch.where(now, a, b) for a, b in zip(new, state, strict=True))
                ends.append(state)
            x = outputs.flatten(2)
        return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One step ``[N, I]``; see ``RecurrentLayers``."""
        news: list[RecurrentState] = []
        for layer, (first, second) in enumerate(self._cells):
            before = tuple(part[layer] for part in state)
            if second is None:
                gates = first(torch.cat([x, before[0]], dim=1))
                new = self._cell(gates, gates.new_zeros(1).expand_as(gates), before)
            else:
                new = self._cell(first(x), second(before[0]), before)
            news.append(new)
            x = new[0]
        return x, tuple(torch.stack(parts) for parts in zip(*news, strict=True))

    def _cell(self, from_input: Tensor, from_hidden: Tensor, state: RecurrentState) -> Any:
        hidden, *cell = state
        new = recurrent_cell(
            from_input, from_hidden, hidden, cell[0] if cell else None, kind=self.kind
        )
        return new[: len(state)]

    def _zeros(self, B: int, like: Tensor) -> RecurrentState:
        parts = 2 if self.kind == "lstm" else 1
        return tuple(like.new_zeros(B, self.hidden_size) for _ in range(parts))


def packing_reason(model: nn.Module) -> str:
    """Why packed weights cannot compute what the modules of a model would; empty if they can."""
    return layers.packing_reason(
        model,
        type(model),
        Bridge,
        CopyScores,
        EndProjection,
        FrontEnd,
        GenerationGate,
        RNNDecoder,
        RNNEncoder,
        RecurrentAttention,
        RecurrentLayers,
        nn.Conv1d,
        nn.Embedding,
    )


def pack(module: Module) -> Module:
    """The same module with packed weights in place of its linear and recurrent layers.

    Everything else is shared with it.

    Args:
        module: Without a ``packing_reason``.
    """
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    children: dict[str, nn.Module | None] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            children[name] = PackedRows(child.weight, child.bias)
        elif isinstance(child, RecurrentLayers):
            children[name] = PackedRecurrence(child, steps=isinstance(module, RNNDecoder))
        else:
            children[name] = pack(child)
    twin.__dict__["_modules"] = {**module._modules, **children}
    return twin
