"""What a recurrent sequence-to-sequence model makes of its states: words, copies, positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_attn.ops import additive_scores

from .rnn_config import POINTER_VOCABULARY, RNNSeq2SeqConfig


class EndProjection(nn.Module):
    """The vocabulary of a pointer network, of which only the end can be output.

    Args:
        hidden_size: H.
        end: Index of the end.
    """

    def __init__(self, hidden_size: int, end: int) -> None:
        super().__init__()
        self.end = end
        self.projection = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., 3]`` of ``[..., H]``, -inf but for the end."""
        logits = self.projection(hidden)
        before = logits.new_full((*logits.shape[:-1], self.end), -math.inf)
        behind = logits.new_full((*logits.shape[:-1], POINTER_VOCABULARY - 1 - self.end), -math.inf)
        return torch.cat([before, logits, behind], dim=-1)


class CopyScores(nn.Module):
    """How much each source position is worth copying.

        copynet:  score[t, s] = hidden_t . tanh(W memory_s)
        pointer:  score[t, s] = v . tanh(W memory_s + U hidden_t)

    Args:
        config: The model's.

    References: Gu et al., 2016. https://arxiv.org/abs/1603.06393
        Vinyals et al., 2015. https://arxiv.org/abs/1506.03134
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        H = config.hidden_size
        A = config.attention_size or H if config.output == "pointer" else H
        self.key = nn.Linear(H, A, bias=False)
        self.query: nn.Linear | None = None
        self.score_weight: nn.Parameter | None = None
        if config.output == "pointer":
            self.query = nn.Linear(H, A)
            self.score_weight = nn.Parameter(torch.empty(A))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw v anew."""
        if self.score_weight is not None:
            bound = self.score_weight.numel() ** -0.5
            nn.init.uniform_(self.score_weight, -bound, bound)

    def read(self, memory: Tensor) -> Tensor:
        """``[B, S', A]``: made of ``[B, S', H]`` once for all steps."""
        keys = self.key(memory)
        return keys if self.query is not None else keys.tanh()

    def forward(self, hidden: Tensor, keys: Tensor, lengths: Tensor | None) -> Tensor:
        """``[B, T, S']`` of states ``[B, T, H]``; what stands behind a length means nothing."""
        if self.query is None or self.score_weight is None:
            return hidden @ keys.transpose(1, 2)
        return additive_scores(self.query(hidden), keys, self.score_weight, key_lengths=lengths)


class GenerationGate(nn.Module):
    """The logit of writing a word of the vocabulary rather than one of the source.

        gate_t = w . [context_t; state_t; x_t] + b

    Args:
        config: The model's.
        context_size: C.

    Reference: See et al., 2017. https://arxiv.org/abs/1704.04368
    """

    def __init__(self, config: RNNSeq2SeqConfig, context_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(context_size + config.hidden_size + config.embedding_size, 1)

    def forward(self, context: Tensor, state: Tensor, x: Tensor) -> Tensor:
        """``[B, T]`` of ``[B, T, C]``, ``[B, T, H]`` and embedded inputs ``[B, T, E]``."""
        return self.projection(torch.cat([context, state, x], dim=-1))[..., 0]
