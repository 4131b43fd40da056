"""Adam as Transformers are trained with it, and its learning rate over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class InverseSquareRoot:
    """Learning rate that rises linearly, falls as 1 / sqrt(step), and may end in a cooldown.

        rate(step) = peak * min(step / warmup_steps, sqrt(warmup_steps / step)),  step = 1, 2, …

    A cooldown multiplies the last ``cooldown_steps`` rates by a line that falls to zero at
    ``last_step``: the noise of large steps settles, as in averaging weights.

    Attributes:
        peak: The highest rate, reached at ``warmup_steps``.
        warmup_steps: Updates until then; 0 starts at the peak and falls from there.
        cooldown_steps: Updates of the cooldown; 0: none.
        last_step: The last update; needed for a cooldown.

    Raises:
        ValueError: ``peak`` is not positive, ``warmup_steps`` or ``cooldown_steps`` is negative,
            or a cooldown has no ``last_step``.

    Reference: Vaswani et al., 2017, section 5.3, https://arxiv.org/abs/1706.03762; cooldown:
    Hägele et al., 2024, https://arxiv.org/abs/2405.18392
    """

    peak: float
    warmup_steps: int
    cooldown_steps: int = 0
    last_step: int | None = None

    def __post_init__(self) -> None:
        if not self.peak > 0:
            raise ValueError(f"InverseSquareRoot: peak must be positive, got {self.peak}")
        for name in ("warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"InverseSquareRoot: {name} must not be negative, got {getattr(self, name)}"
                )
        if self.cooldown_steps and self.last_step is None:
            raise ValueError("InverseSquareRoot: last_step must be given for a cooldown, got None")

    def __call__(self, step: int) -> float:
        """Return the rate of an update, counted from 1."""
        warmup = max(self.warmup_steps, 1)
        rate = self.peak * min(step / warmup, math.sqrt(warmup / step))
        if self.cooldown_steps and self.last_step is not None:
            left = (self.last_step + 1 - step) / (self.cooldown_steps + 1)
            rate *= min(max(left, 0.0), 1.0)
        return rate


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
