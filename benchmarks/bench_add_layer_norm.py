"""Add & Norm beside PyTorch, ONNX Runtime and Liger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.ops._cases import Case

from .onnx_runtime import MICROSOFT, PACKAGES, Node, graph_call
from .peers import Inputs, Peer, Run, compiled, prepared, unless_dropout
from .suite import parametrize

OP = "add_layer_norm"


def peer(case: Case) -> Run:
    """``layer_norm(dropout(x + x_bias) + residual)``, as a model in plain PyTorch has it."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        total = _dropped(inputs) + inputs["residual"]
        shape, weight = total.shape[-1:], inputs.get("weight")
        if inputs["norm"] == "rms_norm":
            output = F.rms_norm(total, shape, weight, inputs["eps"])
        else:
            output = F.layer_norm(total, shape, weight, inputs.get("bias"), inputs["eps"])
        return (output, total) if inputs["return_sum"] else (output,)

    return run


def _dropped(inputs: Inputs) -> Tensor:
    """``dropout(x + x_bias)``."""
    x: Tensor = inputs["x"]
    if "x_bias" in inputs:
        x = x + inputs["x_bias"]
    return F.dropout(x, inputs["dropout_p"]) if inputs["dropout_p"] > 0.0 else x


def onnx_runtime(case: Case) -> Run:
    """``SkipLayerNormalization``, or ``SkipSimplifiedLayerNormalization`` for RMSNorm."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        if inputs["dropout_p"] > 0.0:
            raise NotImplementedError("ONNX Runtime has no dropout there")
        rms = inputs["norm"] == "rms_norm"
        names = ["weight", "x_bias"] if rms else ["weight", "bias", "x_bias"]
        constants = {name: inputs[name] for name in names if name in inputs}
        given = [name if name in constants else "" for name in names]
        outputs = {"output": torch.empty_like(inputs["x"])}
        if inputs["return_sum"]:
            outputs["sum"] = torch.empty_like(inputs["x"])
        node = Node(
            "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization",
            ["x", "residual", *given],
            ["output", "", "", *(["sum"] if inputs["return_sum"] else [])],
            MICROSOFT,
            {"epsilon": inputs["eps"]},
        )
        tensors = {name: inputs[name] for name in ("x", "residual")}
        call = graph_call([node], tensors, outputs, constants)

        def run() -> tuple[Tensor, ...]:
            call()
            return tuple(outputs.values())

        return run

    return prepared(prepare)


def liger(case: Case) -> Run:
    """RMSNorm with the addition in its kernel, or LayerNorm after the addition."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        x, weight = _dropped(inputs), inputs["weight"]
        if inputs["norm"] == "rms_norm":
            output, total = LigerFusedAddRMSNormFunction.apply(
                x, inputs["residual"], weight, inputs["eps"]
            )
        else:
            total = x + inputs["residual"]
            output = LigerLayerNormFunction.apply(total, weight, inputs["bias"], inputs["eps"])
        return (output, total) if inputs["return_sum"] else (output,)

    return run


EAGER = Peer(peer, "plain PyTorch", comparable=unless_dropout)
PEERS = {
    "eager": EAGER,
    "compile": compiled(EAGER),
    "onnxruntime": Peer(
        onnx_runtime,
        "ONNX Runtime's SkipLayerNormalization, inputs and outputs bound",
        packages=PACKAGES,
        devices=("cpu",),
        differentiable=False,
        uses_torch_memory=False,
    ),
    "liger": Peer(
        liger,
        "Liger's fused add and RMSNorm, or its LayerNorm after an addition",
        packages=("liger-kernel",),
        devices=("cuda",),
        comparable=unless_dropout,
    ),
}


@parametrize(OP)
def test_add_layer_norm(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
