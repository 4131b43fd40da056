"""A plain function as a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class FunctionState:
    """Sources and the targets so far, padded."""

    source: Tensor
    """``[B, S, ...]``."""
    source_lengths: Tensor
    """``[B]``."""
    targets: Tensor
    """``[B, K, T]`` int64."""
    target_lengths: Tensor
    """``[B]`` int64."""


class FunctionDecoder:
    """Lets generation drive a function of whole targets: a model without a cache, or none at all.

    Args:
        function: From sources ``[N, S]``, their lengths ``[N]``, targets ``[N, T]``, which begin
            with ``bos_token``, and their lengths ``[N]``, in 1..T, to logits ``[N, V]`` of the
            token that follows each target. N is B * K.
        bos_token: Begins every target.
        eos_token: Ends a target.
        max_length: Most tokens in a source, and most steps. Default: no limit.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        *,
        bos_token: int,
        eos_token: int,
        max_length: int | None = None,
    ) -> None:
        self._function = function
        self.bos_token, self.eos_token, self.max_length = bos_token, eos_token, max_length

    def start(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> FunctionState:
        """See ``fused_attn.generation.Decoder``; so are the other methods."""
        B = len(source)
        return FunctionState(
            source,
            source_lengths,
            torch.zeros(B, beam_size, 0, dtype=torch.int64, device=source.device),
            torch.zeros(B, dtype=torch.int64, device=source.device),
        )

    def step(self, tokens: Tensor, state: FunctionState) -> tuple[Tensor, FunctionState]:
        """Append tokens, and call the function with all targets."""
        B, K = tokens.shape
        if int(state.target_lengths.max()) == state.targets.size(2):
            state.targets = F.pad(state.targets, (0, 1), value=self.eos_token)
        at = state.target_lengths[:, None, None].expand(-1, K, 1)
        state.targets = state.targets.scatter(2, at, tokens[:, :, None])
        state.target_lengths = state.target_lengths + 1
        logits = self._function(
            state.source.repeat_interleave(K, dim=0),
            state.source_lengths.repeat_interleave(K),
            state.targets.flatten(0, 1),
            state.target_lengths.repeat_interleave(K),
        )
        return logits.unflatten(0, (B, K)), state

    def reorder(
        self, state: FunctionState, parents: Tensor, sentences: Tensor | None = None
    ) -> FunctionState:
        """Let targets continue others."""
        if sentences is not None:
            state = FunctionState(*(tensor[sentences] for tensor in vars(state).values()))
        index = parents[:, :, None].expand(-1, -1, state.targets.size(2))
        state.targets = state.targets.gather(1, index)
        return state

    def replace(
        self, state: FunctionState, sentences: Tensor, other: FunctionState
    ) -> FunctionState:
        """Let fresh sources take places."""
        S = max(state.source.size(1), other.source.size(1))
        T = max(state.targets.size(2), other.targets.size(2))
        source, arriving = (
            F.pad(x, (*[0, 0] * (x.dim() - 2), 0, S - x.size(1)))
            for x in (state.source, other.source)
        )
        targets, fresh = (
            F.pad(x, (0, T - x.size(2)), value=self.eos_token)
            for x in (state.targets, other.targets)
        )
        return FunctionState(
            source.index_copy(0, sentences, arriving),
            state.source_lengths.index_copy(0, sentences, other.source_lengths),
            targets.index_copy(0, sentences, fresh),
            state.target_lengths.index_copy(0, sentences, other.target_lengths),
        )
