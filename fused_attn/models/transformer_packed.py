"""A Transformer's arithmetic for generation on a CPU, with packed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.nn._linear import Product
from fused_attn.nn.packed import (
    InferenceNorm,
    LinearFactory,
    PackedCrossAttention,
    PackedFeedForward,
    PackedSelfAttention,
)
from fused_attn.ops import attention, decode_attention

from .transformer_state import TransformerState

# Sources are padded to this: attention of fewer queries is another kernel, which sums in another
# order, and a source's bits are to be the same in a longer batch.
_FEWEST_POSITIONS = 9

Branch = Callable[[Tensor], Product]


class PackedTransformer:
    """What generation computes with a Transformer's weights, rows ``[M, E]`` all the way.

    Weights of products are copied into the layout that the product likes, twice the memory of
    theirs; embeddings, biases and normalisations are the model's own tensors. Each sublayer's
    last bias, its residual addition and the normalisation that follows, which in a pre-norm stack
    is the next sublayer's, are one kernel.

    Args:
        model: A ``fused_attn.models.Transformer`` without a ``packing_reason``.
        linear: Packs a weight: ``PackedLinear`` or ``QuantizedLinear``.
    """

    def __init__(self, model: Any, linear: LinearFactory) -> None:
        config = model.config
        self._pad_token = config.pad_token
        self._scale = math.sqrt(config.d_model)
        embedding = model.source_embedding
        self._source_embedding = model.target_embedding if embedding is None else embedding
        self._target_embedding = model.target_embedding
        self._source_positions = model.source_positions
        self._target_positions = model.target_positions
        self._norm_first = config.norm_first
        self._encoder = [
            (
                PackedSelfAttention(layer.self_attn, linear),
                PackedFeedForward(layer, linear),
            )
            for layer in model.encoder.layers
        ]
        self._encoder_norms = _norms(model.encoder, ("norm1", "norm2"))
        self._decoder = [
            (
                PackedSelfAttention(layer.self_attn, linear),
                PackedCrossAttention(layer.multihead_attn, linear),
                PackedFeedForward(layer, linear),
            )
            for layer in model.decoder.layers
        ]
        self._decoder_norms = _norms(model.decoder, ("norm1", "norm2", "norm3"))
        self._output = linear(model.output_weight, None)
        self._heads = config.num_heads
        self._head_size = config.d_model // config.num_heads

    def read(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        """Encode ``[B, S]``: ``[L, 2, B, H, S, D]``, keys and values for cross-attention."""
        B, length = source.shape
        H, D = self._heads, self._head_size
        x = F.embedding(source, self._source_embedding.weight).mul_(self._scale)
        x = x.add_(self._source_positions(0, length))
        S = max(length, _FEWEST_POSITIONS)
        x = F.pad(x, (0, 0, 0, S - length)).view(B * S, -1)
        branches: list[Branch] = []
        for self_attention, feed_forward in self._encoder:
            branches.append(_encoder_attention(self_attention, B, S, source_lengths))
            branches.append(feed_forward)
        x = _connect(x, branches, self._encoder_norms, self._norm_first)
        memory = x.new_empty(len(self._decoder), 2, B, H, length, D)
        for index, (_, cross_attention, _) in enumerate(self._decoder):
            pairs = cross_attention.key_value(x).view(B, S, 2, H, D)
            # A head's keys next to each other: every step reads them all.
            memory[index] = pairs[:, :length].permute(2, 0, 3, 1, 4)
        return memory

    def step(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Logits ``[B, K, V]`` after tokens ``[B, K]``; extends ``state.cache``."""
        position = state.cache.begin()
        x = F.embedding(tokens.flatten(), self._target_embedding.weight).mul_(self._scale)
        if position.common is not None:
            x.add_(self._target_positions(position.common, position.common + 1))
        else:
            x.add_(self._target_positions.at(position.rows))
        H, D = self._heads, self._head_size

        def self_attention(layer: PackedSelfAttention, index: int) -> Branch:
            def branch(rows: Tensor) -> Product:
                packed = layer.query_key_value(rows).view(-1, 3, H, D)
                keys, values = state.cache.append(index, position, packed[:, 1:])
                context: Any = decode_attention(
                    packed[:, 0, :, None],
                    keys,
                    values,
                    key_lengths=position.key_lengths,
                    ancestry=position.ancestry,
                )
                return layer.output(context.view(rows.shape))

            return branch

        def cross_attention(layer: PackedCrossAttention, index: int) -> Branch:
            def branch(rows: Tensor) -> Product:
                query = layer.query(rows).view(-1, H, 1, D)
                context, lse = decode_attention(
                    query,
                    state.memory[index, 0],
                    state.memory[index, 1],
                    key_lengths=state.source_lengths,
                    is_causal=False,
                    return_lse=True,
                )
                state.looked = query, lse
                return layer.output(context.view(rows.shape))

            return branch

        branches: list[Branch] = []
        for index, (to_targets, to_source, feed_forward) in enumerate(self._decoder):
            branches.append(self_attention(to_targets, index))
            branches.append(cross_attention(to_source, index))
            branches.append(feed_forward)
        x = _connect(x, branches, self._decoder_norms, self._norm_first)
        state.cache.advance()
        return self._output(x).view(*tokens.shape, -1)


