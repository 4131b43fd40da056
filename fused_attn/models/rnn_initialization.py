"""How the parameters of a recurrent sequence-to-sequence model begin, by name."""

from __future__ import annotations

from torch import Tensor, nn

from .rnn_recurrence import Recurrence

_BOUND = 0.08


def initialize(model: nn.Module, scheme: str) -> None:
    """Draw parameters anew.

    ``xavier``: Xavier-uniform matrices, ``he``: He-uniform ones for rectified units. In both,
    recurrent matrices are orthogonal (Saxe et al., 2014), each gate on its own; biases are 0, but
    that of an LSTM's forget gate 1 (Jozefowicz et al., 2015); embeddings and the output projection,
    which may be one matrix, are normal with standard deviation ``size ** -0.5``.
    ``uniform``: all of these within ±0.08 (Sutskever et al., 2014).

    Padding is embedded as 0. Parameters of other modules than linear layers, embeddings and
    recurrences are left alone.

    Args:
        model: Its modules are drawn; ``output_projection`` is known by name.
        scheme: ``"xavier"``, ``"he"`` or ``"uniform"``.
    """
    for name, module in model.named_modules():
        if isinstance(module, Recurrence):
            _recurrence(module, scheme)
        elif isinstance(module, nn.Embedding) or name == "output_projection":
            weight: Tensor = module.weight
            if scheme == "uniform":
                nn.init.uniform_(weight, -_BOUND, _BOUND)
            else:
                nn.init.normal_(weight, std=weight.size(1) ** -0.5)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(weight[module.padding_idx])
        elif isinstance(module, nn.Linear):
            _matrix(module.weight, scheme)
            if module.bias is not None:
                _bias(module.bias, scheme)


def _recurrence(module: Recurrence, scheme: str) -> None:
    for name, parameter in module.layers.named_parameters():
        if "bias" in name:
            _bias(parameter, scheme)
            if module.kind == "lstm" and name.startswith("bias_ih") and scheme != "uniform":
                nn.init.ones_(parameter.chunk(4)[1])
            continue
        for gate in parameter.split(parameter.size(0) // module.gates):
            if scheme == "uniform" or name.startswith("weight_ih"):
                _matrix(gate, scheme)
            else:
                nn.init.orthogonal_(gate)


def _matrix(weight: Tensor, scheme: str) -> None:
    if scheme == "uniform":
        nn.init.uniform_(weight, -_BOUND, _BOUND)
    elif scheme == "he":
        nn.init.kaiming_uniform_(weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(weight)


def _bias(bias: Tensor, scheme: str) -> None:
    if scheme == "uniform":
        nn.init.uniform_(bias, -_BOUND, _BOUND)
    else:
        nn.init.zeros_(bias)
