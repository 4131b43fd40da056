"""The feed-forward epilogue beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case

from .peers import Peer, Run, compiled
from .suite import parametrize

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


PEERS = {
    "eager": Peer(peer, "plain PyTorch"),
    "compile": compiled(peer),
}


@parametrize(OP)
def test_bias_activation_dropout(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