def _encoder_attention(layer: PackedSelfAttention, B: int, S: int, lengths: Tensor) -> Branch:
    def branch(rows: Tensor) -> Product:
        packed = layer.query_key_value(rows).view(B, S, 3, layer.num_heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, S, D]
        context: Any = attention(query, key, value, query_lengths=lengths, key_lengths=lengths)
        merged = context.transpose(1, 2).reshape(rows.shape)
        return layer.output(merged)

    return branch


def _connect(
    x: Tensor, branches: Sequence[Branch], norms: Sequence[InferenceNorm], norm_first: bool
) -> Tensor:
    """A whole stack of residual connections; see ``fused_attn.nn._residual.connect``.

    A pre-norm stack has a norm more than branches, the last of which is the stack's own.
    """
    if not norm_first:
        for branch, norm in zip(branches, norms, strict=True):
            product, bias = branch(x)
            x = norm(product, x, bias)
        return x
    hidden = norms[0](x)
    for branch, norm in zip(branches[:-1], norms[1:-1], strict=True):
        product, bias = branch(hidden)
        hidden, x = norm(product, x, bias, return_sum=True)
    product, bias = branches[-1](hidden)
    return norms[-1](product, x, bias)


def _norms(stack: Any, names: tuple[str, ...]) -> list[InferenceNorm]:
    norms = [InferenceNorm(getattr(layer, name)) for layer in stack.layers for name in names]
    return norms if stack.norm is None else [*norms, InferenceNorm(stack.norm)]


# Elements of each weight that are compared; a prime number, for no pattern to hide between them.
_SAMPLE = 61


class Fingerprint:
    """What a model was made of, to notice a change of any weight or module.

    An optimizer's step, ``load_state_dict`` and other operations in place raise a tensor's version;
    ``.to`` and assignments change its address; a write through ``.data`` does neither, and is seen
    in a sample of each tensor's elements. Only a ``.data`` write that touches none of the sample
    stays unseen.

    Args:
        model: Its parameters are contiguous.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, list(module._modules.values()), list(module._parameters.values()))
            for module in model.modules()
        ]
        parameters = list(model.parameters())
        self._tensors = [(tensor, tensor.data_ptr(), _version(tensor)) for tensor in parameters]
        self._samples = [_sample(tensor) for tensor in parameters]
        self._values = torch.cat(self._samples)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        for module, children, parameters in self._modules:
            if not _same(module._modules, children) or not _same(module._parameters, parameters):
                return False
        for tensor, address, version in self._tensors:
            if tensor.data_ptr() != address or _version(tensor) != version:
                return False
        return torch.equal(torch.cat(self._samples), self._values)


def _same(now: dict[str, Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(
        a is b for a, b in zip(now.values(), before, strict=True)
    )


def _version(tensor: Tensor) -> int:
    # One that was made in inference mode counts no versions.
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    """A view of some elements as integers, so that a NaN equals itself."""
    flat = tensor.detach().view(torch.int32).view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
