"""A recurrent model's modules for generation on a CPU, with packed weights."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from fused_attn.nn import RecurrentAttention, RecurrentLayers
from fused_attn.nn import packed as layers
from fused_attn.nn.packed_recurrent import PackedRecurrentLayers

from .rnn_decoder import Bridge, RNNDecoder
from .rnn_encoder import FrontEnd, RecurrentState, RNNEncoder
from .rnn_output import CopyScores, EndProjection, GenerationGate

Module = TypeVar("Module", bound=nn.Module)


class PackedRows(nn.Module):
    """``nn.Linear`` with a packed weight: each row's bits depend on that row alone.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._product = layers.PackedLinear(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        rows = self._product(x.reshape(-1, x.size(-1)))
        return rows.view(*x.shape[:-1], -1)


class PackedRecurrence(nn.Module):
    """``RecurrentLayers`` with packed weights.

    Args:
        module: The layers.
    """

    def __init__(self, module: RecurrentLayers) -> None:
        super().__init__()
        self._layers = PackedRecurrentLayers(module, layers.PackedLinear)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Read ``[B, T, I]``; see ``RecurrentLayers``."""
        return self._layers(x, lengths)

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One step ``[N, I]``; see ``RecurrentLayers``."""
        return self._layers.step(x, state)


def packing_reason(model: nn.Module) -> str:
    """Why packed weights cannot compute what the modules of a model would; empty if they can."""
    return layers.packing_reason(
        model,
        type(model),
        Bridge,
        CopyScores,
        EndProjection,
        FrontEnd,
        GenerationGate,
        RNNDecoder,
        RNNEncoder,
        RecurrentAttention,
        RecurrentLayers,
        nn.Conv1d,
        nn.Embedding,
    )


def pack(module: Module) -> Module:
    """The same module with packed weights in place of its linear and recurrent layers.

    Everything else is shared with it.

    Args:
        module: Without a ``packing_reason``.
    """
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    children: dict[str, nn.Module | None] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            children[name] = PackedRows(child.weight, child.bias)
        elif isinstance(child, RecurrentLayers):
            children[name] = PackedRecurrence(child)
        else:
            children[name] = pack(child)
    twin.__dict__["_modules"] = {**module._modules, **children}
    return twin
