"""The feed-forward epilogue beside PyTorch, ONNX Runtime and Liger."""

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

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
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


def onnx_runtime(case: Case) -> Run:
    """``BiasGelu``, or ``FastGelu`` for the approximation with a hyperbolic tangent."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        op = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}.get(inputs["activation"])
        if inputs["dropout_p"] > 0.0:
            raise NotImplementedError("ONNX Runtime has no dropout there")
        if op is None or inputs["gated"] or "residual" in inputs or "bias" not in inputs:
            raise NotImplementedError("ONNX Runtime has a kernel of bias and GELU alone")
        output = torch.empty_like(inputs["x"])
        node = Node(op, ["x", "bias"], ["output"], MICROSOFT)
        call = graph_call([node], {"x": inputs["x"]}, {"output": output}, {"bias": inputs["bias"]})

        def run() -> tuple[Tensor, ...]:
            call()
            return (output,)

        return run

    return prepared(prepare)


def liger(case: Case) -> Run:
    """SwiGLU's product after the addition of the bias."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if inputs["activation"] != "silu" or not inputs["gated"]:
            raise NotImplementedError("Liger has gated activations alone")
        if "residual" in inputs or inputs["dropout_p"] > 0.0:
            raise NotImplementedError("Liger has no dropout and no residual there")
        hidden = inputs["x"] + inputs["bias"] if "bias" in inputs else inputs["x"]
        return (LigerFusedGateUpSiLUMulFunction.apply(hidden),)

    return run


EAGER = Peer(peer, "plain PyTorch", comparable=unless_dropout)
PEERS = {
    "eager": EAGER,
    "compile": compiled(EAGER),
    "onnxruntime": Peer(
        onnx_runtime,
        "ONNX Runtime's BiasGelu, inputs and outputs bound",
        packages=PACKAGES,
        devices=("cpu",),
        differentiable=False,
        uses_torch_memory=False,
    ),
    "liger": Peer(
        liger,
        "Liger's SiLU and product after the addition of the bias",
        packages=("liger-kernel",),
        devices=("cuda",),
    ),
}


@parametrize(OP)
def test_bias_activation_dropout(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
