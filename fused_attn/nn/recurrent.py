"""Stacks of LSTM, GRU or plain recurrent layers over padded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.ops import recurrent_cell, recurrent_layer
from fused_attn.ops.recurrent_cell import layer_is_fused

from ._onednn_linear import onednn_linear
from ._packed_sequence import PackedBatch

RecurrentState = tuple[Tensor, ...]
"""``(hidden,)``, for an LSTM ``(hidden, cell)``; each ``[layers * directions, B, H]``."""


class LayerProducts(Protocol):
    """What ``recurrent_layer`` needs of a layer's direction."""

    def input_gates(self, layer: int, reverse: bool, rows: Tensor) -> Tensor:
        """Rows ``[N, in]`` to their gates ``[N, G H]``, without ``bias_hh``."""
        ...

    def recurrent_weight(self, layer: int, reverse: bool) -> Tensor:
        """``[G H, H]``."""
        ...


_MODES = {"lstm": "LSTM", "gru": "GRU", "tanh": "RNN_TANH", "relu": "RNN_RELU"}


class RecurrentLayers(nn.RNNBase):
    """``torch.nn.LSTM``, ``GRU`` or ``RNN`` over a padded batch with lengths.

    Same parameters, names and initial values as ``torch.nn``'s, whose state dicts load strictly
    both ways. A sequence ends at its length: the output behind it is 0, its final state is that of
    its last valid step, and the reverse direction begins there. A length of 0 leaves the initial
    state as it is. What stands behind a length, NaN too, reaches neither a result nor a gradient.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"tanh"`` or ``"relu"``.
        input_size: Size of an input.
        hidden_size: H, of each direction.
        num_layers: Layers; each reads the output of the one before.
        bidirectional: Every layer has a second direction, from the last step to the first, whose
            output stands beside the first one's.
        bias: Whether the products have biases.
        dropout: Probability that an element is dropped between two layers, in training.
        device: Where the parameters live.
        dtype: Of the parameters.

    Raises:
        ValueError: There is no kind of that name, or a number is out of range.

    Reference: bidirectional: Schuster and Paliwal, 1997, https://doi.org/10.1109/78.650093; the
    cells: ``fused_attn.recurrent_cell``
    """

    def __init__(
        self,
        kind: Literal["lstm", "gru", "tanh", "relu"],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kind not in _MODES:
            raise ValueError(
                f"RecurrentLayers: kind must be one of {', '.join(_MODES)}, got {kind!r}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"RecurrentLayers: dropout must be in [0, 1), got {dropout}")
        super().__init__(
            _MODES[kind],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first=True,
            # With one layer there is nothing between layers, of which torch would warn.
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        self.kind = kind

    @property
    def output_size(self) -> int:
        """Size of an output: H times the number of directions."""
        return self.hidden_size * self._directions

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def initial_state(self, batch_size: int, like: Tensor) -> RecurrentState:
        """Zeros, with the dtype and device of ``like``."""
        shape = (self.num_layers * self._directions, batch_size, self.hidden_size)
        return tuple(like.new_zeros(shape) for _ in range(2 if self.kind == "lstm" else 1))

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Run all layers over all steps.

        Args:
            x: ``[B, T, input_size]``.
            lengths: ``[B]`` int32 or int64 in [0, T]. They are read on the host: tensors on a GPU
                are waited for. Default: all of T.
            state: Before the first step; default: zeros.

        Returns:
            Output ``[B, T, output_size]`` of the last layer, and the final state.

        Raises:
            TypeError: ``lengths`` has a wrong dtype.
            ValueError: Shapes disagree, or a length is out of range.
        """
        return self.forward_with(None, x, lengths, state)

    def forward_with(
        self,
        products: LayerProducts | None,
        x: Tensor,
        lengths: Tensor | None,
        state: RecurrentState | None,
    ) -> tuple[Tensor, RecurrentState]:
        """:meth:`forward` by other products.

        Where no fused layer takes the call, PyTorch's own functions run it, products included.

        Args:
            products: Of the inputs, and the weights of the others; None: the layers' own.
            x: As of :meth:`forward`, like the others.
            lengths: See there.
            state: See there.
        """
        self._check_input(x, 3, "[B, T, input_size]")
        B = x.size(0)
        if state is None:
            state = self.initial_state(B, x)
        self._check_state(state, B)
        batch = PackedBatch.of(x, lengths)
        data, before = batch.pack(x), tuple(batch.sort(s) for s in state)
        final: RecurrentState
        if data.size(0) == 0:
            data, final = data.new_zeros(0, self.output_size), before
        elif self._takes_fused(batch, data) or (products is not None and layer_is_fused(data)):
            own = _OwnProducts(self) if products is None else products
            data, final = self._run_fused(own, batch, data, before)
        else:
            data, final = self._run_torch(batch, data, before)
        finals = tuple(batch.unsort(new, s) for new, s in zip(final, state, strict=True))
        return batch.unpack(data), finals

    def _takes_fused(self, batch: PackedBatch, data: Tensor) -> bool:
        """Whether ``recurrent_layer`` is the faster way."""
        # An LSTM over steps of one length is a single operation of oneDNN's.
        single = self.kind == "lstm" and batch.positions is None
        autocast = torch.is_autocast_enabled(data.device.type)
        return layer_is_fused(data) and not single and not autocast

    def _run_torch(
        self, batch: PackedBatch, data: Tensor, state: RecurrentState
    ) -> tuple[Tensor, RecurrentState]:
        """Output of the last layer and final states of packed inputs ``[N, input_size]``."""
        self._update_flat_weights()
        functions: dict[str, Callable[..., Any]] = {
            "lstm": torch.lstm,
            "gru": torch.gru,
            "tanh": torch.rnn_tanh,
            "relu": torch.rnn_relu,
        }
        hx = state if self.kind == "lstm" else state[0]
        options = (self._flat_weights, self.bias, self.num_layers, self.dropout, self.training)
        function = functions[self.kind]
        if batch.positions is None:
            # All of one length: kernels that need not look at lengths.
            steps = data.view(batch.batch_sizes.numel(), -1, data.size(-1))
            output, *final = function(steps, hx, *options, self.bidirectional, False)
            return output.reshape(-1, output.size(-1)), tuple(final)
        output, *final = function(data, batch.batch_sizes, hx, *options, self.bidirectional)
        return output, tuple(final)

    def _run_fused(
        self, products: LayerProducts, batch: PackedBatch, data: Tensor, state: RecurrentState
    ) -> tuple[Tensor, RecurrentState]:
        """The same, by ``recurrent_layer``."""
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer > 0:
                data = F.dropout(data, self.dropout, self.training)
            outputs = []
            for reverse in (False, True)[: self._directions]:
                index = layer * self._directions + reverse
                output, *final = recurrent_layer(
                    products.input_gates(layer, reverse, data),
                    batch.batch_sizes,
                    state[0][index],
                    state[1][index] if self.kind == "lstm" else None,
                    products.recurrent_weight(layer, reverse),
                    self.parameters_of(layer, reverse)[3],
                    kind=self.kind,
                    reverse=reverse,
                )
                outputs.append(output)
                finals.append(tuple(final[: len(state)]))
            data = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
        return data, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def input_gates(self, x: Tensor, first_column: int = 0) -> Tensor:
        """What some columns of the input contribute to the gates of the first layer.

        Args:
            x: ``[..., C]``: columns ``[first_column, first_column + C)`` of the input.
            first_column: Where they stand. The biases are added to those that stand first.

        Returns:
            ``[..., G H]``.
        """
        weight, _, bias, _ = self.parameters_of(0)
        columns = weight[:, first_column : first_column + x.size(-1)]
        return F.linear(x, columns, bias if first_column == 0 else None)

    def step(
        self, x: Tensor, state: RecurrentState, input_gates: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """One step of N sequences through all layers, which must have one direction.

        Args:
            x: ``[N, input_size]``.
            state: Each ``[layers, N, H]``.
            input_gates: ``[N, G H]``: what the first columns of the input contribute, from
                :meth:`input_gates`, in one product for many steps; ``x`` has the other columns.

        Returns:
            Output ``[N, H]`` of the last layer, and the new state.

        Raises:
            RuntimeError: The layers are bidirectional.
            ValueError: Shapes disagree.
        """
        if self.bidirectional:
            raise RuntimeError("RecurrentLayers: step needs layers of one direction")
        if input_gates is None:
            self._check_input(x, 2, "[N, input_size]")
            first_gates = self.input_gates(x)
        else:
            first_gates = input_gates + self.input_gates(x, self.input_size - x.size(-1))
        self._check_state(state, x.size(0))
        news: list[tuple[Tensor, ...]] = []
        output = x
        for layer in range(self.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self.parameters_of(layer)
            if layer == 0:
                from_input = first_gates
            else:
                output = F.dropout(output, self.dropout, self.training)
                from_input = F.linear(output, weight_ih, bias_ih)
            hidden = state[0][layer]
            from_hidden = F.linear(hidden, weight_hh, bias_hh)
            cell = state[1][layer] if self.kind == "lstm" else None
            new = recurrent_cell(from_input, from_hidden, hidden, cell, kind=self.kind)
            news.append(new if self.kind == "lstm" else new[:1])
            output = new[0]
        return output, tuple(torch.stack(parts) for parts in zip(*news, strict=True))

    def parameters_of(
        self, layer: int, reverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``weight_ih``, ``weight_hh``, ``bias_ih`` and ``bias_hh`` of a layer's direction."""
        suffix = f"_l{layer}{'_reverse' if reverse else ''}"
        bias_ih, bias_hh = (
            getattr(self, name + suffix) if self.bias else None for name in ("bias_ih", "bias_hh")
        )
        return (
            getattr(self, "weight_ih" + suffix),
            getattr(self, "weight_hh" + suffix),
            bias_ih,
            bias_hh,
        )

    def _check_input(self, x: Tensor, dimensions: int, layout: str) -> None:
        if x.dim() != dimensions or x.size(-1) != self.input_size:
            raise ValueError(
                f"RecurrentLayers: x must have shape {layout} with input_size = "
                f"{self.input_size}, got {list(x.shape)}"
            )

    def _check_state(self, state: RecurrentState, batch_size: int) -> None:
        count = 2 if self.kind == "lstm" else 1
        shape = [self.num_layers * self._directions, batch_size, self.hidden_size]
        if len(state) != count or any(list(part.shape) != shape for part in state):
            raise ValueError(
                f"RecurrentLayers: state must have {count} parts of shape {shape}, got "
                f"{[list(part.shape) for part in state]}"
            )


class _OwnProducts:
    """Products with the parameters of the layers, which get their gradients."""

    def __init__(self, layers: RecurrentLayers) -> None:
        self._layers = layers

    def input_gates(self, layer: int, reverse: bool, rows: Tensor) -> Tensor:
        weight, _, bias, _ = self._layers.parameters_of(layer, reverse)
        return onednn_linear(rows, weight, bias)

    def recurrent_weight(self, layer: int, reverse: bool) -> Tensor:
        return self._layers.parameters_of(layer, reverse)[1]
