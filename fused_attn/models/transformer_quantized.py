"""An 8-bit copy of a Transformer that only generates."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_attn.nn.quantized import QuantizedLinear, quantization_unavailable_reason

from .transformer import Transformer, packing_reason
from .transformer_decoding import Program, TransformerDecoding
from .transformer_packed import PackedTransformer

_NAME = "QuantizedTransformer"


class QuantizedTransformer(TransformerDecoding):
    """A decoder for ``fused_attn.generation`` on a CPU, made by :func:`quantize`.

    Weights of products are int8, a quarter of their memory in fp32; embeddings that are looked up,
    biases, normalisations and attention stay fp32. It is a copy: training the model further does
    not change it. It cannot be trained, moved, saved or called; what can is the model that it was
    made from.

    Args:
        model: In evaluation mode, fp32, on the CPU.
    """

    training = False

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        # All but the weights of products is copied: these are copied as integers.
        looked_up = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
        }
        shared = {
            id(parameter): parameter
            for parameter in model.parameters()
            if parameter.dim() > 1 and id(parameter) not in looked_up
        }
        self._quantized = PackedTransformer(copy.deepcopy(model, shared), QuantizedLinear)

    def _program(self) -> Program:
        return self._quantized

    def eval(self) -> QuantizedTransformer:
        """Itself: it has no other mode."""
        return self

    def align(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Where each token of a given target looks: ``[B, T, S]``; see ``Transformer.align``."""
        B, S = source.shape
        if source_lengths is None:
            source_lengths = torch.full((B,), S, dtype=torch.int64)
        state = self.start(source, source_lengths, 1)
        rows = []
        for tokens in target.unbind(1):
            _, state = self.step(tokens[:, None], state)
            rows.append(self.cross_attention(state))
        weights = torch.cat(rows, dim=1)
        if target_lengths is None:
            return weights
        behind = torch.arange(target.size(1)) >= target_lengths[:, None]
        return weights.masked_fill(behind[:, :, None], 0.0)

    def __getattr__(self, name: str) -> Any:
        if hasattr(Transformer, name):
            raise AttributeError(
                f"{_NAME}: {name} is for the model that this was made from; an 8-bit copy only "
                "generates"
            )
        raise AttributeError(f"{_NAME} has no attribute {name!r}")


def quantize(model: Transformer, dtype: Literal["int8"] = "int8") -> QuantizedTransformer:
    """An 8-bit copy of a model for generation on a CPU.

    Works wherever a search takes a decoder: ``beam_search(quantize(model), source)``. Weights get
    one scale for each output, activations one for each product, when it is computed.

    Args:
        model: In evaluation mode, fp32, on the CPU.
        dtype: ``"int8"``.

    Raises:
        TypeError: ``model`` is no ``fused_attn.models.Transformer``.
        ValueError: There is no such dtype, or the model cannot be quantised; it says why.
        RuntimeError: The model is in training mode, or torch cannot compute with 8 bits here.

    Reference: Bhandare et al., 2019. https://arxiv.org/abs/1906.00532
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"quantize: model must be a Transformer, got {type(model).__name__}")
    if dtype != "int8":
        raise ValueError(f"quantize: dtype must be 'int8', got {dtype!r}")
    if model.training:
        raise RuntimeError(
            "quantize: model must be in evaluation mode (model.eval()), got training mode"
        )
    unavailable = quantization_unavailable_reason()
    if unavailable:
        raise RuntimeError(f"quantize: model cannot be quantised: {unavailable}")
    reason = packing_reason(model)
    if reason:
        raise ValueError(f"quantize: model cannot be quantised: {reason}")
    return QuantizedTransformer(model)
