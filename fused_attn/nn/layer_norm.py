"""Normalisation over the features, alone and fused with the residual addition before it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Size, Tensor, nn

from fused_attn.ops import add_layer_norm

from ._norm_inputs import check_residual, check_trailing, flat_parameter, promoted


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` on the fused kernel: same constructor, parameters and results.

    Given a residual, it adds and normalises in one kernel.
    """

    def forward(  # type: ignore[override]  # returns the sum as well when asked
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = False,
        fp32_sum: bool = False,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``residual + dropout(input + x_bias)``.

        Where ``input`` and ``residual`` have different dtypes, as under autocast, the sum and the
        result have the wider one; under a GPU's autocast they are fp32, as in ``torch``. With
        ``fp32_sum`` the result keeps the dtype of ``input``.

        Args:
            input: ``[..., *normalized_shape]``, the branch.
            residual: Shape of ``input``; default: none.
            x_bias: ``normalized_shape``: the bias of the linear layer that made ``input``.
            dropout_p: Probability that an element of ``input + x_bias`` is dropped, in [0, 1),
                whether or not the module is in training.
            return_sum: Return the sum as well.
            fp32_sum: Return it in fp32.
            padding: ``[...]`` without the normalised dimensions. Taken because other
                normalisations need it; a row is normalised by itself here.

        Returns:
            Shape of ``input``; with ``return_sum`` also the sum, likewise.

        Raises:
            ValueError: Shapes disagree or ``dropout_p`` is out of range.
        """
        return _normalise(
            self,
            input,
            residual,
            bias=self.bias,
            norm="layer_norm",
            eps=self.eps,
            x_bias=x_bias,
            dropout_p=dropout_p,
            return_sum=return_sum,
            fp32_sum=fp32_sum,
        )


class AddLayerNorm(LayerNorm):
    """``LayerNorm`` with a dropout of its own: ``LayerNorm(residual + dropout(x))``.

    Its state dict is ``LayerNorm``'s.

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

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        dropout_p: float | None = None,
        return_sum: bool = False,
        fp32_sum: bool = False,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Add and normalise: ``LayerNorm.forward``.

        Args:
            x: ``[..., *normalized_shape]``, the branch.
            residual: As there, like what follows.
            x_bias: As there.
            dropout_p: Overrides the module's own dropout, whether or not it is in training.
            return_sum: As there.
            fp32_sum: As there.
            padding: As there.
        """
        if dropout_p is None:
            dropout_p = self.dropout if self.training else 0.0
        return super().forward(
            x,
            residual,
            x_bias=x_bias,
            dropout_p=dropout_p,
            return_sum=return_sum,
            fp32_sum=fp32_sum,
            padding=padding,
        )

    def extra_repr(self) -> str:
        """Constructor arguments, as ``repr`` shows them."""
        return f"{super().extra_repr()}, dropout={self.dropout}"


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` on the fused kernel: same constructor, parameters and results.

    Given a residual, it adds and normalises in one kernel; the call is ``LayerNorm``'s.

    Reference: Zhang and Sennrich, 2019. https://arxiv.org/abs/1910.07467
    """

    def forward(  # type: ignore[override]  # returns the sum as well when asked
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = False,
        fp32_sum: bool = False,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``residual + dropout(x + x_bias)``; see ``LayerNorm.forward``."""
        # torch's default: the machine epsilon of the type that it computes in.
        compute = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(compute).eps if self.eps is None else self.eps
        return _normalise(
            self,
            x,
            residual,
            bias=None,
            norm="rms_norm",
            eps=eps,
            x_bias=x_bias,
            dropout_p=dropout_p,
            return_sum=return_sum,
            fp32_sum=fp32_sum,
        )


def _normalise(
    module: nn.LayerNorm | nn.RMSNorm,
    x: Tensor,
    residual: Tensor | None,
    *,
    bias: Tensor | None,
    norm: Literal["layer_norm", "rms_norm"],
    eps: float,
    x_bias: Tensor | None,
    dropout_p: float,
    return_sum: bool,
    fp32_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``add_layer_norm`` over a module's trailing dimensions, in the dtypes that torch gives."""
    name = type(module).__name__
    inner = tuple(module.normalized_shape)
    shape = x.shape
    check_trailing(name, x, inner)
    check_residual(name, x, residual)
    if not fp32_sum:
        x, residual = promoted(x, residual)
        # On GPUs torch's autocast runs layer_norm in fp32; on the CPU only its promotion is seen.
        if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
            x = x.float()
            residual = None if residual is None else residual.float()
    if len(inner) > 1:
        x = x.flatten(-len(inner))
        residual = None if residual is None else residual.flatten(-len(inner))
    result = add_layer_norm(
        x,
        residual,
        flat_parameter(module.weight, x.dtype),
        flat_parameter(bias, x.dtype),
        x_bias=flat_parameter(x_bias, x.dtype),
        norm=norm,
        eps=eps,
        dropout_p=dropout_p,
        return_sum=return_sum,
        fp32_sum=fp32_sum,
    )
    if isinstance(result, tuple):
        return result[0].reshape(shape), result[1].reshape(shape)
    return result.reshape(shape)
