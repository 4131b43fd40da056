"""The Transformer's decoder layer and the stack of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.ops import BlockMask

from ._feed_forward import activation_function, feed_forward, hidden_width
from ._linear import Product
from ._residual import Norm, Sublayer, connect, make_norm
from ._stack import attend, clear_padding, detect_causal, final_norm, padding_for
from .multihead_attention import MultiheadAttention


class TransformerDecoderLayer(nn.Module):
    """``torch.nn.TransformerDecoderLayer`` on the fused kernels: same constructor and parameters.

    Args:
        d_model: E, a multiple of ``nhead``.
        nhead: Attention heads.
        dim_feedforward: Width of the feed-forward network's hidden layer.
        dropout: Probability of dropout in training: of attention weights, of the hidden layer
            and of each branch before it is added.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or a function; or gated,
            with twice as many outputs of the first linear layer: ``"glu"``, ``"reglu"``,
            ``"geglu"``, ``"swiglu"``.
        layer_norm_eps: Added to the variance.
        batch_first: Sequences are ``[B, T, E]``, and not ``[T, B, E]``.
        norm_first: Normalise the input of each branch instead of the sum after it.
        bias: Learn a bias in projections and normalisations.
        device: Of the parameters.
        dtype: Of the parameters.
        norm: ``"layer_norm"``, ``"rms_norm"``, ``"power_norm"``, ``"batch_norm"`` or a function
            that makes a module from E.

    Raises:
        ValueError: A number is out of range, or no activation or norm has that name.

    Reference: Vaswani et al., 2017. https://arxiv.org/abs/1706.03762
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: Norm = "layer_norm",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        new_norm = functools.partial(
            make_norm, norm, d_model, layer_norm_eps, bias, device, dtype, owner=name
        )
        # In torch.nn's order: parameters are drawn in it and listed in it.
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, device=device, dtype=dtype
        )
        self.multihead_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, device=device, dtype=dtype
        )
        function = activation_function(name, activation)
        hidden = hidden_width(dim_feedforward, function)
        self.linear1 = nn.Linear(d_model, hidden, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
        self.norm_first = norm_first
        self.norm1 = new_norm()
        self.norm2 = new_norm()
        self.norm3 = new_norm()
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = function

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        block_mask: BlockMask | None = None,
    ) -> Tensor:
        """Decode one layer further.

        Args:
            tgt: ``[B, T, E]`` with ``batch_first``, else ``[T, B, E]``; unbatched ``[T, E]``.
            memory: ``[B, S, E]``, ``[S, B, E]`` or ``[S, E]``, from the encoder.
            tgt_mask: ``[T, T]`` or ``[B * H, T, T]``; True is ignored, a float is added to the
                logits.
            memory_mask: ``[T, S]`` or ``[B * H, T, S]``, likewise.
            tgt_key_padding_mask: ``[B, T]``; True is ignored, a float is added to the logits.
            memory_key_padding_mask: ``[B, S]``, likewise.
            tgt_is_causal: See ``MultiheadAttention.forward``; needs no ``tgt_mask``.
            memory_is_causal: Likewise, of ``memory_mask``.
            tgt_lengths: ``[B]``: attention skips what lies behind. The output there is finite
                for finite input, and otherwise unspecified.
            memory_lengths: ``[B]``: attention skips what lies behind.
            window: ``(left, right)``: how far self-attention looks to both sides; None: no limit.
            block_mask: Tiles of a mask of self-attention, made once for all layers.

        Returns:
            Shape of ``tgt``.

        Raises:
            TypeError: A mask is neither bool nor floating point.
            ValueError: Shapes disagree.
        """

        def self_attention(x: Tensor) -> Product:
            return attend(
                self.self_attn,
                x,
                x,
                x,
                attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                is_causal=tgt_is_causal,
                query_lengths=tgt_lengths,
                key_lengths=tgt_lengths,
                window=window,
                block_mask=block_mask,
            )

        def cross_attention(x: Tensor) -> Product:
            return attend(
                self.multihead_attn,
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                is_causal=memory_is_causal,
                query_lengths=tgt_lengths,
                key_lengths=memory_lengths,
            )

        batch_first = self.self_attn.batch_first
        norms = (self.norm1, self.norm2, self.norm3)
        padding = padding_for(norms, tgt, tgt_key_padding_mask, tgt_lengths, batch_first)
        return self._connect(tgt, self_attention, cross_attention, padding)

    def connect(
        self,
        x: Tensor,
        self_attention: Callable[[Tensor], Tensor],
        cross_attention: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The layer around two given attentions: residuals, dropout, norms and feed-forward.

        ``forward`` is this with the layer's own attentions over whole sequences. A step of
        incremental decoding gives functions that read a cache and call ``project`` and
        ``attend`` of ``self_attn`` and ``multihead_attn``:

            def self_attention(hidden):  # [B, 1, E], normalised where norm_first holds
                q, k, v = layer.self_attn.project(hidden, hidden, hidden)
                keys, values = cache.append(k, v)
                return layer.self_attn.attend(q, keys, values)

        Args:
            x: ``[..., E]``.
            self_attention: From the first branch's input to its output, ``[..., E]`` both,
                output projection included and dropout of the branch not.
            cross_attention: Likewise, of the second branch.

        Returns:
            Shape of ``x``.
        """
        return self._connect(
            x,
            lambda hidden: Product(self_attention(hidden)),
            lambda hidden: Product(cross_attention(hidden)),
            None,
        )

    def _connect(
        self,
        x: Tensor,
        self_attention: Callable[[Tensor], Product],
        cross_attention: Callable[[Tensor], Product],
        padding: Tensor | None,
    ) -> Tensor:
        return connect(
            x,
            (
                Sublayer(self_attention, self.norm1, self.dropout1),
                Sublayer(cross_attention, self.norm2, self.dropout2),
                Sublayer(functools.partial(feed_forward, self), self.norm3, self.dropout3),
            ),
            self.norm_first,
            padding,
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward network alone: ``[..., E]`` to ``[..., E]``."""
        return feed_forward(self, x).total()


class TransformerDecoder(nn.Module):
    """``torch.nn.TransformerDecoder``: a stack of copies of a layer.

    Args:
        decoder_layer: Copied ``num_layers`` times, with its parameters.
        num_layers: How many.
        norm: Applied to the last layer's output. Default: none.
    """

    def __init__(
        self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([copy.deepcopy(decoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        block_mask: BlockMask | None = None,
    ) -> Tensor:
        """Decode.

        Args:
            tgt: ``[B, T, E]`` with ``batch_first``, else ``[T, B, E]``; unbatched ``[T, E]``.
            memory: ``[B, S, E]``, ``[S, B, E]`` or ``[S, E]``, from the encoder.
            tgt_mask: ``[T, T]`` or ``[B * H, T, T]``; True is ignored, a float is added to the
                logits.
            memory_mask: ``[T, S]`` or ``[B * H, T, S]``, likewise.
            tgt_key_padding_mask: ``[B, T]``; True is ignored, a float is added to the logits.
            memory_key_padding_mask: ``[B, S]``, likewise.
            tgt_is_causal: Whether ``tgt_mask`` is the causal one. Default: find out. True needs
                no ``tgt_mask``.
            memory_is_causal: Likewise, of ``memory_mask``.
            tgt_lengths: ``[B]``: attention skips what lies behind, and NaN there reaches neither
                the output in front of it nor any gradient. The output behind is unspecified.
            memory_lengths: ``[B]``: attention skips what lies behind, and NaN there reaches
                neither output nor gradient.
            window: ``(left, right)``: how far self-attention looks to both sides; None: no limit.
            block_mask: Tiles of a mask of self-attention, made once for all layers.

        Returns:
            Shape of ``tgt``.

        Raises:
            TypeError: A mask is neither bool nor floating point.
            ValueError: Shapes disagree.
        """
        tgt_is_causal = detect_causal(tgt_mask, tgt_is_causal)
        # A layer of another make need not know what torch.nn does not have.
        options = {
            "tgt_lengths": tgt_lengths,
            "memory_lengths": memory_lengths,
            "window": window,
            "block_mask": block_mask,
        }
        given = {name: option for name, option in options.items() if option is not None}
        x = clear_padding(tgt, tgt_lengths, self.layers)
        memory = clear_padding(memory, memory_lengths, self.layers)
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
                **given,
            )
        return final_norm(self.norm, x, tgt_key_padding_mask, tgt_lengths, self.layers)
