"""Where a token stands, as a vector added to its embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SinusoidalPositions(nn.Module):
    """Sines and cosines of geometrically spaced wavelengths; no parameters.

        out[p, 2i] = sin(p / 10000 ** (2i / E)),  out[p, 2i + 1] = cos(same)

    Args:
        max_length: P, the number of positions.
        d_model: E, even.

    Reference: Vaswani et al., 2017, section 3.5. https://arxiv.org/abs/1706.03762
    """

    table: Tensor

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        position = torch.arange(max_length, dtype=torch.float64)[:, None]
        rate = torch.exp(
            torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model)
        )
        angle = position * rate  # [P, E / 2]
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()
        # Not in the state dict: it is a function of the configuration.
        self.register_buffer("table", table, persistent=False)

    def forward(self, start: int, end: int) -> Tensor:
        """``[end - start, E]``: the vectors of positions start..end-1."""
        return self.table[start:end]

    def at(self, positions: Tensor) -> Tensor:
        """``[..., E]``: the vectors of positions ``[...]``."""
        return F.embedding(positions, self.table)


class LearnedPositions(nn.Module):
    """One trained vector a position.

    Args:
        max_length: P, the number of positions.
        d_model: E.
    """

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, start: int, end: int) -> Tensor:
        """``[end - start, E]``: the vectors of positions start..end-1."""
        return self.weight[start:end]

    def at(self, positions: Tensor) -> Tensor:
        """``[..., E]``: the vectors of positions ``[...]``."""
        return F.embedding(positions, self.weight)
