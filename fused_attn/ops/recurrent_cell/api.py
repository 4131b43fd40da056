"""The public function ``recurrent_cell``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_device, check_dtype, check_floating, check_same, check_tensor
from . import cpu, reference, triton
from .contract import GATES, recurrent_cell_fused
from .reference import recurrent_cell_reference

_OP = "recurrent_cell"
BACKENDS = {"cpu": cpu, "triton": triton, "reference": reference}


def recurrent_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    *,
    kind: Literal["lstm", "gru", "tanh", "relu"],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What follows the products of a recurrent layer's step; differentiable.

        input_gates  = x @ weight_ih^T + bias_ih        hidden_gates = h @ weight_hh^T + bias_hh

        lstm:  i, f, g, o = input_gates + hidden_gates;   s = sigmoid
               new_cell = s(f) * cell + s(i) * tanh(g);   new_hidden = s(o) * tanh(new_cell)
        gru:   r, z = s(their input_gates + hidden_gates)
               n = tanh(input_gates of n + r * hidden_gates of n)
               new_hidden = n + z * (hidden - n)
        tanh, relu:  new_hidden = tanh(input_gates + hidden_gates), relu(...)

    Gates stand beside each other in the order given, as in the weights of ``torch.nn.LSTMCell``,
    ``GRUCell`` and ``RNNCell``, whose results these are. For an LSTM, tanh and relu the two
    products may be one, of ``[x; h]``, and either argument may hold what the other does not.
    Computes in fp32 and rounds once, at the store. A row of the results depends on its row of the
    inputs alone, to the last bit, and so do the gradients. Only the inputs are kept for the
    backward, which computes the gates again. The derivative of relu at 0 is 0.

    Args:
        input_gates: ``[..., G H]`` with G = 4 (lstm), 3 (gru), 1 (tanh, relu); fp32, fp16 or bf16
            (fp64: reference only), any strides.
        hidden_gates: Shape and dtype of ``input_gates``.
        hidden: ``[..., H]``, the state before this step, which a GRU needs; dtype of
            ``input_gates`` or fp32. The other kinds do not look at it.
        cell: ``[..., H]``, which an LSTM needs; likewise.
        kind: ``"lstm"``, ``"gru"``, ``"tanh"`` or ``"relu"``.
        backend: ``cpu``, ``triton`` or ``reference``; default: the first that can.

    Returns:
        ``new_hidden`` ``[..., H]``, in the dtype of ``input_gates``, for a GRU in that of
        ``hidden``; and ``new_cell`` ``[..., H]``, in the dtype of ``cell``, which is an empty
        tensor ``[0]`` unless this is an LSTM.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes or devices disagree, a state that the kind needs is missing, or there is
            no kind of that name.
        NotImplementedError: The named backend cannot run this call.

    Reference: LSTM: Hochreiter and Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735,
    with the forget gate of Gers et al., 2000, https://doi.org/10.1162/089976600300015015; GRU: Cho
    et al., 2014, https://arxiv.org/abs/1406.1078, with r after the product as in cuDNN
    """
    state = _check(input_gates, hidden_gates, hidden, cell, kind)
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        input_gates,
        lambda module: module.unsupported_reasons(input_gates),
        lambda: describe_tensor("input_gates", input_gates),
    )
    if name == "reference":
        return recurrent_cell_reference(input_gates, hidden_gates, state, kind=kind)
    return recurrent_cell_fused(input_gates, hidden_gates, state, kind, name)


def _check(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hidden: Tensor | None,
    cell: Tensor | None,
    kind: str,
) -> Tensor | None:
    """The state that the kind needs: an LSTM's cell, a GRU's hidden state."""
    if kind not in GATES:
        raise ValueError(f"{_OP}: kind must be one of {', '.join(GATES)}, got {kind!r}")
    check_tensor(_OP, "input_gates", input_gates)
    check_floating(_OP, "input_gates", input_gates)
    gates = GATES[kind]
    columns = "H" if gates == 1 else f"{gates} H"
    if input_gates.dim() == 0 or input_gates.size(-1) == 0 or input_gates.size(-1) % gates != 0:
        raise ValueError(
            f"{_OP}: input_gates must have shape [..., {columns}] with H >= 1, got "
            f"{list(input_gates.shape)}"
        )
    check_tensor(_OP, "hidden_gates", hidden_gates)
    check_same(_OP, "hidden_gates", hidden_gates, "input_gates", input_gates)
    if hidden_gates.shape != input_gates.shape:
        raise ValueError(
            f"{_OP}: hidden_gates must have the shape of input_gates, {list(input_gates.shape)}, "
            f"got {list(hidden_gates.shape)}"
        )
    if kind not in ("lstm", "gru"):
        return None
    name, state = ("cell", cell) if kind == "lstm" else ("hidden", hidden)
    if state is None:
        raise ValueError(f"{_OP}: kind {kind!r} needs {name}, got None")
    check_tensor(_OP, name, state)
    check_dtype(_OP, name, state, (input_gates.dtype, torch.float32))
    check_device(_OP, name, state, "input_gates", input_gates)
    expected = (*input_gates.shape[:-1], input_gates.size(-1) // gates)
    if state.shape != expected:
        raise ValueError(
            f"{_OP}: {name} must have shape {list(expected)} (from input_gates), got "
            f"{list(state.shape)}"
        )
    return state
