"""Layer normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn

from fused_attn.ops import add_layer_norm


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` on the fused kernel: same constructor, parameters and results."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[..., *normalized_shape]``; shape and dtype stay."""
        output, _ = _normalise(self, input, None, dropout_p=0.0, return_sum=False)
        return output


class AddLayerNorm(nn.LayerNorm):
    """``LayerNorm(residual + dropout(x))`` in one kernel; its state dict is ``LayerNorm``'s.

    Args:
        normalized_shape: As in ``torch.nn.LayerNorm``, like all up to ``dtype``.
        eps: Added to the variance.
        elementwise_affine: Learn a weight and a bias.
        bias: Learn a bias, where ``elementwise_affine`` holds.
        device: Of the parameters.
        dtype: Of the parameters.
        dropout: Probability that an element of ``x`` is dropped in training, in [0, 1).
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"AddLayerNorm: dropout must be in [0, 1), got {dropout}")
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = dropout

    def forward(  # type: ignore[override]  # returns the sum as well when asked
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        dropout_p: float | None = None,
        return_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Add and normalise.

        Where ``x`` and ``residual`` have different dtypes, as under autocast, the sum and the
        result have the wider one; under a GPU's autocast they are fp32, as in ``torch``.

        Args:
            x: ``[..., *normalized_shape]``, the branch.
            residual: Shape of ``x``; default: none.
            dropout_p: Overrides the module's own dropout, whether or not it is in training.
            return_sum: Return ``residual + dropout(x)`` as well.

        Returns:
            Shape of ``x``; with ``return_sum`` also the sum, likewise.

        Raises:
            ValueError: Shapes disagree or ``dropout_p`` is out of range.
        """
        if dropout_p is None:
            dropout_p = self.dropout if self.training else 0.0
        output, total = _normalise(self, x, residual, dropout_p, return_sum)
        return (output, total) if return_sum else output

    def extra_repr(self) -> str:
        """Constructor arguments, as ``repr`` shows them."""
        return f"{super().extra_repr()}, dropout={self.dropout}"


def _normalise(
    module: nn.LayerNorm, x: Tensor, residual: Tensor | None, dropout_p: float, return_sum: bool
) -> tuple[Tensor, Tensor]:
    """Output and sum; the sum is the output where it was not asked for."""
    name = type(module).__name__
    shape = x.shape
    inner = tuple(module.normalized_shape)
    if x.dim() < len(inner) or tuple(shape[x.dim() - len(inner) :]) != inner:
        raise ValueError(
            f"{name}: input must have shape [..., {', '.join(map(str, inner))}], got {list(shape)}"
        )
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"{name}: residual must have the shape of x, {list(shape)}, got {list(residual.shape)}"
        )
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    # On GPUs torch's autocast runs layer_norm in fp32; on the CPU only its promotion is seen.
    if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    x = x.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    if len(inner) > 1:
        x = x.flatten(-len(inner))
        residual = None if residual is None else residual.flatten(-len(inner))
    result = add_layer_norm(
        x,
        residual,
        _flat_parameter(module.weight, dtype),
        _flat_parameter(module.bias, dtype),
        eps=module.eps,
        dropout_p=dropout_p,
        return_sum=return_sum,
    )
    output, total = result if isinstance(result, tuple) else (result, result)
    return output.reshape(shape), total.reshape(shape)


def _flat_parameter(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The parameter as ``[E]``, in a dtype that the op takes beside an input of ``dtype``."""
    if parameter is None:
        return None
    if parameter.dtype not in (dtype, torch.float32):
        parameter = parameter.to(dtype)
    return parameter.flatten()
