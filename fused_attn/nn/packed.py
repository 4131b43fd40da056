"""Linear layers for inference on a CPU whose weights lie as the matrix product reads them.

``F.linear`` rearranges its weight in every call, which at the few rows of a step of generation
costs as much as the product, and sums in an order that depends on the number of rows. oneDNN can
rearrange once, and then sums each row in one order whatever stands beside it: a row of the result
has the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fused_attn.ops import add_layer_norm, bias_activation_dropout

from ._feed_forward import fused_activation
from ._linear import HOOKS, Product
from .layer_norm import AddLayerNorm, LayerNorm, RMSNorm
from .multihead_attention import MultiheadAttention

# Rows for which oneDNN chooses the layout: a step of a batch. It serves other numbers as well.
_TYPICAL_ROWS = 64


class InferenceLinear(Protocol):
    """A linear layer ``[M, in] -> [M, out]`` that is called with rows."""

    def __call__(self, rows: Tensor, activation: str = "none") -> Tensor:
        """``rows @ weight^T + bias``, then ``"relu"`` where that is the activation."""
        ...


LinearFactory = Callable[[Tensor, Tensor | None], InferenceLinear]


def packing_unavailable_reason() -> str:
    """Why :class:`PackedLinear` cannot work in this installation; empty if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch does not offer oneDNN's linear layer with a packed weight"
    return ""


class PackedLinear:
    """``F.linear`` in fp32 with the weight in oneDNN's own layout.

    Each row of the result depends on its row of the input alone, to the last bit.

    Args:
        weight: ``[out, in]`` fp32 on the CPU; copied.
        bias: ``[out]``; kept as it is and read in every call.

    Raises:
        RuntimeError: torch lacks oneDNN.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        reason = packing_unavailable_reason()
        if reason:
            raise RuntimeError(f"PackedLinear: weight cannot be packed: {reason}")
        weight = weight.detach().contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self.bias = None if bias is None else bias.detach()
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, rows: Tensor, activation: str = "none") -> Tensor:
        """``rows @ weight^T + bias``, then the activation.

        Args:
            rows: ``[M, in]`` fp32.
            activation: ``"none"`` or ``"relu"``.
        """
        if rows.size(0) == 1:
            # A single row is another kernel of oneDNN's, which sums in another order.
            pair = rows.expand(2, -1).contiguous()
            return self._product(pair, self.weight, self.bias, activation, [], "")[:1]
        return self._product(rows, self.weight, self.bias, activation, [], "")


class PackedAttention:
    """The products of a :class:`MultiheadAttention`, its attention left to the caller.

    Args:
        module: Without a ``packing_reason``.
        linear: Packs a weight.
    """

    def __init__(self, module: MultiheadAttention, linear: LinearFactory) -> None:
        self.num_heads = module.num_heads
        self._output = linear(module.out_proj.weight, None)
        self._output_bias = module.out_proj.bias

    def output(self, context: Tensor) -> Product:
        """Output projection of merged heads ``[M, E]``, its bias left to the next kernel."""
        return Product(self._output(context), self._output_bias)


class PackedSelfAttention(PackedAttention):
    """Queries, keys and values of one sequence, in one product."""

    def __init__(self, module: MultiheadAttention, linear: LinearFactory) -> None:
        super().__init__(module, linear)
        self.query_key_value = linear(module.in_proj_weight, module.in_proj_bias)
        """``[M, E] -> [M, 3 E]``."""


class PackedCrossAttention(PackedAttention):
    """Queries of one sequence, keys and values of another."""

    def __init__(self, module: MultiheadAttention, linear: LinearFactory) -> None:
        super().__init__(module, linear)
        weight, bias, E = module.in_proj_weight, module.in_proj_bias, module.embed_dim
        self.query = linear(weight[:E], None if bias is None else bias[:E])
        """``[M, E] -> [M, E]``."""
        self.key_value = linear(weight[E:], None if bias is None else bias[E:])
        """``[M, E] -> [M, 2 E]``."""


class PackedFeedForward:
    """The feed-forward network of a Transformer layer, the last bias left to the caller.

    Args:
        layer: Has ``linear1``, ``activation`` and ``linear2``.
        linear: Packs a weight.
    """

    def __init__(self, layer: Any, linear: LinearFactory) -> None:
        fused = fused_activation(layer.activation)
        self._activation = layer.activation if fused is None else fused
        self._relu = fused is not None and fused.unit == "relu" and not fused.gated
        bias = layer.linear1.bias
        self._bias = None if fused is None or self._relu else bias
        self._hidden = linear(layer.linear1.weight, None if self._bias is not None else bias)
        self._output = linear(layer.linear2.weight, None)
        self._output_bias = layer.linear2.bias
        self._fused = fused

    def __call__(self, rows: Tensor) -> Product:
        """``[M, E] -> [M, E]`` and the bias."""
        if self._relu:
            hidden = self._hidden(rows, "relu")
        elif self._fused is None:
            hidden = self._activation(self._hidden(rows))
        else:
            hidden = bias_activation_dropout(
                self._hidden(rows),
                self._bias,
                activation=self._fused.unit,
                gated=self._fused.gated,
            )
        return Product(self._output(hidden), self._output_bias)


class InferenceNorm:
    """A normalisation of ``residual + x + x_bias``, with the parameters that the module has then.

    Args:
        module: One of ``make_norm``'s.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._name: Literal["layer_norm", "rms_norm"] | None = None
        is_flat = len(getattr(module, "normalized_shape", ())) == 1
        if type(module) in (LayerNorm, AddLayerNorm) and is_flat:
            self._name = "layer_norm"
        elif type(module) is RMSNorm and is_flat and module.eps:
            self._name = "rms_norm"

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        x_bias: Tensor | None = None,
        return_sum: bool = False,
    ) -> Any:
        """Normalised rows ``[M, E]``; with ``return_sum`` also the sum."""
        module = self._module
        if self._name is None:
            return module(x, residual, x_bias=x_bias, return_sum=return_sum)
        return add_layer_norm(
            x,
            residual,
            module.weight,
            module.bias if self._name == "layer_norm" else None,
            x_bias=x_bias,
            norm=self._name,
            eps=module.eps,
            return_sum=return_sum,
        )


def packing_reason(model: nn.Module, *types: type[nn.Module]) -> str:
    """Why packed layers cannot stand in for a model's without anybody noticing; empty if they can.

    Args:
        model: Made of this package's layers.
        types: Modules that need no packing.
    """
    known = {*types, MultiheadAttention, nn.Linear, NonDynamicallyQuantizableLinear}
    if any(getattr(torch_module, "_global" + hooks) for hooks in HOOKS):
        return "hooks are registered for all modules"
    for module in model.modules():
        kind = type(module).__name__
        if type(module) not in known:
            return f"a {kind} is no module of a plain Transformer"
        if module.training:
            return f"a {kind} is in training mode"
        if any(getattr(module, hooks) for hooks in HOOKS) or "forward" in module.__dict__:
            return f"a {kind} has hooks, or a forward of its own"
        if type(module) is MultiheadAttention and (
            module.in_proj_weight is None
            or module.bias_k is not None
            or module.add_zero_attn
            or not module.batch_first
        ):
            return "a MultiheadAttention has separate projections, more keys or another layout"
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            return f"parameters must be on the cpu, got {parameter.device.type}"
        if parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"parameters must be float32, got {dtype}"
        if parameter.layout != torch.strided or not parameter.is_contiguous():
            return "parameters must be contiguous"
    return ""
