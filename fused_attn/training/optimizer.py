"""Adam as Transformers are trained with it, and its learning rate over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class InverseSquareRoot:
    """Learning rate that rises linearly for ``warmup_steps`` and then falls as 1 / sqrt(step).

        rate(step) = peak * min(step / warmup_steps, sqrt(warmup_steps / step)),  step = 1, 2, …

    Attributes:
        peak: The highest rate, reached at ``warmup_steps``.
        warmup_steps: Updates until then; 0 starts at the peak and falls from there.

    Raises:
        ValueError: ``peak`` is not positive or ``warmup_steps`` is negative.

    Reference: Vaswani et al., 2017, section 5.3. https://arxiv.org/abs/1706.03762
    """

    peak: float
    warmup_steps: int

    def __post_init__(self) -> None:
        if not self.peak > 0:
            raise ValueError(f"InverseSquareRoot: peak must be positive, got {self.peak}")
        if self.warmup_steps < 0:
            raise ValueError(
                f"InverseSquareRoot: warmup_steps must not be negative, got {self.warmup_steps}"
            )

    def __call__(self, step: int) -> float:
        """Return the rate of an update, counted from 1."""
        warmup = max(self.warmup_steps, 1)
        return self.peak * min(step / warmup, math.sqrt(warmup / step))


def build_optimizer(model: nn.Module, *, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Return AdamW with beta (0.9, 0.98) and eps 1e-9, updating all parameters in one pass.

    Without decay this is Adam. Matrices decay; biases and normalisation gains, being vectors, do
    not. The learning rate is set before every update by the schedule.

    Args:
        model: The model whose parameters to update.
        weight_decay: Decoupled decay of matrices, relative to the learning rate.

    Reference: Loshchilov and Hutter, 2019. https://arxiv.org/abs/1711.05101
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(0.9, 0.98), eps=1e-9, fused=True
    )
