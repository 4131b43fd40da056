"""ONNX Runtime's operators on PyTorch's memory, as peers on a CPU.

Inputs and outputs are bound once, so a call copies nothing and allocates no output; parameters are
constants of the graph, as in an exported model. It has as many threads as PyTorch, which stop
spinning when a call returns: they would slow down whoever has the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("onnx", "onnxruntime")
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
_OPSET, _IR_VERSION = 24, 11


@dataclass(frozen=True)
class Node:
    """An operator of a graph, its inputs and outputs by name; ``""`` is an input left out."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    domain: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)


def graph_call(
    nodes: Sequence[Node],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor] | None = None,
) -> Callable[[], None]:
    """A call that computes ``outputs``, in place, from ``inputs``.

    Args:
        nodes: In an order in which they can be computed.
        inputs: Contiguous, by name.
        outputs: Contiguous, by name; one may share an input's memory if its operator can do that.
        constants: Parameters, by name.
    """
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    def described(tensors: Mapping[str, Tensor]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, _onnx_type(tensor), tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]

    graph = helper.make_graph(
        [
            helper.make_node(
                node.op, node.inputs, node.outputs, domain=node.domain, **node.attributes
            )
            for node in nodes
        ],
        "peer",
        described(inputs),
        described(outputs),
        [numpy_helper.from_array(tensor.numpy(), n) for n, tensor in (constants or {}).items()],
    )
    domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=domains, ir_version=_IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            element = tensor.numpy().dtype
            bind(name, "cpu", 0, element, tuple(tensor.shape), tensor.data_ptr())

    def call(_alive: object = (inputs, outputs)) -> None:
        session.run_with_iobinding(binding)

    return call


def _onnx_type(tensor: Tensor) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype))
