"""The parts of the recurrent encoder-decoder, and how they fit together."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.ops import copy_distribution

from .rnn_config import POINTER_VOCABULARY, RNNSeq2SeqConfig
from .rnn_decoder import Beginning, Decoded, RNNDecoder
from .rnn_encoder import FrontEnd, RNNEncoder
from .rnn_initialization import initialize
from .rnn_output import CopyScores, EndProjection, GenerationGate

_NAME = "RNNSeq2Seq"


class DecoderOutputs(NamedTuple):
    """What a loss needs of teacher-forced targets."""

    hidden: Tensor
    """``[B, T, H]``: what ``project`` takes."""
    attention: Tensor | None
    """``[B, T, S']`` fp32: where each step looked; None without attention."""
    copy: Tensor | None
    """``[B, T, S']``: weights (pointer-generator) or scores (CopyNet, pointer network) of copying;
    None where nothing is copied."""
    gate: Tensor | None
    """``[B, T]``: a pointer-generator's logit of generating."""


class Sources(Protocol):
    """What embedding and copying look at in every step."""

    @property
    def lengths(self) -> Tensor | None:
        """``[B]``: of what the encoder made; None where all are S'."""
        ...

    @property
    def keys(self) -> Tensor | None:
        """``[B, S', A]``: of a copying head that has scores of its own."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """``[B, S']``: the extended token that copying a position writes."""
        ...

    @property
    def table(self) -> Tensor | None:
        """``[B, 3 + S', E]``: a pointer network's embeddings."""
        ...


class Reading(NamedTuple):
    """Sources that were read; they are ``Sources``."""

    beginning: Beginning
    lengths: Tensor | None
    keys: Tensor | None
    tokens: Tensor | None
    table: Tensor | None


class RNNNetwork(nn.Module):
    """What ``RNNSeq2Seq`` is made of: reading, embedding, and what states are turned into.

    Args:
        config: The model's shape; kept as ``config``.
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        E, H = config.embedding_size, config.hidden_size
        # A shared matrix is registered once, as the target's embedding.
        self.target_embedding = nn.Embedding(config.target_vocab_size, E, config.pad_token)
        self.source_embedding: nn.Embedding | None = None
        self.front_end: FrontEnd | None = None
        if config.source_features > 0:
            self.front_end = FrontEnd(
                config.front_end, config.source_features, E, config.time_reduction
            )
        elif config.tie_embeddings != "all":
            self.source_embedding = nn.Embedding(config.source_vocab_size, E, config.pad_token)
        self.encoder = RNNEncoder(config)
        self.decoder = RNNDecoder(config)
        self.output_projection: nn.Module | None = None
        self.copy_scores: CopyScores | None = None
        self.position_embedding: nn.Linear | None = None
        self.generation_gate: GenerationGate | None = None
        if config.output == "pointer":
            self.output_projection = EndProjection(H, config.eos_token)
            self.position_embedding = nn.Linear(H, E)
        elif config.tie_embeddings == "none":
            self.output_projection = nn.Linear(H, config.target_vocab_size, bias=False)
        if config.output in ("copynet", "pointer"):
            self.copy_scores = CopyScores(config)
        if config.output == "pointer_generator":
            self.generation_gate = GenerationGate(config, H)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, by ``config.initialization``."""
        initialize(self, self.config.initialization)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., H]``, without what is copied."""
        if self.output_projection is None:
            return F.linear(hidden, self.target_embedding.weight)
        return self.output_projection(hidden)

    # --- reading ----------------------------------------------------------------------------

    def _read(self, source: Tensor, source_lengths: Tensor | None) -> Reading:
        self._check_source(source)
        lengths = source_lengths
        if self.front_end is not None:
            x, lengths = self.front_end(source, source_lengths)
        else:
            embedding = self.source_embedding or self.target_embedding
            x = self._lookup(source, embedding)
        encoded = self.encoder(self._drop(x), lengths)
        keys = tokens = table = None
        if self.copy_scores is not None:
            keys = self.copy_scores.read(encoded.memory)
        if self.config.copies:
            tokens = self._copied_tokens(source, encoded.memory.size(1))
        if self.position_embedding is not None:
            words = self.target_embedding.weight.expand(len(source), -1, -1)
            table = torch.cat([words, self.position_embedding(encoded.memory)], dim=1)
        return Reading(self.decoder.begin(encoded), lengths, keys, tokens, table)

    def _copied_tokens(self, source: Tensor, positions: int) -> Tensor:
        """``[B, S']``: the extended token that each source position would write."""
        if self.config.output != "pointer":
            return source
        first = POINTER_VOCABULARY
        index = torch.arange(first, first + positions, device=source.device)
        return index.expand(len(source), -1)

    def _positions(self, source_lengths: Tensor | None) -> Tensor | None:
        """From lengths of sources to those of the memory."""
        if source_lengths is None:
            return None
        r = self.config.time_reduction
        return (source_lengths + r - 1) // r

    def _lookup(self, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        if self.config.extra_tokens > 0:
            is_outside = tokens >= self.config.target_vocab_size
            tokens = tokens.masked_fill(is_outside, self.config.unknown_token)
        return embedding(tokens)

    def _embed(self, tokens: Tensor, sources: Sources) -> Tensor:
        """``[B, T, E]`` of target tokens ``[B, T]``."""
        table = sources.table
        if table is None:
            return self._lookup(tokens, self.target_embedding)
        return table.gather(1, tokens[:, :, None].expand(-1, -1, table.size(2)))

    # --- writing ----------------------------------------------------------------------------

    def _finish(self, decoded: Decoded, x: Tensor, sources: Sources) -> DecoderOutputs:
        """Let the copying head look at the steps ``[B, T, ...]`` with inputs ``[B, T, E]``."""
        copy = gate = None
        if self.copy_scores is not None:
            assert sources.keys is not None
            copy = self.copy_scores(decoded.hidden, sources.keys, sources.lengths)
        elif self.generation_gate is not None:
            assert decoded.context is not None
            copy = decoded.weights
            gate = self.generation_gate(decoded.context, decoded.state, x)
        return DecoderOutputs(decoded.hidden, decoded.weights, copy, gate)

    def _predict(self, outputs: DecoderOutputs, sources: Sources) -> Tensor:
        """Logits ``[B, T, V]`` or log-probabilities ``[B, T, V + ...]``."""
        logits = self.project(outputs.hidden)
        if outputs.copy is None:
            return logits
        assert sources.tokens is not None
        return copy_distribution(
            logits,
            outputs.copy,
            sources.tokens[:, None],
            outputs.gate,
            extended_size=self.config.extended_size,
            source_lengths=sources.lengths,
        )

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _looked(self, outputs: DecoderOutputs, sources: Sources) -> Tensor | None:
        """``[B, T, S']``: weights of attention, or of copying where there is none."""
        if outputs.attention is not None or outputs.copy is None:
            return outputs.attention
        scores = outputs.copy.float()
        if sources.lengths is None:
            return scores.softmax(dim=-1)
        index = torch.arange(scores.size(2), device=scores.device)
        behind = (index >= sources.lengths[:, None])[:, None]
        # Finite, so that a source of length 0 has weights 0 and no NaN.
        lowest = torch.finfo(torch.float32).min
        return scores.masked_fill(behind, lowest).softmax(dim=-1).masked_fill(behind, 0.0)

    # --- checks -----------------------------------------------------------------------------

    def _check_source(self, source: Tensor) -> None:
        features = self.config.source_features
        if features == 0:
            if source.dim() != 2:
                raise ValueError(
                    f"{_NAME}: source must have shape [B, S], got {list(source.shape)}"
                )
        elif source.dim() != 3 or source.size(2) != features:
            raise ValueError(
                f"{_NAME}: source must have shape [B, S, F] with F = {features} "
                f"(config.source_features), got {list(source.shape)}"
            )
        self._check_length("source", source)

    def _check_length(self, name: str, sequence: Tensor) -> None:
        if sequence.size(1) > self.config.max_length:
            raise ValueError(
                f"{_NAME}: {name} must have at most {self.config.max_length} positions "
                f"(config.max_length), got {sequence.size(1)}"
            )
