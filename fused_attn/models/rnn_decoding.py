"""The decoder protocol of ``fused_attn.generation`` for the recurrent encoder-decoder."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .rnn_config import RNNSeq2SeqConfig
from .rnn_state import RNNState

_NAME = "RNNSeq2Seq"


class Program(Protocol):
    """The arithmetic of generation with one set of weights."""

    def begin(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> dict[str, Any]:
        """Read sources: what ``RNNState`` takes besides the program and the beam size."""
        ...

    def advance(self, tokens: Tensor, state: RNNState) -> Tensor:
        """Logits ``[B, K, V]`` after tokens ``[B, K]``; changes the state."""
        ...


class RNNDecoding:
    """``start``, ``step``, ``reorder`` and what else a search calls.

    See ``fused_attn.generation.Decoder``.
    """

    config: RNNSeq2SeqConfig

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
        """Most tokens or frames in a source, and most tokens in a target with its first."""
        return self.config.max_length

    @property
    def decodes_on_static_shapes(self) -> bool:
        """Whether a CUDA graph can capture ``step`` and ``reorder``.

        They neither wait for the device nor change shapes, but for ``reorder`` with ``sentences``.
        """
        return True

    def _program(self) -> Program:
        raise NotImplementedError

    @torch.no_grad()
    def start(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> RNNState:
        """Encode the sources for generation; see ``fused_attn.generation.Decoder``.

        Raises:
            RuntimeError: The model is in training mode.
            ValueError: A source has a wrong shape or is longer than ``config.max_length``.
        """
        program = self._program()
        begun = program.begin(source, source_lengths, beam_size)
        return RNNState(program, **begun, beam_size=beam_size)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: RNNState) -> tuple[Tensor, RNNState]:
        """Append tokens ``[B, K]`` and return the next ones' logits ``[B, K, V]``.

        A copying model returns log-probabilities ``[B, K, config.extended_size]``. Computes with
        the weights that the model had at ``start``, or has now.
        """
        return state.program.advance(tokens, state), state

    @torch.no_grad()
    def reorder(
        self, state: RNNState, parents: Tensor, sentences: Tensor | None = None
    ) -> RNNState:
        """Let targets continue others; see ``fused_attn.generation.Decoder``."""
        state.reorder(parents, sentences)
        return state

    @torch.no_grad()
    def replace(self, state: RNNState, sentences: Tensor, other: RNNState) -> RNNState:
        """Let new sources take the place of others; see ``fused_attn.generation.Decoder``.

        Copies what ``other`` holds, and what the state has of its sources where a new one is longer
        than any before.

        Args:
            state: What ``start``, ``step``, ``reorder`` or ``replace`` returned last.
            sentences: ``[N]`` int64, without repetition: the sources that leave.
            other: N sources from ``start`` with the same beam size, no step made.

        Raises:
            ValueError: The states do not fit.
        """
        state.replace(sentences, other)
        return state

    @torch.no_grad()
    def cross_attention(self, state: RNNState) -> Tensor:
        """Where each target looked in the last step: ``[B, K, S]``.

        The attention's weights, the mean over its heads; without attention the shares of a copying
        head's scores. A position that the encoder made of several frames gives each an equal part.
        0 behind a source's length.

        Raises:
            ValueError: The state was reordered since its last step, or has made none; or the model
                neither attends nor copies.
        """
        check_looks(self.config)
        return spread(state.cross_attention(), state.source_lengths, self.config.time_reduction)

    @torch.no_grad()
    def reserve(self, state: RNNState, capacity: int) -> RNNState:
        """Make room for positions of every target: there is nothing to do.

        ``step`` and ``reorder`` without ``sentences`` always work on tensors of fixed shapes in
        fixed places. Calls that change shapes (``reorder`` with ``sentences``, ``replace`` by
        longer sources) end a graph's validity.
        """
        return state


def check_looks(config: RNNSeq2SeqConfig) -> None:
    """Raise ValueError where a model looks at no position of its source."""
    if config.attention == "none" and not config.copies:
        raise ValueError(
            f"{_NAME}: alignments need a model that attends or copies, got attention 'none' and "
            "output 'generate'"
        )


def spread(weights: Tensor, source_lengths: Tensor | None, reduction: int) -> Tensor:
    """From weights ``[B, T, S']`` of what the encoder sees to those of frames.

    Returns:
        ``[B, T, S' * reduction]``; a position's weight is shared by its frames in front of the
        source's length.
    """
    if reduction == 1:
        return weights
    frames = weights.repeat_interleave(reduction, dim=2)
    if source_lengths is None:
        return frames / reduction
    index = torch.arange(frames.size(2), device=weights.device)
    first = index - index % reduction
    shared_by = (source_lengths[:, None] - first).clamp(min=1, max=reduction)  # [B, S]
    frames = frames / shared_by[:, None]
    return frames.masked_fill((index >= source_lengths[:, None])[:, None], 0.0)
