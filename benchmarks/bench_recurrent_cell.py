"""A recurrent layer's step after its products, beside PyTorch.

``eager`` is PyTorch's own composition, as ``torch.nn.LSTMCell``, ``GRUCell`` and ``RNNCell`` make
it on a CPU after their products; ``fused_cell`` the kernels that they have on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn.ops._cases import Case

from .peers import Inputs, Peer, Run, compiled
from .suite import parametrize

OP = "recurrent_cell"


def peer(case: Case) -> Run:
    """The step as a model in plain PyTorch has it, in the inputs' dtype."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        x, h = inputs["input_gates"], inputs["hidden_gates"]
        if inputs["kind"] == "lstm":
            i, f, g, o = (x + h).chunk(4, dim=-1)
            cell = torch.sigmoid(f) * inputs["cell"] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(cell), cell
        if inputs["kind"] == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
            update = torch.sigmoid(x_z + h_z)
            new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
            return (new + update * (inputs["hidden"] - new),)
        return ((torch.tanh if inputs["kind"] == "tanh" else torch.relu)(x + h),)

    return run


def fused_cell(case: Case) -> Run:
    """PyTorch's kernels of an LSTM's and a GRU's step, which are for GPUs alone."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        x, h = inputs["input_gates"], inputs["hidden_gates"]
        if inputs["kind"] == "lstm":
            return tuple(torch._thnn_fused_lstm_cell(x, h, inputs["cell"])[:2])
        if inputs["kind"] == "gru":
            return (torch._thnn_fused_gru_cell(x, h, inputs["hidden"])[0],)
        raise NotImplementedError(f"PyTorch has no kernel of a {inputs['kind']} step")

    return run


EAGER = Peer(peer, "plain PyTorch")
PEERS = {
    "eager": EAGER,
    "compile": compiled(EAGER),
    "fused_cell": Peer(fused_cell, "PyTorch's own kernels of a step", devices=("cuda",)),
}


@parametrize(OP)
def test_recurrent_cell(
    measured: Any, case: Case, dtype: torch.dtype, direction: str, provider: str
) -> None:
    measured(case, dtype, direction, provider)
