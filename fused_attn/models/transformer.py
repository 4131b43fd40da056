"""The encoder-decoder Transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.nn import (
    AddLayerNorm,
    LayerNorm,
    MaskedBatchNorm,
    MultiheadAttention,
    PowerNorm,
    RMSNorm,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    make_norm,
)
from fused_attn.nn import packed as layers

from ._positions import LearnedPositions, SinusoidalPositions
from .config import TransformerConfig
from .transformer_decoding import Program, TransformerDecoding
from .transformer_packed import Fingerprint, PackedTransformer
from .transformer_state import Position, TransformerState

_NAME = "Transformer"


class Transformer(TransformerDecoding, nn.Module):
    """Encoder-decoder Transformer over token indices, for training and for generation.

    Training calls ``forward`` (or ``decode`` and ``project``, to project chosen positions
    only). Generation calls ``start``, ``step``, ``reorder`` and ``replace``; see
    ``fused_attn.generation.Decoder``. Sequences are ``[B, S]`` and ``[B, T]``, padded at their
    end; positions at and behind their length are never looked at, whatever they hold, and what
    comes out there is unspecified.

    On a CPU, in fp32, generation computes with a packed copy of the weights, made by the first
    ``start`` and again by the first one after any of them changed; it is in no state dict and in
    no copy of the model. There a sentence's logits have the same bits in every batch. Where a
    module has hooks or was replaced by one of another type, the modules themselves are called.

    Embeddings are scaled by ``sqrt(d_model)`` and drawn with standard deviation
    ``d_model ** -0.5``, so that what enters the first layer is of the size of the positions;
    linear layers are Xavier-uniform with zero biases.

    Args:
        config: The model's shape; kept as ``config``.

    Reference: Vaswani et al., 2017. https://arxiv.org/abs/1706.03762
    """

    # The packed copy of the weights with what it was made of; no module, so in no state dict.
    _packed: tuple[Fingerprint, PackedTransformer] | None = None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        E = config.d_model
        # A shared matrix is registered once, as the target's embedding, so that a state dict
        # holds it once.
        self.target_embedding = nn.Embedding(config.target_vocab_size, E, config.pad_token)
        self.source_embedding: nn.Embedding | None = None
        if config.tie_embeddings != "all":
            self.source_embedding = nn.Embedding(config.source_vocab_size, E, config.pad_token)
        self.output_projection: nn.Linear | None = None
        if config.tie_embeddings == "none":
            self.output_projection = nn.Linear(E, config.target_vocab_size, bias=False)
        if config.positions == "learned":
            self.source_positions: nn.Module = LearnedPositions(config.max_length, E)
            self.target_positions: nn.Module = LearnedPositions(config.max_length, E)
        else:
            self.source_positions = SinusoidalPositions(config.max_length, E)
            self.target_positions = SinusoidalPositions(config.max_length, E)
        self.encoder = TransformerEncoder(
            TransformerEncoderLayer(E, config.num_heads, **_layer_arguments(config)),
            config.num_encoder_layers,
            norm=_final_norm(config),
        )
        self.decoder = TransformerDecoder(
            TransformerDecoderLayer(E, config.num_heads, **_layer_arguments(config)),
            config.num_decoder_layers,
            norm=_final_norm(config),
        )
        for module in self.modules():
            if isinstance(module, MultiheadAttention):
                module.dropout = config.attention_dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for stack in (self.encoder, self.decoder):
            for layer in stack.layers:
                for name, parameter in layer.named_parameters():
                    if parameter.dim() > 1:
                        nn.init.xavier_uniform_(parameter)
                    elif name.endswith("bias"):
                        nn.init.zeros_(parameter)
        std = self.config.d_model**-0.5
        for embedding in (self.source_embedding, self.target_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=std)
                with torch.no_grad():
                    embedding.weight[self.config.pad_token].zero_()
        for positions in (self.source_positions, self.target_positions):
            if isinstance(positions, LearnedPositions):
                nn.init.normal_(positions.weight, std=std)
        if self.output_projection is not None:
            nn.init.normal_(self.output_projection.weight, std=std)

    @property
    def output_weight(self) -> Tensor:
        """``[V, E]``: the output projection; the target embedding itself where they are tied."""
        projection = self.output_projection
        return self.target_embedding.weight if projection is None else projection.weight

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of each target position's next token, given the target up to it.

        Args:
            source: ``[B, S]`` token indices.
            target: ``[B, T]`` token indices, beginning with ``bos_token``.
            source_lengths: ``[B]`` int32 or int64. Default: all S.
            target_lengths: ``[B]`` likewise. Default: all T. Without them the result at valid
                positions is the same; with them, no work is spent on padding in attention.

        Returns:
            ``[B, T, V]``.

        Raises:
            ValueError: Shapes disagree or a sequence is longer than ``config.max_length``.
        """
        return self.project(self.decode(source, target, source_lengths, target_lengths))

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Encode sources ``[B, S]`` into ``[B, S, E]``.

        Raises:
            ValueError: As ``forward``.
        """
        self._check_tokens("source", source, "[B, S]")
        embedding = self.source_embedding
        weight = self.target_embedding.weight if embedding is None else embedding.weight
        x = self._embed(source, weight, self.source_positions)
        return self.encoder(x, src_lengths=source_lengths)

    def decode(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[B, T, E]``: ``forward`` without the projection onto the vocabulary.

        A loss is cheapest when only the positions that count are projected:
        ``model.project(hidden[is_token])``. Arguments and errors are those of ``forward``.
        """
        memory = self.encode(source, source_lengths)
        return self.decoder(
            self._embed_target(target, memory),
            memory,
            tgt_is_causal=True,
            tgt_lengths=target_lengths,
            memory_lengths=source_lengths,
        )

    def project(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., E]``."""
        return F.linear(hidden, self.output_weight)

    @torch.no_grad()
    def cross_attention_weights(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        *,
        layer: int = -1,
    ) -> Tensor:
        """How much each target position looks at each source position; for alignments.

        Args:
            source: ``[B, S]`` token indices.
            target: ``[B, T]`` token indices, beginning with ``bos_token``.
            source_lengths: ``[B]``. Default: all S.
            layer: Index of the decoder layer, from the end where negative.

        Returns:
            ``[B, T, S]``, the mean over the layer's heads; each row sums to 1 over its source.

        Raises:
            ValueError: As ``forward``, or there is no such layer.
        """
        stack = self.decoder.layers
        if not -len(stack) <= layer < len(stack):
            raise ValueError(
                f"{_NAME}: layer must be in {-len(stack)}..{len(stack) - 1}, got {layer}"
            )
        memory = self.encode(source, source_lengths)
        x = self._embed_target(target, memory)
        for below in stack[: layer % len(stack)]:
            x = below(x, memory, tgt_is_causal=True, memory_lengths=source_lengths)
        chosen: Any = stack[layer]
        found: list[Tensor] = []

        def self_attention(hidden: Tensor) -> Tensor:
            return chosen.self_attn(hidden, hidden, hidden, need_weights=False, is_causal=True)[0]

        def cross_attention(hidden: Tensor) -> Tensor:
            output, weights = chosen.multihead_attn(
                hidden, memory, memory, key_lengths=source_lengths
            )
            found.append(weights)
            return output

        chosen.connect(x, self_attention, cross_attention)
        return found[0]

    def align(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Where each token of a given target looks; see ``fused_attn.generation.Decoder``.

        ``cross_attention_weights`` of the last layer, 0 behind the targets' lengths.

        Args:
            source: ``[B, S]`` token indices.
            target: ``[B, T]`` token indices, beginning with ``bos_token``. Row t is of the step
                that reads ``target[:, t]`` and predicts what follows.
            source_lengths: ``[B]``. Default: all S.
            target_lengths: ``[B]``. Default: all T.

        Returns:
            ``[B, T, S]``.

        Raises:
            ValueError: As ``forward``.
        """
        weights = self.cross_attention_weights(source, target, source_lengths)
        if target_lengths is None:
            return weights
        behind = torch.arange(target.size(1), device=target.device) >= target_lengths[:, None]
        return weights.masked_fill(behind[:, :, None], 0.0)

    def _program(self) -> Program:
        """The packed copy where there can be one, made anew if a weight has changed since."""
        if self.training:
            raise RuntimeError(
                f"{_NAME}: generation needs the model in evaluation mode (model.eval()), got "
                "training mode"
            )
        if not _packs(self):
            self._packed = None
            return _Modules(self)
        if self._packed is None or not self._packed[0].holds():
            self._packed = None  # before its successor needs the memory
            self._packed = Fingerprint(self), PackedTransformer(self, layers.PackedLinear)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed copy, which is made again where it is needed."""
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state

    def _embed(self, tokens: Tensor, weight: Tensor, positions: nn.Module) -> Tensor:
        x = F.embedding(tokens, weight, self.config.pad_token) * math.sqrt(self.config.d_model)
        x = x + positions(0, tokens.size(1))
        return F.dropout(x, self.config.dropout, self.training)

    def _embed_target(self, target: Tensor, memory: Tensor) -> Tensor:
        self._check_tokens("target", target, "[B, T]")
        if target.size(0) != memory.size(0):
            raise ValueError(
                f"{_NAME}: target must have shape [B, T] with B = {memory.size(0)} (from source), "
                f"got {list(target.shape)}"
            )
        return self._embed(target, self.target_embedding.weight, self.target_positions)

    def _check_tokens(self, name: str, tokens: Tensor, layout: str) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"{_NAME}: {name} must have shape {layout}, got {list(tokens.shape)}")
        if tokens.size(1) > self.config.max_length:
            raise ValueError(
                f"{_NAME}: {name} must have at most {self.config.max_length} tokens "
                f"(config.max_length), got {tokens.size(1)}"
            )


class _Modules:
    """Generation through the model's own modules: on any device, in any dtype, whatever is hooked.

    Args:
        model: The model.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def read(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        """``[L, 2, B, H, S, D]``, keys and values for each layer's cross-attention."""
        memory = self._model.encode(source, source_lengths)
        decoder: Any = self._model.decoder
        projected = [
            layer.multihead_attn.project_key_value(memory, memory) for layer in decoder.layers
        ]
        return torch.stack([torch.stack(pair) for pair in projected])

    def step(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Logits ``[B, K, V]`` after tokens ``[B, K]``; extends ``state.cache``."""
        model = self._model
        position = state.cache.begin()
        x = F.embedding(tokens, model.target_embedding.weight) * math.sqrt(model.config.d_model)
        positions: Any = model.target_positions
        if position.common is not None:
            x = x + positions(position.common, position.common + 1)  # [B, K, E]
        else:
            x = x + positions.at(position.rows).view(x.shape)
        for index, layer in enumerate(model.decoder.layers):
            x = _layer_step(layer, x, state, index, position)
        state.cache.advance()
        if model.decoder.norm is not None:
            x = model.decoder.norm(x)
        return model.project(x)


def _layer_step(
    layer: Any, x: Tensor, state: TransformerState, index: int, position: Position
) -> Tensor:
    """Decoder layer ``index`` on the next position ``[B, K, E]`` of K targets a source.

    They are B * K rows of one query. Those of a source share its keys and values, and the part of
    their histories that is the same, without a copy of either.
    """

    def self_attention(hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, 1, hidden.size(-1))  # [B * K, 1, E]
        query, key, value = layer.self_attn.project(rows, rows, rows)
        entries = torch.stack((key[:, :, 0], value[:, :, 0]), dim=1)  # [B * K, 2, H, D]
        keys, values = state.cache.append(index, position, entries)
        output = layer.self_attn.attend_to_cache(
            query, keys, values, key_lengths=position.key_lengths, ancestry=position.ancestry
        )
        return output.view(hidden.shape)

    def cross_attention(hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, 1, hidden.size(-1))
        query = layer.multihead_attn.project_query(rows)
        output, lse = layer.multihead_attn.attend_to_cache(
            query,
            state.memory[index, 0],
            state.memory[index, 1],
            key_lengths=state.source_lengths,
            is_causal=False,
            return_lse=True,
        )
        state.looked = query, lse
        return output.view(hidden.shape)

    return layer.connect(x, self_attention, cross_attention)


_PLAIN = (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    LearnedPositions,
    SinusoidalPositions,
    AddLayerNorm,
    LayerNorm,
    MaskedBatchNorm,
    PowerNorm,
    RMSNorm,
    nn.Dropout,
    nn.Embedding,
    nn.ModuleList,
)


def packing_reason(model: Transformer) -> str:
    """Why packed weights cannot compute what the modules would; empty if they can."""
    norm_first = model.config.norm_first
    stacks: tuple[Any, ...] = (model.encoder, model.decoder)
    for stack in stacks:
        uniform = all(layer.norm_first == norm_first for layer in stack.layers)
        if not uniform or (stack.norm is not None) != norm_first:
            return "layers differ from the configuration"
    return layers.packing_reason(model, *_PLAIN)


def _packs(model: Transformer) -> bool:
    """Whether ``start`` computes with packed weights."""
    return (
        layers.packing_unavailable_reason() == ""
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and packing_reason(model) == ""
    )


def _layer_arguments(config: TransformerConfig) -> dict[str, Any]:
    return {
        "dim_feedforward": config.dim_feedforward,
        "dropout": config.dropout,
        "activation": config.activation,
        "layer_norm_eps": config.layer_norm_eps,
        "batch_first": True,
        "norm_first": config.norm_first,
        "norm": config.norm,
    }


def _final_norm(config: TransformerConfig) -> nn.Module | None:
    # A post-norm layer ends with a normalisation of its own.
    if not config.norm_first:
        return None
    return make_norm(config.norm, config.d_model, config.layer_norm_eps)
