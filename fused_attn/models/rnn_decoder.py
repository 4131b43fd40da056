"""The writer of a recurrent sequence-to-sequence model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.nn import RecurrentAttention, RecurrentLayers

from .rnn_config import RNNSeq2SeqConfig
from .rnn_encoder import Encoded, RecurrentState


class Beginning(NamedTuple):
    """What a decoder knows of its sources before the first step."""

    state: RecurrentState
    """Of B rows."""
    context: Tensor
    """``[B, H]``: the source as one vector."""
    memory: Any
    """What the attention reads; None without attention."""


class Carried(NamedTuple):
    """What goes from step to step, of K targets for each of B sources."""

    recurrent: RecurrentState
    """Of B * K rows."""
    feed: Tensor | None
    """``[B, K, H]``: the attentional state of the step before, with input feeding."""
    attention: Any


class Decoded(NamedTuple):
    """What a decoder makes of its inputs; T is the number of targets in a single step."""

    hidden: Tensor
    """``[B, T, H]``: what is projected onto the vocabulary."""
    state: Tensor
    """``[B, T, H]``: of the top layer."""
    context: Tensor | None
    """``[B, T, C]``."""
    weights: Tensor | None
    """``[B, T, S']`` fp32."""


class Bridge(nn.Module):
    """From what the encoder ends with to what the decoder begins with.

    ``last`` hands the states over, layer by layer. ``mean`` and ``linear`` map one vector, the mean
    of the encoder's outputs or its top layer's last state, to all of them; hidden states go through
    tanh. A source of length 0 begins with zeros.

    Args:
        config: The model's.
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.kind = config.bridge
        self.states = 2 if config.cell == "lstm" else 1
        self.num_layers, self.size = config.num_decoder_layers, config.hidden_size
        self.projection: nn.Linear | None = None
        if self.kind != "last":
            H = self.size
            self.projection = nn.Linear(H, self.states * self.num_layers * H)

    def forward(self, encoded: Encoded) -> tuple[RecurrentState, Tensor]:
        """The decoder's first state, and the source as one vector ``[B, H]``."""
        vector = encoded.state[0][-1]
        if self.kind == "mean":
            # Summed in order, so that no bit depends on how many zeros stand behind.
            vector = encoded.memory.cumsum(dim=1)[:, -1]
            if encoded.lengths is None:
                vector = vector / encoded.memory.size(1)
            else:
                vector = vector / encoded.lengths.clamp(min=1)[:, None].to(vector.dtype)
        if self.projection is None:
            return encoded.state, vector
        mapped = self.projection(vector)
        if encoded.lengths is not None:
            mapped = mapped.masked_fill((encoded.lengths == 0)[:, None], 0.0)
        mapped = mapped.view(-1, self.states, self.num_layers, self.size)
        hidden, *cell = mapped.permute(1, 2, 0, 3).unbind(0)  # [L, B, H]
        return (hidden.tanh(), *cell), vector


class RNNDecoder(nn.Module):
    """Recurrent layers over embedded targets, with attention after them.

        h_t = recurrence([x_t; context vector; h~_{t-1}])
        h~_t = tanh(W [attention(h_t); h_t])

    The context vector is there with ``context="every_step"``, and h~ with input feeding. Without
    attention h~ is h.

    Args:
        config: The model's.

    Reference: Luong et al., 2015. https://arxiv.org/abs/1508.04025
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        E, H = config.embedding_size, config.hidden_size
        self.sees_context = config.context == "every_step"
        self.feeds = config.input_feeding
        self.dropout = config.dropout
        self.embedding_size, self.hidden_size = E, H
        self.bridge = Bridge(config)
        self.recurrence = RecurrentLayers(
            config.cell,
            E + H * self.sees_context + H * self.feeds,
            H,
            config.num_decoder_layers,
            dropout=config.dropout,
        )
        self.attention: RecurrentAttention | None = None
        self.combination: nn.Linear | None = None
        if config.attention != "none":
            self.attention = RecurrentAttention(
                config.attention,
                H,
                H,
                attention_size=config.attention_size or H,
                num_heads=config.attention_heads,
                location_filters=config.location_filters,
                location_width=config.location_width,
                coverage=config.coverage,
                monotonic=config.monotonic,
            )
            self.combination = nn.Linear(self.attention.context_size + H, H, bias=False)

    def begin(self, encoded: Encoded) -> Beginning:
        """Make once what every step needs of the sources."""
        state, context = self.bridge(encoded)
        memory = None
        if self.attention is not None:
            memory = self.attention.read(encoded.memory, encoded.lengths)
        return Beginning(state, context, memory)

    def forward(self, x: Tensor, beginning: Beginning) -> Decoded:
        """All steps ``[B, T, E]`` at once, or one after the other with input feeding."""
        x = self.inputs(x, beginning.context)
        if self.feeds:
            return self._unroll(x, beginning)
        state, _ = self.recurrence(x, state=beginning.state)
        if self.attention is None:
            return Decoded(self._drop(state), state, None, None)
        memory = beginning.memory
        context, weights, _ = self.attention(state, memory, self.attention.initial(memory))
        return Decoded(self._combine(context, state), state, context, weights)

    def carry(self, beginning: Beginning, beam_size: int = 1) -> Carried:
        """What the first step of K targets a source begins with."""
        state, K = beginning.state, beam_size
        feed = attention = None
        if self.feeds:
            feed = beginning.context.new_zeros(len(beginning.context), K, self.hidden_size)
        if self.attention is not None:
            attention = self.attention.initial(beginning.memory, K)
        recurrent = tuple(part.repeat_interleave(K, dim=1) for part in state)
        return Carried(recurrent, feed, attention)

    def inputs(self, x: Tensor, context: Tensor) -> Tensor:
        """Embeddings ``[B, T, E]``, with the context vector ``[B, H]`` where every step sees it."""
        if not self.sees_context:
            return x
        return torch.cat([x, context[:, None].expand(-1, x.size(1), -1)], dim=2)

    def step(
        self, x: Tensor, carried: Carried, memory: Any, gates: Tensor | None = None
    ) -> tuple[Decoded, Carried]:
        """One step of K targets for each of B sources.

        Args:
            x: ``[B, K, ...]``: from ``inputs``.
            carried: From ``carry`` or the step before.
            memory: ``Beginning.memory``.
            gates: ``[B, K, G]``: ``recurrence.input_gates(x)``, where it was made for all steps
                of input feeding.
        """
        B, K, _ = x.shape
        if gates is not None and carried.feed is not None:
            rows, recurrent = self.recurrence.step(
                carried.feed.flatten(0, 1), carried.recurrent, gates.flatten(0, 1)
            )
        else:
            if carried.feed is not None:
                x = torch.cat([x, carried.feed], dim=2)
            rows, recurrent = self.recurrence.step(x.flatten(0, 1), carried.recurrent)
        state = rows.view(B, K, -1)
        if self.attention is None:
            decoded = Decoded(self._drop(state), state, None, None)
            return decoded, Carried(recurrent, None, None)
        context, weights, attention = self.attention.step(state, memory, carried.attention)
        hidden = self._combine(context, state)
        feed = hidden if self.feeds else None
        return Decoded(hidden, state, context, weights), Carried(recurrent, feed, attention)

    def _unroll(self, x: Tensor, beginning: Beginning) -> Decoded:
        gates = self.recurrence.input_gates(x)
        carried = self.carry(beginning)
        steps: list[Decoded] = []
        for t in range(x.size(1)):
            now = slice(t, t + 1)
            decoded, carried = self.step(x[:, now], carried, beginning.memory, gates[:, now])
            steps.append(decoded)
        return join(steps)

    def _combine(self, context: Tensor, state: Tensor) -> Tensor:
        assert self.combination is not None
        return self._drop(self.combination(torch.cat([context, state], dim=-1)).tanh())

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def join(steps: list[Decoded]) -> Decoded:
    """Steps ``[B, 1, ...]`` one behind the other."""
    hidden, state, context, weights = (
        None if column[0] is None else torch.cat(column, dim=1)
        for column in zip(*steps, strict=True)
    )
    assert hidden is not None
    assert state is not None
    return Decoded(hidden, state, context, weights)
