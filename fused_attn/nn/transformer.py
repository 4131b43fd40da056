"""The encoder-decoder Transformer of ``torch.nn``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._residual import Norm, make_norm
from .transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder, TransformerEncoderLayer

_NAME = "Transformer"


class Transformer(nn.Module):
    """``torch.nn.Transformer`` on the fused kernels: same constructor and parameters.

    Args:
        d_model: E, a multiple of ``nhead``.
        nhead: Attention heads.
        num_encoder_layers: Layers of the encoder.
        num_decoder_layers: Layers of the decoder.
        dim_feedforward: Width of the feed-forward networks' hidden layer.
        dropout: Probability of dropout in training.
        activation: As in ``TransformerEncoderLayer``.
        custom_encoder: Instead of the encoder; called as ``TransformerEncoder`` is.
        custom_decoder: Instead of the decoder; called as ``TransformerDecoder`` is.
        layer_norm_eps: Added to the variance.
        batch_first: Sequences are ``[B, S, E]``, and not ``[S, B, E]``.
        norm_first: Normalise the input of each branch instead of the sum after it.
        bias: Learn a bias in projections and normalisations.
        device: Of the parameters.
        dtype: Of the parameters.
        norm: As in ``TransformerEncoderLayer``.

    Raises:
        ValueError: A number is out of range, or no activation or norm has that name.

    Reference: Vaswani et al., 2017. https://arxiv.org/abs/1706.03762
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
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
        # In torch.nn's order: parameters are drawn in it and listed in it.
        if custom_encoder is not None:
            self.encoder = custom_encoder
        else:
            encoder_layer = TransformerEncoderLayer(
                d_model,
                nhead,
                dim_feedforward,
                dropout,
                activation,
                layer_norm_eps,
                batch_first,
                norm_first,
                bias,
                device,
                dtype,
                norm=norm,
            )
            encoder_norm = make_norm(
                norm, d_model, layer_norm_eps, bias, device, dtype, owner=_NAME
            )
            self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, encoder_norm)
        if custom_decoder is not None:
            self.decoder = custom_decoder
        else:
            decoder_layer = TransformerDecoderLayer(
                d_model,
                nhead,
                dim_feedforward,
                dropout,
                activation,
                layer_norm_eps,
                batch_first,
                norm_first,
                bias,
                device,
                dtype,
                norm=norm,
            )
            decoder_norm = make_norm(
                norm, d_model, layer_norm_eps, bias, device, dtype, owner=_NAME
            )
            self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, decoder_norm)
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first
        self._reset_parameters()

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        src_lengths: Tensor | None = None,
        tgt_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> Tensor:
        """Encode ``src`` and decode ``tgt`` over it.

        Args:
            src: ``[B, S, E]`` with ``batch_first``, else ``[S, B, E]``; unbatched ``[S, E]``.
            tgt: ``[B, T, E]``, ``[T, B, E]`` or ``[T, E]``.
            src_mask: ``[S, S]`` or ``[B * H, S, S]``; True is ignored, a float is added to the
                logits.
            tgt_mask: ``[T, T]`` or ``[B * H, T, T]``, likewise.
            memory_mask: ``[T, S]`` or ``[B * H, T, S]``, likewise.
            src_key_padding_mask: ``[B, S]``; True is ignored, a float is added to the logits.
            tgt_key_padding_mask: ``[B, T]``, likewise.
            memory_key_padding_mask: ``[B, S]``, likewise; usually ``src_key_padding_mask`` again.
            src_is_causal: Whether ``src_mask`` is the causal one. Default: find out.
            tgt_is_causal: Likewise, of ``tgt_mask``. True needs no mask.
            memory_is_causal: Whether ``memory_mask`` is the causal one.
            src_lengths: ``[B]``; see ``TransformerEncoder.forward``.
            tgt_lengths: ``[B]``; see ``TransformerDecoder.forward``.
            memory_lengths: ``[B]``. Default: ``src_lengths``.

        Returns:
            Shape of ``tgt``.

        Raises:
            TypeError: A mask is neither bool nor floating point.
            ValueError: Shapes disagree.
        """
        E = self.d_model
        for name, tensor in (("src", src), ("tgt", tgt)):
            if tensor.dim() not in (2, 3) or tensor.size(-1) != E:
                length = name[0].upper() if name == "src" else "T"
                layout = f"[B, {length}, E]" if self.batch_first else f"[{length}, B, E]"
                raise ValueError(
                    f"{_NAME}: {name} must have shape {layout} or [{length}, E] with E = {E}, got "
                    f"{list(tensor.shape)}"
                )
        batch = 0 if self.batch_first else 1
        if src.dim() != tgt.dim() or (src.dim() == 3 and src.size(batch) != tgt.size(batch)):
            raise ValueError(
                f"{_NAME}: tgt must have the batch of src, {list(src.shape)}, got {list(tgt.shape)}"
            )
        if memory_lengths is None:
            memory_lengths = src_lengths
        # A custom encoder or decoder need not know lengths.
        encoder_lengths = {} if src_lengths is None else {"src_lengths": src_lengths}
        decoder_lengths = {
            name: lengths
            for name, lengths in (("tgt_lengths", tgt_lengths), ("memory_lengths", memory_lengths))
            if lengths is not None
        }
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
            **encoder_lengths,
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
            **decoder_lengths,
        )

    @staticmethod
    def generate_square_subsequent_mask(
        sz: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The causal mask ``[sz, sz]``: -inf above the diagonal, else 0."""
        return torch.full((sz, sz), -torch.inf, device=device, dtype=dtype).triu(1)

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
