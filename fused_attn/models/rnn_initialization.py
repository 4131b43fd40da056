"""How the parameters of a recurrent sequence-to-sequence model begin, by name."""

from __future__ import annotations

from torch import Tensor, nn

from fused_attn.nn import RecurrentAttention, RecurrentLayers

from .rnn_output import CopyScores

_BOUND = 0.08


def initialize(model: nn.Module, scheme: str) -> None:
    """Draw parameters anew.

    ``xavier``: Xavier-uniform matrices, ``he``: He-uniform ones for rectified units. In both,
    recurrent matrices are orthogonal (Saxe et al., 2014), each gate on its own; biases are 0, but
    that of an LSTM's forget gate 1 (Jozefowicz et al., 2015); embeddings and the output projection,
    which may be one matrix, are normal with standard deviation ``size ** -0.5``.
    ``uniform``: all of these within ±0.08 (Sutskever et al., 2014).

    Padding is embedded as 0. What an attention has besides linear layers begins as it says.

    Args:
        model: Its modules are drawn; ``output_projection`` is known by name.
        scheme: ``"xavier"``, ``"he"`` or ``"uniform"``.

    References: https://arxiv.org/abs/1312.6120,
        https://proceedings.mlr.press/v37/jozefowicz15.html, https://arxiv.org/abs/1409.3215
    """
    kept: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, RecurrentAttention):
            module.reset_parameters()
            if scheme == "xavier":  # which it is already, each head on its own
                kept.update(module.children())
        elif isinstance(module, CopyScores):
            module.reset_parameters()
        elif isinstance(module, RecurrentLayers):
            _recurrence(module, scheme)
        elif isinstance(module, nn.Embedding):
            _table(module.weight, scheme)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Linear) and name == "output_projection":
            _table(module.weight, scheme)
        elif isinstance(module, nn.Linear) and module not in kept:
            _matrix(module.weight, scheme)
            if module.bias is not None:
                _bias(module.bias, scheme)


def _table(weight: Tensor, scheme: str) -> None:
    if scheme == "uniform":
        nn.init.uniform_(weight, -_BOUND, _BOUND)
    else:
        nn.init.normal_(weight, std=weight.size(1) ** -0.5)


def _recurrence(module: RecurrentLayers, scheme: str) -> None:
    for name, parameter in module.named_parameters():
        if "bias" in name:
            _bias(parameter, scheme)
            if module.kind == "lstm" and name.startswith("bias_ih") and scheme != "uniform":
                nn.init.ones_(parameter.chunk(4)[1])
            continue
        for gate in parameter.split(module.hidden_size):
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
