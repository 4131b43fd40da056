"""Training of recurrent layers on padded batches beside ``torch.nn``.

    python -m benchmarks.recurrent_layers [--kind lstm gru] [--rounds 9] [--threads 2]

Forward and backward of one layer, fp32 on a CPU, in turns: ``torch.nn``'s on the padded batch,
which works on the padding as well; ``torch.nn``'s on a packed batch, packing and unpacking
included; and ours with lengths and without. A ratio above 1 says that ours is faster. Ours is
compared with ``torch.nn``'s packed result before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.nn import RecurrentLayers

from .results import machine_line
from .timing import interleaved, ratio, summary

INPUT = 512
# Hidden size, whether in two directions; batch and length.
SIZES = [(512, False), (256, True)]
BATCHES = [(32, 16), (64, 32), (64, 64)]
_TORCH: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN}


def providers(kind: Any, H: int, bidirectional: bool, B: int, T: int) -> dict[str, Any]:
    """Functions that run forward and backward, by name, and the share of valid steps."""
    generator = torch.Generator().manual_seed(1)
    ours = RecurrentLayers(kind, INPUT, H, bidirectional=bidirectional)
    theirs = _TORCH[kind](INPUT, H, batch_first=True, bidirectional=bidirectional)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(B, T, INPUT, generator=generator).requires_grad_()
    lengths = torch.linspace(T // 3, T, B).long()[torch.randperm(B, generator=generator)]
    grad = torch.randn(B, T, ours.output_size, generator=generator)

    def packed() -> Tensor:
        sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(theirs(sequence)[0], batch_first=True, total_length=T)[0]

    forwards: dict[str, Callable[[], Tensor]] = {
        "torch padded": lambda: theirs(x)[0],
        "torch packed": packed,
        "ours": lambda: ours(x, lengths)[0],
        "ours, no lengths": lambda: ours(x)[0],
    }
    torch.testing.assert_close(forwards["ours"](), packed(), rtol=1e-4, atol=1e-5)
    parameters = {"ours": list(ours.parameters()), "torc": list(theirs.parameters())}

    def bind(name: str) -> Callable[[], object]:
        leaves = [x, *parameters[name[:4]]]
        return lambda: torch.autograd.grad(forwards[name](), leaves, grad)

    return {name: bind(name) for name in forwards} | {"valid": lengths.float().mean().item() / T}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kind", nargs="+", choices=_TORCH, default=["lstm", "gru"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine_line())
    print("ms: medians; over: median of the ratios of neighbouring turns, with quartiles")
    for kind in arguments.kind:
        for H, bidirectional in SIZES:
            for B, T in BATCHES:
                functions = providers(kind, H, bidirectional, B, T)
                valid = functions.pop("valid")
                times = interleaved(functions, rounds=arguments.rounds, seconds=0.0)
                directions = " x 2" if bidirectional else ""
                print(f"{kind} {INPUT} -> {H}{directions}, B {B}, T {T}, {valid:.0%} valid")
                for name in functions:
                    line = f"  {name:17}{1e3 * summary(times[name].seconds).median:8.1f} ms"
                    if name.startswith("ours"):
                        for peer in ("torch padded", "torch packed")[: 2 - ("no" in name)]:
                            over = ratio(times[peer].seconds, times[name].seconds)
                            line += (
                                f"  {over.median:.2f} ({over.q25:.2f}-{over.q75:.2f}) over {peer}"
                            )
                    print(line, flush=True)


if __name__ == "__main__":
    main()
