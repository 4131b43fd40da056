"""The public function ``recurrent_layer``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._backend import describe_tensor, resolve
from .._check import check_dtype, check_floating, check_same, check_tensor
from .api import BACKENDS
from .contract import GATES
from .layer_contract import recurrent_layer_fused
from .reference import recurrent_layer_reference

_OP = "recurrent_layer"


def recurrent_layer(
    input_gates: Tensor,
    batch_sizes: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Literal["lstm", "gru", "tanh", "relu"],
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one direction of a recurrent layer, after its input product; differentiable.

        for each step s, in the other order if reverse:
            rows = batch_sizes[s]
            hidden_gates = hidden[:rows] @ weight^T + bias
            hidden[:rows], cell[:rows] = recurrent_cell(its input_gates, hidden_gates, ...)

    Sequences are sorted by length, the longest first, and their steps stand as in
    ``torch.nn.utils.rnn.PackedSequence``: step 0 of all of them, step 1 of those that have one, and
    so on, so that padding costs nothing. In reverse a sequence begins at its last step. Computes in
    fp32. The gradients of ``weight`` and ``bias`` are one product and one sum over all steps.

    On a GPU there is no kernel of a whole layer: cuDNN, behind ``torch.nn.LSTM`` and its like, is
    made for it.

    Args:
        input_gates: ``[N, G H]``, products of the inputs with their biases; G as in
            ``recurrent_cell``. fp32 (other dtypes: reference only).
        batch_sizes: ``[S]`` int64 on the CPU, of which none exceeds the one before: how many
            sequences have a step s. They add up to N.
        hidden: ``[B, H]``: the states before the first step, of at least ``batch_sizes[0]``
            sequences.
        cell: ``[B, H]``, of an LSTM; the other kinds do not look at it.
        weight: ``[G H, H]``, the recurrent weight. Where no gradient is needed the ``cpu`` backend
            also takes one in oneDNN's layout, and then need not make it.
        bias: ``[G H]``; default: none.
        kind: ``"lstm"``, ``"gru"``, ``"tanh"`` or ``"relu"``.
        reverse: From the last step to the first.
        backend: ``cpu`` or ``reference``; default: the first that can.

    Returns:
        Output ``[N, H]``, the hidden state after each step; the final hidden state ``[B, H]``,
        where a sequence without a step keeps what it had; and an LSTM's final cell likewise, of
        other kinds an empty tensor ``[0]``.

    Raises:
        TypeError: An argument is no tensor, or of a wrong dtype.
        ValueError: Shapes, devices or ``batch_sizes`` disagree, an LSTM has no cell, or there is
            no kind of that name.
        NotImplementedError: The named backend cannot run this call.

    Reference: as of ``recurrent_cell``; bidirectional layers: Schuster and Paliwal, 1997,
    https://doi.org/10.1109/78.650093
    """
    _check(input_gates, batch_sizes, hidden, cell, weight, bias, kind)
    if kind != "lstm":
        cell = None
    name = resolve(
        _OP,
        BACKENDS,
        backend,
        input_gates,
        lambda module: module.layer_unsupported_reasons(input_gates),
        lambda: describe_tensor("input_gates", input_gates),
    )
    if name == "reference":
        return recurrent_layer_reference(
            input_gates, hidden, cell, weight, bias, batch_sizes, kind=kind, reverse=reverse
        )
    return recurrent_layer_fused(
        input_gates, hidden, cell, weight, bias, batch_sizes, kind, reverse, name
    )


def _check(
    input_gates: Tensor,
    batch_sizes: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
) -> None:
    if kind not in GATES:
        raise ValueError(f"{_OP}: kind must be one of {', '.join(GATES)}, got {kind!r}")
    check_tensor(_OP, "input_gates", input_gates)
    check_floating(_OP, "input_gates", input_gates)
    check_tensor(_OP, "batch_sizes", batch_sizes)
    check_dtype(_OP, "batch_sizes", batch_sizes, (torch.int64,))
    if batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
        raise ValueError(
            f"{_OP}: batch_sizes must have shape [S] and be on the cpu, got "
            f"{list(batch_sizes.shape)} on {batch_sizes.device}"
        )
    check_tensor(_OP, "hidden", hidden)
    if hidden.dim() != 2 or hidden.size(1) == 0:
        raise ValueError(
            f"{_OP}: hidden must have shape [B, H] with H >= 1, got {list(hidden.shape)}"
        )
    B, H = hidden.shape
    columns = GATES[kind] * H
    if input_gates.dim() != 2 or input_gates.size(1) != columns:
        raise ValueError(
            f"{_OP}: input_gates must have shape [N, {columns}] (from hidden), got "
            f"{list(input_gates.shape)}"
        )
    if kind == "lstm" and cell is None:
        raise ValueError(f"{_OP}: kind 'lstm' needs cell, got None")
    shapes = {"hidden": [B, H], "cell": [B, H], "weight": [columns, H], "bias": [columns]}
    tensors = {
        "hidden": hidden,
        "cell": cell if kind == "lstm" else None,
        "weight": weight,
        "bias": bias,
    }
    for name, tensor in tensors.items():
        if tensor is None and name != "weight":
            continue
        check_tensor(_OP, name, tensor)
        assert tensor is not None
        check_same(_OP, name, tensor, "input_gates", input_gates)
        if list(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{_OP}: {name} must have shape {shapes[name]}, got {list(tensor.shape)}"
            )
    # A graph that is being made has no values yet; kernels look as well.
    if not torch.compiler.is_compiling():
        _check_sizes(batch_sizes.tolist(), B, input_gates.size(0))


def _check_sizes(sizes: list[int], B: int, N: int) -> None:
    descends = all(a >= b >= 1 for a, b in zip([B, *sizes], sizes, strict=False))
    if not descends or sum(sizes) != N:
        raise ValueError(
            f"{_OP}: batch_sizes must descend from at most {B} sequences (from hidden) to at least "
            f"1 and add up to {N} (from input_gates), got {sizes}"
        )


def layer_is_fused(input_gates: Tensor) -> bool:
    """Whether a fused backend takes a layer of this device and dtype here."""
    return (
        resolve(
            _OP,
            BACKENDS,
            None,
            input_gates,
            lambda module: module.layer_unsupported_reasons(input_gates),
            lambda: "",
        )
        != "reference"
    )
