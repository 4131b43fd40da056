"""A recurrent model's modules for generation on a CPU, with packed weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from fused_attn.nn import RecurrentAttention, RecurrentLayers
from fused_attn.nn import packed as layers
from fused_attn.nn._packed_sequence import PackedBatch
from fused_attn.ops import recurrent_cell, recurrent_layer

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


class PackedReader(nn.Module):
    """``RecurrentLayers`` that read whole sequences, with packed weights.

    The recurrent weights are packed by ``recurrent_layer``, in each call.

    Args:
        module: The layers.
    """

    def __init__(self, module: RecurrentLayers) -> None:
        super().__init__()
        self.kind, self.hidden_size = module.kind, module.hidden_size
        suffixes = ("", "_reverse") if module.bidirectional else ("",)
        self._layers: list[list[tuple[PackedRows, Tensor, Tensor]]] = []
        for layer in range(module.num_layers):
            directions = []
            for suffix in suffixes:
                weight_ih, weight_hh, bias_ih, bias_hh = _weights(module, f"_l{layer}{suffix}")
                directions.append((PackedRows(weight_ih, bias_ih), weight_hh, bias_hh))
            self._layers.append(directions)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Read ``[B, T, I]``; see ``RecurrentLayers``."""
        batch = PackedBatch.of(x, lengths)
        data = batch.pack(x)
        zeros = x.new_zeros(1, x.size(0), self.hidden_size)
        first = batch.sort(zeros)[0]
        ends: list[RecurrentState] = []
        for directions in self._layers:
            outputs = []
            for (from_input, weight, bias), reverse in zip(directions, (False, True), strict=False):
                output, *end = recurrent_layer(
                    from_input(data),
                    batch.batch_sizes,
                    first,
                    first,
                    weight,
                    bias,
                    kind=self.kind,
                    reverse=reverse,
                )
                outputs.append(output)
                ends.append(tuple(end if self.kind == "lstm" else end[:1]))
            data = torch.cat(outputs, dim=1)
        states = (torch.stack(parts) for parts in zip(*ends, strict=True))
        initial = zeros.expand(len(ends), -1, -1)
        return batch.unpack(data), tuple(batch.unsort(state, initial) for state in states)


class PackedWriter(nn.Module):
    """``RecurrentLayers`` that go step by step, with packed weights.

    Args:
        module: The layers, of one direction.
    """

    def __init__(self, module: RecurrentLayers) -> None:
        super().__init__()
        self.kind = module.kind
        self._layers: list[tuple[PackedRows, PackedRows | None]] = []
        for layer in range(module.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = _weights(module, f"_l{layer}")
            if self.kind == "gru":
                products = PackedRows(weight_ih, bias_ih), PackedRows(weight_hh, bias_hh)
                self._layers.append(products)
            else:  # of [input; state]: elsewhere the two products just add up
                weight = torch.cat([weight_ih, weight_hh], dim=1)
                self._layers.append((PackedRows(weight, bias_ih + bias_hh), None))

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One step ``[N, I]``; see ``RecurrentLayers``."""
        news: list[RecurrentState] = []
        for layer, (first, second) in enumerate(self._layers):
            hidden, *cell = (part[layer] for part in state)
            if second is None:
                from_input = first(torch.cat([x, hidden], dim=1))
                from_hidden = from_input.new_zeros(1).expand_as(from_input)
            else:
                from_input, from_hidden = first(x), second(hidden)
            new = recurrent_cell(
                from_input, from_hidden, hidden, cell[0] if cell else None, kind=self.kind
            )
            news.append(new[: len(state)])
            x = new[0]
        return x, tuple(torch.stack(parts) for parts in zip(*news, strict=True))


def _weights(module: RecurrentLayers, suffix: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh = (
        getattr(module, name + suffix).detach()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    return weight_ih, weight_hh, bias_ih, bias_hh


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
            packed = PackedWriter if isinstance(module, RNNDecoder) else PackedReader
            children[name] = packed(child)
        else:
            children[name] = pack(child)
    twin.__dict__["_modules"] = {**module._modules, **children}
    return twin
