"""The Transformer's encoder layer and the stack of them."""

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


class TransformerEncoderLayer(nn.Module):
    """``torch.nn.TransformerEncoderLayer`` on the fused kernels: same constructor and parameters.

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
        batch_first: Sequences are ``[B, S, E]``, and not ``[S, B, E]``.
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
        function = activation_function(name, activation)
        hidden = hidden_width(dim_feedforward, function)
        self.linear1 = nn.Linear(d_model, hidden, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
        self.norm_first = norm_first
        self.norm1 = new_norm()
        self.norm2 = new_norm()
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = function

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        src_lengths: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        block_mask: BlockMask | None = None,
    ) -> Tensor:
        """Encode one layer further.

        Args:
            src: ``[B, S, E]`` with ``batch_first``, else ``[S, B, E]``; unbatched ``[S, E]``.
            src_mask: ``[S, S]`` or ``[B * H, S, S]``; True is ignored, a float is added to the
                logits.
            src_key_padding_mask: ``[B, S]``; True is ignored, a float is added to the logits.
            is_causal: See ``MultiheadAttention.forward``.
            src_lengths: ``[B]``: attention skips what lies behind. The output there is finite
                for finite input, and otherwise unspecified.
            window: ``(left, right)``: how far self-attention looks to both sides; None: no limit.
            block_mask: Tiles of a mask of self-attention, made once for all layers.

        Returns:
            Shape of ``src``.

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
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                is_causal=is_causal,
                query_lengths=src_lengths,
                key_lengths=src_lengths,
                window=window,
                block_mask=block_mask,
            )

        batch_first = self.self_attn.batch_first
        norms = (self.norm1, self.norm2)
        return connect(
            src,
            (
                Sublayer(self_attention, self.norm1, self.dropout1),
                Sublayer(functools.partial(feed_forward, self), self.norm2, self.dropout2),
            ),
            self.norm_first,
            padding_for(norms, src, src_key_padding_mask, src_lengths, batch_first),
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward network alone: ``[..., E]`` to ``[..., E]``."""
        return feed_forward(self, x).total()


class TransformerEncoder(nn.Module):
    """``torch.nn.TransformerEncoder``: a stack of copies of a layer.

    Args:
        encoder_layer: Copied ``num_layers`` times, with its parameters.
        num_layers: How many.
        norm: Applied to the last layer's output. Default: none.
        enable_nested_tensor: Taken for compatibility, without effect: padding costs no attention
            work where ``src_lengths`` are given.
        mask_check: Likewise.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        self.mask_check = mask_check

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        src_lengths: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        block_mask: BlockMask | None = None,
    ) -> Tensor:
        """Encode.

        Args:
            src: ``[B, S, E]`` with ``batch_first``, else ``[S, B, E]``; unbatched ``[S, E]``.
            mask: ``[S, S]`` or ``[B * H, S, S]``; True is ignored, a float is added to the
                logits.
            src_key_padding_mask: ``[B, S]``; True is ignored, a float is added to the logits.
            is_causal: Whether ``mask`` is the causal one. Default: find out.
            src_lengths: ``[B]``: attention skips what lies behind, and NaN there reaches neither
                the output in front of it nor any gradient. The output behind is unspecified.
            window: ``(left, right)``: how far self-attention looks to both sides; None: no limit.
            block_mask: Tiles of a mask of self-attention, made once for all layers.

        Returns:
            Shape of ``src``.

        Raises:
            TypeError: A mask is neither bool nor floating point.
            ValueError: Shapes disagree.
        """
        is_causal = detect_causal(mask, is_causal)
        # A layer of another make need not know what torch.nn does not have.
        options = {"src_lengths": src_lengths, "window": window, "block_mask": block_mask}
        given = {name: option for name, option in options.items() if option is not None}
        x = clear_padding(src, src_lengths, self.layers)
        for layer in self.layers:
            x = layer(
                x,
                src_mask=mask,
                is_causal=is_causal,
                src_key_padding_mask=src_key_padding_mask,
                **given,
            )
        return final_norm(self.norm, x, src_key_padding_mask, src_lengths, self.layers)
