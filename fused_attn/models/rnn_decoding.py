"""The decoder protocol of ``fused_attn.generation`` for the recurrent encoder-decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn.nn import packed as layers

from .rnn_config import RNNSeq2SeqConfig
from .rnn_network import RNNNetwork
from .rnn_packed import PackedRows, pack, packing_reason
from .rnn_state import RNNState
from .transformer_packed import Fingerprint

_NAME = "RNNSeq2Seq"


class RNNDecoding(RNNNetwork):
    """``start``, ``step``, ``reorder`` and what else a search calls.

    See ``fused_attn.generation.Decoder``.
    """

    # The packed copy of the weights with what it was made of; no module, so in no state dict.
    _packed: tuple[Fingerprint, RNNDecoding] | None = None

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

    # --- the arithmetic ---------------------------------------------------------------------

    def begin(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> dict[str, Any]:
        """Read sources for generation."""
        reading = self._read(source, source_lengths)
        beginning = reading.beginning
        return {
            "carried": self.decoder.carry(beginning, beam_size),
            "memory": beginning.memory,
            "source_lengths": source_lengths,
            "lengths": reading.lengths,
            "context": beginning.context,
            "keys": reading.keys,
            "tokens": reading.tokens,
            "table": reading.table,
        }

    def advance(self, tokens: Tensor, state: RNNState) -> Tensor:
        """One step of generation."""
        if state.table is not None:
            # A target that has no continuation goes on with any token.
            tokens = tokens.clamp(max=state.table.size(1) - 1)
        x = self._embed(tokens, state)
        decoded, carried = self.decoder.step(
            self.decoder.inputs(x, state.context), state.carried(), state.memory
        )
        outputs = self._finish(decoded, x, state)
        state.advance(carried, self._looked(outputs, state))
        return self._predict(outputs, state)

    def _program(self) -> RNNDecoding:
        if self.training:
            raise RuntimeError(
                f"{_NAME}: generation needs the model in evaluation mode (model.eval()), got "
                "training mode"
            )
        if not _packs(self):
            self._packed = None
            return self
        if self._packed is None or not self._packed[0].holds():
            self._packed = None  # before its successor needs the memory
            twin = pack(self)
            if twin.output_projection is None:
                twin.output_projection = PackedRows(self.target_embedding.weight, None)
            self._packed = Fingerprint(self), twin
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed copy, which is made again where it is needed."""
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state


def _packs(model: RNNDecoding) -> bool:
    """Whether ``start`` computes with packed weights."""
    return (
        layers.packing_unavailable_reason() == ""
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and packing_reason(model) == ""
    )


def check_looks(config: RNNSeq2SeqConfig) -> None:
    """Raise ValueError where a model looks at no position of its source."""
    if config.attention == "none" and not config.copies:
        raise ValueError(
            f"{_NAME}: alignments need a model that attends or copies, got attention 'none' and "
            "output 'generate'"
        )


def spread(weights: Tensor, source_lengths: Tensor, reduction: int) -> Tensor:
    """From weights ``[B, T, S']`` of what the encoder sees to those of frames.

    Returns:
        ``[B, T, S' * reduction]``; a position's weight is shared by its frames in front of the
        source's length.
    """
    if reduction == 1:
        return weights
    frames = weights.repeat_interleave(reduction, dim=2)
    index = torch.arange(frames.size(2), device=weights.device)
    first = index - index % reduction
    shared_by = (source_lengths[:, None] - first).clamp(min=1, max=reduction)  # [B, S]
    frames = frames / shared_by[:, None]
    return frames.masked_fill((index >= source_lengths[:, None])[:, None], 0.0)
