"""The feed-forward epilogue beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case

from .measured import Run, ours, parametrize, time_provider

OP = "bias_activation_dropout"

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def peer(case: Case) -> Run:
    """``dropout(activation(x + bias))``, as a model in plain PyTorch has it."""

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        hidden = inputs["x"]
        if "bias" in inputs:
            hidden = hidden + inputs["bias"]
        activation = _ACTIVATIONS[inputs["activation"]]
        if inputs["gated"]:
            gate, value = hidden.chunk(2, dim=-1)
            output = activation(gate) * value
        else:
            output = activation(hidden)
        if inputs["dropout_p"] > 0.0:
            output = F.dropout(output, inputs["dropout_p"])
        return (output + inputs["residual"] if "residual" in inputs else output,)

    return run


@parametrize(OP)
@pytest.mark.parametrize("provider", ["fused_attn", "torch"])
def test_bias_activation_dropout(benchmark: Any, case: Case, direction: str, provider: str) -> None:
    run = ours(case) if provider == "fused_attn" else peer(case)
    time_provider(benchmark, case, direction, provider, run)
