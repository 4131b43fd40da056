"""PowerNorm: normalisation by a running quadratic mean of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.ops import add_layer_norm

from ._norm_inputs import (
    add_residual,
    check_padding,
    check_residual,
    check_trailing,
    flat_parameter,
    promoted,
)


class PowerNorm(nn.Module):
    """Divides each feature by a running quadratic mean over the positions of past batches.

    Every position is first divided by its own root mean square (the authors' group scaling). Then,
    with psi the running quadratic mean of a feature before this step,

        out = x / psi * weight + bias,   psi^2 <- psi^2 + (1 - alpha) (mean(x^2) - psi^2)

    The gradient does not go through psi. In its stead, running statistics nu of the backward
    correct it, with y = x / psi and g = grad_out * weight:

        grad_x = (g - nu y) / psi,   nu <- nu + (1 - alpha) mean(y (g - nu y))

    For the first ``warmup_steps`` in training the quadratic mean is the batch's own, and the
    running one their average. Means are over positions that are no padding. The backward updates
    ``nu`` (a buffer), so each forward in training should have one backward.

    Args:
        num_features: E.
        eps: Added to the mean squares.
        alpha_forward: alpha of the forward, in [0, 1).
        alpha_backward: alpha of the backward, in [0, 1).
        warmup_steps: See above.
        elementwise_affine: Learn a weight and a bias.
        bias: Learn a bias, where ``elementwise_affine`` holds.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An alpha is out of range.

    Reference: Shen et al., 2020, algorithm 2. https://arxiv.org/abs/2003.07845
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_forward: float = 0.9,
        alpha_backward: float = 0.9,
        warmup_steps: int = 10000,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, alpha in (("alpha_forward", alpha_forward), ("alpha_backward", alpha_backward)):
            if not 0.0 <= alpha < 1.0:
                raise ValueError(f"PowerNorm: {name} must be in [0, 1), got {alpha}")
        self.num_features = num_features
        self.eps = eps
        self.alpha_forward = alpha_forward
        self.alpha_backward = alpha_backward
        self.warmup_steps = warmup_steps
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        weight = nn.Parameter(torch.ones(num_features, **options)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        has_bias = elementwise_affine and bias
        shift = nn.Parameter(torch.zeros(num_features, **options)) if has_bias else None
        self.register_parameter("bias", shift)
        statistics: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.running_square: Tensor
        self.running_gradient: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_square", torch.ones(num_features, **statistics))
        self.register_buffer("running_gradient", torch.zeros(num_features, **statistics))
        self.register_buffer(
            "num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device)
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = False,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``residual + dropout(x + x_bias)``; see ``MaskedBatchNorm.forward``.

        Args:
            x: ``[..., E]``, the branch.
            residual: Shape of ``x``; default: none.
            x_bias: ``[E]``: the bias of the linear layer that made ``x``.
            dropout_p: Probability that an element of ``x + x_bias`` is dropped, in [0, 1).
            return_sum: Return the sum as well.
            padding: ``[...]`` bool, True where a position does not count.

        Returns:
            Shape of ``x``; with ``return_sum`` also the sum, likewise.

        Raises:
            ValueError: Shapes disagree.
        """
        check_trailing("PowerNorm", x, (self.num_features,))
        check_residual("PowerNorm", x, residual)
        check_padding("PowerNorm", x, padding)
        x, residual = promoted(x, residual)
        if padding is not None:
            # A row of NaN has NaN for a gradient, whatever comes from above.
            x = add_residual("PowerNorm", x, residual, x_bias, dropout_p)
            x = x.masked_fill(padding[..., None], 0.0)
            residual, x_bias, dropout_p = None, None, 0.0
        result = add_layer_norm(
            x,
            residual,
            x_bias=flat_parameter(x_bias, x.dtype),
            norm="rms_norm",
            eps=self.eps,
            dropout_p=dropout_p,
            return_sum=return_sum,
        )
        scaled, total = result if isinstance(result, tuple) else (result, result)
        output = self._normalise(scaled, padding)
        return (output, total) if return_sum else output

    def extra_repr(self) -> str:
        """Constructor arguments, as ``repr`` shows them."""
        return (
            f"{self.num_features}, eps={self.eps}, alpha_forward={self.alpha_forward}, "
            f"alpha_backward={self.alpha_backward}, warmup_steps={self.warmup_steps}"
        )

    def _normalise(self, scaled: Tensor, padding: Tensor | None) -> Tensor:
        values = scaled.to(torch.promote_types(scaled.dtype, torch.float32))
        if self.training:
            square, share = self._update(values.detach(), padding)
            normalised = _DivideByRunningMean.apply(
                values,
                torch.rsqrt(square + self.eps).to(values.dtype),
                self.running_gradient,
                share,
                self.alpha_backward,
            )
        else:
            normalised = values * torch.rsqrt(self.running_square + self.eps).to(values.dtype)
        if self.weight is not None:
            normalised = normalised * self.weight
        if self.bias is not None:
            normalised = normalised + self.bias
        return normalised.to(scaled.dtype)

    @torch.no_grad()
    def _update(self, values: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean squares to divide by, and 1 / positions; updates the running ones."""
        if padding is None:
            count = values.new_tensor(float(values[..., 0].numel()))
        else:
            count = (~padding).sum().to(values.dtype)
        share = 1.0 / count.clamp(min=1.0)
        rows = tuple(range(values.dim() - 1))
        batch = (values.square().sum(rows) * share).to(self.running_square.dtype)
        running = self.running_square.clone()
        self.num_batches_tracked.add_(1)
        steps = self.num_batches_tracked
        in_warmup = steps <= self.warmup_steps
        rate = torch.where(in_warmup, 1.0 / steps, 1.0 - self.alpha_forward)
        rate = torch.where(count > 0.0, rate, 0.0)
        self.running_square.lerp_(batch, rate.to(batch.dtype))
        return torch.where(in_warmup & (count > 0.0), batch, running), share


class _DivideByRunningMean(torch.autograd.Function):
    """``y = x / psi`` with the approximate gradient of ``PowerNorm``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rpsi: Tensor, nu: Tensor, share: Tensor, alpha: float
    ) -> Tensor:
        y = x * rpsi
        ctx.save_for_backward(y, rpsi, share)
        # Not saved: the backward changes it.
        ctx.nu = nu
        ctx.alpha = alpha
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, rpsi, share = ctx.saved_tensors
        corrected = grad - ctx.nu.to(grad.dtype) * y
        moved = (y * corrected).sum(tuple(range(y.dim() - 1))) * share
        ctx.nu.add_(moved.to(ctx.nu.dtype), alpha=1.0 - ctx.alpha)
        return corrected * rpsi, None, None, None, None
