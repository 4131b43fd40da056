"""The decoder protocol of ``fused_attn.generation``, over whatever computes the products."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .config import TransformerConfig
from .transformer_state import TransformerState


class Program(Protocol):
    """The arithmetic of generation with one set of weights."""

    def read(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        """Encode: ``[L, 2, B, H, S, D]``, keys and values for each layer's cross-attention."""
        ...

    def step(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Logits ``[B, K, V]`` after tokens ``[B, K]``; extends ``state.cache``."""
        ...


class TransformerDecoding:
    """``start``, ``step``, ``reorder`` and what else a search calls.

    See ``fused_attn.generation.Decoder``.
    """

    config: TransformerConfig

    @property
    def bos_token(self) -> int:
        """Starts every target."""
        return self.config.bos_token

    @property
    def eos_token(self) -> int:
        """Ends a target."""
        return self.config.eos_token

    @property
    def max_length(self) -> int:
        """Most tokens in a source, and in a target with its first."""
        return self.config.max_length

    @property
    def decodes_on_static_shapes(self) -> bool:
        """Whether a CUDA graph can capture ``step`` and ``reorder`` after ``reserve``.

        They then neither wait for the device nor change shapes, but for ``reorder`` with
        ``sentences``.
        """
        return True

    def _program(self) -> Program:
        raise NotImplementedError

    @torch.no_grad()
    def start(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> TransformerState:
        """Encode the sources for generation; see ``fused_attn.generation.Decoder``.

        Raises:
            RuntimeError: The model is in training mode.
            ValueError: A source is longer than ``config.max_length``.
        """
        program = self._program()
        return TransformerState(
            program,
            source_lengths.clone(),
            program.read(source, source_lengths),
            beam_size=beam_size,
            max_length=self.config.max_length,
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Append tokens ``[B, K]`` and return the next ones' logits ``[B, K, V]``.

        Computes with the weights that the model had at ``start``, or has now.

        Raises:
            ValueError: A target has ``config.max_length`` tokens already, or after ``reserve`` as
                many as there is room for.
        """
        return state.program.step(tokens, state), state

    @torch.no_grad()
    def reorder(
        self, state: TransformerState, parents: Tensor, sentences: Tensor | None = None
    ) -> TransformerState:
        """Let targets continue others; see ``fused_attn.generation.Decoder``."""
        state.reorder(parents, sentences)
        return state

    @torch.no_grad()
    def replace(
        self, state: TransformerState, sentences: Tensor, other: TransformerState
    ) -> TransformerState:
        """Let new sources take the place of others; see ``fused_attn.generation.Decoder``.

        Copies what ``other`` holds, and the state's source keys where a new source is longer than
        any before; reads ``sentences`` back from the device.

        Args:
            state: What ``start``, ``step``, ``reorder`` or ``replace`` returned last.
            sentences: ``[N]`` int64, without repetition: the sources that leave.
            other: N sources from ``start`` with the same beam size, no step made. Source i takes
                the place of ``sentences[i]``, its targets empty; the others go on.

        Raises:
            ValueError: The states do not fit.
        """
        state.replace(sentences, other)
        return state

    @torch.no_grad()
    def cross_attention(self, state: TransformerState) -> Tensor:
        """Where each target looked in the last step: ``[B, K, S]``, computed when asked.

        Of the last decoder layer, the mean over its heads; 0 behind a source's length, else a row
        sums to 1.

        Raises:
            ValueError: The state was reordered since its last step, or has made none.
        """
        return state.cross_attention()

    @torch.no_grad()
    def reserve(self, state: TransformerState, capacity: int) -> TransformerState:
        """Make room for ``capacity`` positions of every target, and fix what attention sees to it.

        From then on ``step`` and ``reorder`` without ``sentences`` work on tensors of fixed shapes
        in fixed places, and the host looks at no position: a CUDA graph can capture and repeat them
        as often as there is room. Calls that change shapes (``reorder`` with ``sentences``,
        ``replace`` by longer sources, ``reserve`` of more) end a graph's validity; those and
        ``replace`` wait for the device, to learn the positions.

        Args:
            state: The state.
            capacity: Positions, up to ``config.max_length``; less than there is room for already
                changes nothing.

        Raises:
            ValueError: ``capacity`` is out of range.
        """
        state.cache.reserve(capacity)
        return state
