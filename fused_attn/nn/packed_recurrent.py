"""Recurrent layers for inference on a CPU, whose weights lie as the products read them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fused_attn.ops import recurrent_cell

from .packed import InferenceLinear, LinearFactory, PackedLinear
from .recurrent import RecurrentLayers, RecurrentState


class PackedRecurrentLayers:
    """What inference computes with :class:`RecurrentLayers`, dropout left out.

    With ``PackedLinear`` each row of a result depends on its own sequence alone, to the last bit.
    Weights are copied when they are first used, those of a step and those of whole sequences each
    for themselves.

    Args:
        layers: fp32 on the CPU.
        linear: Packs a weight: ``PackedLinear`` or ``QuantizedLinear``. The recurrent weights of
            whole sequences stay in fp32.
    """

    def __init__(self, layers: RecurrentLayers, linear: LinearFactory) -> None:
        self._layers = layers
        self._linear = linear

    def __call__(
        self, x: Tensor, lengths: Tensor | None = None, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """All layers over all steps, as ``RecurrentLayers.forward``."""
        return self._layers.forward_with(self._sequences, x, lengths, state)

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One step of N sequences through all layers, which must have one direction.

        Args:
            x: ``[N, input_size]``.
            state: Each ``[layers, N, H]``.

        Returns:
            Output ``[N, H]`` of the last layer, and the new state.
        """
        news: list[tuple[Tensor, ...]] = []
        for layer, packed in enumerate(self._cells):
            news.append(packed(x, *(part[layer] for part in state)))
            x = news[-1][0]
        return x, tuple(torch.stack(parts) for parts in zip(*news, strict=True))

    @cached_property
    def _sequences(self) -> _PackedSequences:
        return _PackedSequences(self._layers, self._linear)

    @cached_property
    def _cells(self) -> list[_PackedCell | _PackedGRUCell]:
        if self._layers.bidirectional:
            raise RuntimeError("PackedRecurrentLayers: step needs layers of one direction")
        kind = _PackedGRUCell if self._layers.kind == "gru" else _PackedCell
        return [kind(self._layers, i, self._linear) for i in range(self._layers.num_layers)]


class _PackedSequences:
    """The products of whole sequences."""

    def __init__(self, layers: RecurrentLayers, linear: LinearFactory) -> None:
        self._inputs: dict[tuple[int, bool], InferenceLinear] = {}
        self._weights: dict[tuple[int, bool], Tensor] = {}
        for layer in range(layers.num_layers):
            for reverse in (False, True) if layers.bidirectional else (False,):
                weight_ih, weight_hh, bias_ih, _ = layers.parameters_of(layer, reverse)
                self._inputs[layer, reverse] = linear(weight_ih, bias_ih)
                self._weights[layer, reverse] = PackedLinear(weight_hh).weight

    def input_gates(self, layer: int, reverse: bool, rows: Tensor) -> Tensor:
        return self._inputs[layer, reverse](rows)

    def recurrent_weight(self, layer: int, reverse: bool) -> Tensor:
        return self._weights[layer, reverse]


class _PackedCell:
    """A step of an LSTM's or a plain layer: one product, of ``[x; hidden]``."""

    def __init__(self, layers: RecurrentLayers, layer: int, linear: LinearFactory) -> None:
        weight_ih, weight_hh, bias_ih, bias_hh = layers.parameters_of(layer)
        self._product = linear(torch.cat((weight_ih, weight_hh), dim=1).detach(), None)
        if bias_ih is None or bias_hh is None:
            self._bias = weight_ih.new_zeros(weight_ih.size(0))
        else:
            self._bias = (bias_ih + bias_hh).detach()
        self._kind = layers.kind

    def __call__(self, x: Tensor, hidden: Tensor, cell: Tensor | None = None) -> tuple[Tensor, ...]:
        gates = self._product(torch.cat((x, hidden), dim=1))
        new = recurrent_cell(gates, self._bias.expand_as(gates), None, cell, kind=self._kind)
        return new[:1] if cell is None else new


class _PackedGRUCell:
    """A step of a GRU, which multiplies a part of one product alone."""

    def __init__(self, layers: RecurrentLayers, layer: int, linear: LinearFactory) -> None:
        weight_ih, weight_hh, bias_ih, bias_hh = layers.parameters_of(layer)
        self._from_input, self._from_hidden = linear(weight_ih, bias_ih), linear(weight_hh, bias_hh)

    def __call__(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        gates = self._from_input(x), self._from_hidden(hidden)
        return recurrent_cell(*gates, hidden, kind="gru")[:1]
