"""Batch normalisation of sequences whose padding does not count."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._norm_inputs import add_residual, check_padding, check_trailing


class MaskedBatchNorm(nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over the last dimension of ``[..., E]``, padding excluded.

    Same constructor, parameters and buffers as ``torch.nn.BatchNorm1d``. In training a feature's
    mean and variance are those of the positions that are no padding; a batch that has none gives
    the bias and leaves the running statistics as they are. Statistics are of this process alone,
    as in ``BatchNorm1d``.

    Reference: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167; in Transformers: Shen et
    al., 2020, https://arxiv.org/abs/2003.07845
    """

    def forward(  # type: ignore[override]  # returns the sum as well when asked
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = False,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``residual + dropout(x + x_bias)``.

        Args:
            x: ``[..., E]``, the branch.
            residual: Shape of ``x``; default: none.
            x_bias: ``[E]``: the bias of the linear layer that made ``x``.
            dropout_p: Probability that an element of ``x + x_bias`` is dropped, in [0, 1).
            return_sum: Return the sum as well.
            padding: ``[...]`` bool, True where a position does not count; NaN there reaches
                neither a statistic nor a gradient. Default: all count. The output there is
                unspecified.

        Returns:
            Shape of ``x``; with ``return_sum`` also the sum, likewise.

        Raises:
            ValueError: Shapes disagree.
        """
        name = type(self).__name__
        check_trailing(name, x, (self.num_features,))
        check_padding(name, x, padding)
        total = add_residual(name, x, residual, x_bias, dropout_p)
        cleared = total if padding is None else total.masked_fill(padding[..., None], 0.0)
        output = self._normalise(cleared, padding)
        return (output, total) if return_sum else output

    def _normalise(self, total: Tensor, padding: Tensor | None) -> Tensor:
        # As in torch, a module without running statistics takes the batch's in evaluation too.
        uses_batch = self.training or self.running_mean is None or self.running_var is None
        if not uses_batch:
            output = F.batch_norm(
                total.flatten(0, -2),
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                eps=self.eps,
            )
            return output.view(total.shape)
        values = total.to(torch.promote_types(total.dtype, torch.float32))
        if padding is None:
            count = values.new_tensor(float(values[..., 0].numel()))
        else:
            count = (~padding).sum().to(values.dtype)
        rows = tuple(range(values.dim() - 1))
        divisor = count.clamp(min=1.0)
        mean = values.sum(rows) / divisor
        centred = values - mean
        if padding is not None:
            centred = centred.masked_fill(padding[..., None], 0.0)
        variance = centred.square().sum(rows) / divisor
        if self.training and self.track_running_stats:
            self._update(mean.detach(), variance.detach(), count)
        output = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            output = output * self.weight + self.bias
        return output.to(total.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards the batch's."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum: float | Tensor = self.momentum if self.momentum is not None else 0.0
        if self.momentum is None:  # the average over all batches
            momentum = 1.0 / self.num_batches_tracked.to(mean.dtype)
        momentum = torch.where(count > 0.0, momentum, 0.0)
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
