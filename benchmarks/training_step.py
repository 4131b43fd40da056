"""``python -m benchmarks.training_step``: a training step of the Transformer beside torch.nn's.

Forward, cross-entropy, backward and Adam on random tokens; ours gets the padding as lengths, the
peer, `torch.nn.Transformer` with the same embedding and projection, as masks. Three figures each:
the time, the operators that compute something (on a GPU: the kernels launched), and the bytes that
are allocated on the way.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn.models import Transformer, TransformerConfig

from .results import machine_line
from .timing import interleaved, ratio, summary

# Operators that make a tensor without computing what is in it, or only look at one.
# fmt: off
_FREE = frozenset({
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand",
    "flatten", "is_same_size", "narrow", "lift_fresh", "new_empty", "new_empty_strided",
    "permute", "reshape", "select", "slice", "split", "split_with_sizes", "t", "squeeze",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "_local_scalar_dense",
    "_reshape_alias", "_unsafe_view",
})
# fmt: on


class Batch(NamedTuple):
    """Random token indices ``[B, S]``, ``[B, T + 1]``, and lengths ``[B]``."""

    source: Tensor
    target: Tensor
    source_lengths: Tensor
    target_lengths: Tensor


class Plain(nn.Module):
    """The same model around ``torch.nn.Transformer``, as one writes it without this library."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        E = config.d_model
        self.embedding = nn.Embedding(config.target_vocab_size, E)
        self.transformer = nn.Transformer(
            E,
            config.num_heads,
            config.num_encoder_layers,
            config.num_decoder_layers,
            config.dim_feedforward,
            config.dropout,
            config.activation,
            batch_first=True,
            norm_first=config.norm_first,
        )
        positions = torch.arange(config.max_length)[:, None]
        angles = positions * torch.exp(torch.arange(0, E, 2) * (-math.log(10000.0) / E))
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], -1))

    def forward(self, batch: Batch) -> Tensor:
        source, target = batch.source, batch.target[:, :-1]
        hidden = _behind(batch.source_lengths, source.size(1))
        output = self.transformer(
            self._embed(source),
            self._embed(target),
            tgt_mask=torch.ones(
                target.size(1), target.size(1), dtype=torch.bool, device=target.device
            ).triu(1),
            src_key_padding_mask=hidden,
            tgt_key_padding_mask=_behind(batch.target_lengths, target.size(1)),
            memory_key_padding_mask=hidden,
            tgt_is_causal=True,
        )
        return F.linear(output, self.embedding.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * math.sqrt(self.config.d_model)
        return F.dropout(x + self.positions[: tokens.size(1)], self.config.dropout, self.training)


class Ours(nn.Module):
    """``fused_attn.models.Transformer``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.model = Transformer(config)

    def forward(self, batch: Batch) -> Tensor:
        target = batch.target[:, :-1]
        return self.model(batch.source, target, batch.source_lengths, batch.target_lengths)


def _behind(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def make_batch(config: TransformerConfig, size: int, length: int, device: str) -> Batch:
    """Sentences of half the length to all of it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, config.target_vocab_size, (2, size, length + 1), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (2, size), generator=generator)
    lengths[:, 0] = length
    tokens, lengths = tokens.to(device), lengths.to(device)
    return Batch(tokens[0, :, 1:], tokens[1], lengths[0], lengths[1])


def step_of(model: nn.Module, batch: Batch, autocast: bool) -> Callable[[], None]:
    """One update, as a call without arguments."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    device = batch.source.device.type
    targets = batch.target[:, 1:].masked_fill(
        _behind(batch.target_lengths, batch.target.size(1) - 1), -100
    )

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            logits = model(batch)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


class CountOperators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        self.count += name not in _FREE
        return func(*args, **(kwargs or {}))


def launches(step: Callable[[], None], device: str) -> int:
    """Kernels that a step launches; on a CPU, its operators that compute something."""
    if device == "cpu":
        with CountOperators() as operators:
            step()
        return operators.count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    kernels = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)


def allocated(step: Callable[[], None], device: str) -> int:
    """Bytes that a step allocates in all."""
    if device == "cuda":
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        step()
        return torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    # The records by operator have the difference to what is freed; these have each allocation.
    records = profile.profiler.kineto_results.events()
    return sum(max(record.nbytes(), 0) for record in records if record.name() == "[memory]")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and the decoder each")
    parser.add_argument("--feedforward", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16, help="sentences")
    parser.add_argument("--length", type=int, default=64, help="of the longest sentence")
    parser.add_argument("--activation", default="relu", choices=("relu", "gelu"))
    parser.add_argument("--norm-first", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--autocast", action="store_true", help="in bf16")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (7)")
    arguments = parser.parse_args()
    config = TransformerConfig(
        source_vocab_size=arguments.vocab_size,
        target_vocab_size=arguments.vocab_size,
        d_model=arguments.d_model,
        num_heads=arguments.heads,
        num_encoder_layers=arguments.layers,
        num_decoder_layers=arguments.layers,
        dim_feedforward=arguments.feedforward,
        dropout=0.1,
        attention_dropout=0.1,
        activation=arguments.activation,
        norm_first=arguments.norm_first,
        tie_embeddings="all",
    )
    device = arguments.device
    batch = make_batch(config, arguments.batch, arguments.length, device)
    steps = {}
    for name, kind in (("torch.nn", Plain), ("fused_attn", Ours)):
        torch.manual_seed(0)
        steps[name] = step_of(kind(config).to(device).train(), batch, arguments.autocast)
        steps[name]()
    counts = {name: launches(step, device) for name, step in steps.items()}
    sizes = {name: allocated(step, device) for name, step in steps.items()}
    times = interleaved(steps, arguments.rounds)
    r = ratio(times["torch.nn"].seconds, times["fused_attn"].seconds)
    print(f"{machine_line()}\n")
    print("| model | launches | allocated MB | ms |")
    print("|---|---|---|---|")
    for name, taken in times.items():
        print(
            f"| {name} | {counts[name]} | {sizes[name] / 1e6:.0f} | "
            f"{summary(taken.seconds).median * 1e3:.1f} |"
        )
    print(f"\ntorch.nn / fused_attn: {r.median:.2f} ({r.q25:.2f}–{r.q75:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
