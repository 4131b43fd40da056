"""A model of the shape the training stack expects, in a few lines of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StandIn(nn.Module):
    """Embeddings, a mean over the source and a running mean over the target; tied projection."""

    def __init__(self, vocabulary: int = 40, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.config = {"vocabulary": vocabulary, "width": width}
        self.source_embedding = nn.Embedding(vocabulary, width)
        self.target_embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(width)
        )
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.target_embedding.weight

    def decode(
        self, source: Tensor, target: Tensor, source_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        taken = torch.arange(source.shape[1]) < source_lengths[:, None]
        summed = (self.source_embedding(source) * taken[..., None]).sum(1)
        mean = (summed / source_lengths[:, None])[:, None]
        embedded = self.target_embedding(target)
        count = torch.arange(1, target.shape[1] + 1)[:, None]
        return self.layers(embedded + embedded.cumsum(1) / count + mean)

    def project(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)
