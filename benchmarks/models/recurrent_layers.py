"""Training of recurrent layers on padded batches beside ``torch.nn``'s (oneDNN, cuDNN).

Forward and backward of one layer, fp32: ``torch.nn``'s on a packed batch, packing and unpacking
included (``torch_packed``); on the padded batch, which works on the padding as well
(``torch_padded``); and ours, with lengths. Cases named ``_full`` have no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.nn import RecurrentLayers

from ..results import Row
from .comparison import OURS, DisagreementError, ModelCase, Provider
from .sizes import Size

_TORCH: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU}


def cases(size: Size, device: str) -> list[ModelCase]:
    """The cases of ``--only recurrent_layers``."""
    if not size.variants:
        return [_case(size, device, "lstm", False, *size.recurrent[0], False)]
    found = [
        _case(size, device, kind, bidirectional, B, T, False)
        for kind in _TORCH
        for bidirectional in (False, True)
        for B, T in size.recurrent
    ]
    B, T = size.recurrent[-1]
    return [*found, *(_case(size, device, kind, False, B, T, True) for kind in _TORCH)]


def _case(
    size: Size, device: str, kind: Any, bidirectional: bool, B: int, T: int, full: bool
) -> ModelCase:
    H = size.hidden // 2 if bidirectional else size.hidden
    lengths = make_lengths(B, T, full)

    def prepare(provider: str) -> Provider:
        torch.manual_seed(1)  # of ours, whose weights all take
        ours = RecurrentLayers(kind, size.hidden, H, bidirectional=bidirectional)
        layers: Any = ours
        if provider != OURS:
            layers = _TORCH[kind](size.hidden, H, batch_first=True, bidirectional=bidirectional)
            layers.load_state_dict(ours.state_dict())
        layers = layers.to(device)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(B, T, size.hidden, generator=generator).to(device).requires_grad_()
        grad = torch.randn(B, T, ours.output_size, generator=generator).to(device)
        forward = _forward(provider, layers, x, None if full else lengths)
        leaves = [x, *layers.parameters()]
        outcome = None
        if provider != "torch_padded":
            with torch.no_grad():
                outcome = forward()
        return Provider(lambda: torch.autograd.grad(forward(), leaves, grad), outcome)

    valid = int(lengths.sum())
    return ModelCase(
        group="recurrent_layers",
        rank=3 if kind == "lstm" and not full else 4,
        model=f"{kind}_layer{size.suffix}",
        task="forward+backward",
        name=f"hidden_{H}{'x2' if bidirectional else ''}_batch_{B}_length_{T}"
        + ("_full" if full else ""),
        dtype="float32",
        shape=f"{size.hidden} -> {H}{' x 2' if bidirectional else ''}, {valid / (B * T):.0%} valid",
        tokens=valid,
        providers=(OURS, "torch_padded") if full else (OURS, "torch_packed", "torch_padded"),
        prepare=prepare,
        compare=_same_output,
        counts=False,
    )


def make_lengths(B: int, T: int, full: bool) -> Tensor:
    """``[B]``, on the host: from a third of T to all of it, in no order."""
    if full:
        return torch.full((B,), T)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    return torch.linspace(T // 3, T, B).long()[order]


def _forward(provider: str, layers: Any, x: Tensor, lengths: Tensor | None) -> Callable[[], Tensor]:
    T = x.size(1)

    def packed() -> Tensor:
        sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(layers(sequence)[0], batch_first=True, total_length=T)[0]

    if provider == OURS:
        return lambda: layers(x, lengths)[0]
    return packed if provider == "torch_packed" else lambda: layers(x)[0]


def _same_output(ours: Tensor, theirs: Tensor | None) -> Row:
    if theirs is None:  # what it computes on the padding is its own
        return {}
    try:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    except AssertionError as error:
        raise DisagreementError(f"outputs differ, so it is not timed: {error}") from error
    return {}
