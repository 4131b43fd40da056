"""Add & Norm beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case

from .peers import Peer, Run, compiled
from .suite import parametrize

OP = "add_layer_norm"


def peer(case: Case) -> Run:
    """``layer_norm(dropout(x + x_bias) + residual)``, as a model in plain PyTorch has it."""

    def run(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        total = inputs["x"]
        if "x_bias" in inputs:
            total = total + inputs["x_bias"]
        if inputs["dropout_p"] > 0.0:
            total = F.dropout(total, inputs["dropout_p"])
        total = total + inputs["residual"]
        shape, weight = total.shape[-1:], inputs.get("weight")
        if inputs["norm"] == "rms_norm":
            output = F.rms_norm(total, shape, weight, inputs["eps"])
        else:
            output = F.layer_norm(total, shape, weight, inputs.get("bias"), inputs["eps"])
        return (output, total) if inputs["return_sum"] else (output,)

    return run


PEERS = {
    "eager": Peer(peer, "plain PyTorch"),
    "compile": compiled(peer),
}


@parametrize(OP)
def test_add_layer_norm(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
