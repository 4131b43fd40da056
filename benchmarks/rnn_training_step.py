"""``python -m benchmarks.rnn_training_step``: a training step of the RNN beside plain PyTorch.

Forward, cross-entropy, backward and Adam on random tokens. The peer is the same model as one writes
it with ``torch.nn``: packed sequences through the encoder, additive attention by broadcasting
``[B, T, 1, E] + [B, 1, S, E]``, a projection of every position. From the same weights both must
find the same loss before anything is timed. ``--compile`` compiles the peer's attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig

from .results import machine_line
from .timing import interleaved, ratio, summary
from .training_step import Batch, _behind, allocated, launches, make_batch


class AdditiveAttention(nn.Module):
    """Bahdanau's attention, all target positions at once, in plain PyTorch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)

    def forward(self, query: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        pairs = self.query(query)[:, :, None] + self.key(memory)[:, None]  # [B, T, S, E]
        scores = self.score(torch.tanh(pairs)).squeeze(-1)
        weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        return weights @ memory


def both_directions(state: Tensor) -> Tensor:
    """``[2 L, B, H / 2]`` to ``[L, B, H]``: a layer's two directions side by side."""
    return state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2).contiguous()


class Plain(nn.Module):
    """The same model around ``torch.nn``'s recurrent layers."""

    def __init__(self, config: RNNSeq2SeqConfig, compiled: bool) -> None:
        super().__init__()
        self.config = config
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN}[config.cell]
        H, E = config.hidden_size, config.embedding_size
        self.source_embedding = nn.Embedding(config.source_vocab_size, E)
        self.target_embedding = nn.Embedding(config.target_vocab_size, E)
        self.encoder = kind(
            E,
            H // 2,
            config.num_encoder_layers,
            batch_first=True,
            dropout=config.dropout,
            bidirectional=True,
        )
        self.decoder = kind(
            E, H, config.num_decoder_layers, batch_first=True, dropout=config.dropout
        )
        self.attention = AdditiveAttention(H)
        self._attend = torch.compile(self.attention) if compiled else self.attention
        self.combine = nn.Linear(2 * H, H, bias=False)
        self.project = nn.Linear(H, config.target_vocab_size, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        source, target = batch.source, batch.target[:, :-1]
        p = self.config.dropout
        embedded = F.dropout(self.source_embedding(source), p, self.training)
        packed = pack_padded_sequence(
            embedded, batch.source_lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        packed, state = self.encoder(packed)
        memory, _ = pad_packed_sequence(packed, batch_first=True)
        embedded = F.dropout(self.target_embedding(target), p, self.training)
        if isinstance(state, tuple):
            begin: Tensor | tuple[Tensor, ...] = tuple(map(both_directions, state))
        else:
            begin = both_directions(state)
        queries, _ = self.decoder(embedded, begin)
        context = self._attend(queries, memory, _behind(batch.source_lengths, source.size(1)))
        hidden = torch.tanh(self.combine(torch.cat([context, queries], -1)))
        return self.project(F.dropout(hidden, p, self.training))

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the words."""
        targets = batch.target[:, 1:]
        targets = targets.masked_fill(_behind(batch.target_lengths, targets.size(1)), -100)
        return F.cross_entropy(self(batch).flatten(0, 1), targets.flatten())

    def copy_weights(self, model: RNNSeq2Seq) -> None:
        """Take the weights of ours."""
        theirs = dict(self.named_parameters())
        taken = set()
        for name, parameter in model.named_parameters():
            mine = _NAMES.get(name) or f"{name.split('.')[0]}.{name.split('.')[-1]}"
            with torch.no_grad():
                theirs[mine].copy_(parameter.view_as(theirs[mine]))
            taken.add(mine)
        if taken != set(theirs):
            raise RuntimeError(f"parameters without a counterpart: {sorted(set(theirs) - taken)}")


_NAMES = {
    "target_embedding.weight": "target_embedding.weight",
    "source_embedding.weight": "source_embedding.weight",
    "output_projection.weight": "project.weight",
    "decoder.combination.weight": "combine.weight",
    "decoder.attention.query_projection.weight": "attention.query.weight",
    "decoder.attention.query_projection.bias": "attention.query.bias",
    "decoder.attention.key_projection.weight": "attention.key.weight",
    "decoder.attention.score_weight": "attention.score.weight",
}


def our_loss(model: RNNSeq2Seq, batch: Batch) -> Tensor:
    """As ``Plain.loss``, of the words alone."""
    target = batch.target[:, :-1]
    outputs = model.outputs(batch.source, target, batch.source_lengths, batch.target_lengths)
    is_word = ~_behind(batch.target_lengths, target.size(1))
    rows = is_word.flatten().nonzero()[:, 0]
    total = model.target_nll(outputs, batch.source, batch.target[:, 1:], batch.source_lengths, rows)
    return total / len(rows)


def step_of(model: nn.Module, loss: Callable[[], Tensor], device: str) -> Callable[[], None]:
    """One update, as a call without arguments."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def check_same_loss(losses: dict[str, Callable[[], Tensor]]) -> None:
    """Raise RuntimeError unless all find the same loss in evaluation."""
    with torch.no_grad():
        values = {name: float(loss()) for name, loss in losses.items()}
    first = next(iter(values.values()))
    if any(abs(value - first) > 1e-4 * abs(first) for value in values.values()):
        raise RuntimeError(f"the models find different losses: {values}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", default="lstm", choices=("lstm", "gru", "tanh"))
    parser.add_argument("--hidden", type=int, default=512, help="of states and embeddings")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder and the decoder each")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32, help="sentences")
    parser.add_argument("--length", type=int, default=64, help="of the longest sentence")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="the peer's attention")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (7)")
    arguments = parser.parse_args()
    config = RNNSeq2SeqConfig(
        source_vocab_size=arguments.vocab_size,
        target_vocab_size=arguments.vocab_size,
        cell=arguments.cell,
        embedding_size=arguments.hidden,
        hidden_size=arguments.hidden,
        num_encoder_layers=arguments.layers,
        num_decoder_layers=arguments.layers,
        dropout=0.1,
    )
    device = arguments.device
    batch = make_batch(config, arguments.batch, arguments.length, device)
    torch.manual_seed(0)
    ours = RNNSeq2Seq(config).to(device)
    plain = Plain(config, arguments.compile).to(device)
    plain.copy_weights(ours)
    losses = {"torch.nn": lambda: plain.loss(batch), "fused_attn": lambda: our_loss(ours, batch)}
    models = {"torch.nn": plain.eval(), "fused_attn": ours.eval()}
    check_same_loss(losses)
    steps = {name: step_of(model.train(), losses[name], device) for name, model in models.items()}
    for step in steps.values():
        step()
    counts = {name: launches(step, device) for name, step in steps.items()}
    sizes = {name: allocated(step, device) for name, step in steps.items()}
    times = interleaved(steps, arguments.rounds)
    r = ratio(times["torch.nn"].seconds, times["fused_attn"].seconds)
    words = int(batch.target_lengths.sum())
    print(f"{machine_line()}\n")
    print("| model | launches | allocated MB | ms | target tokens/s |")
    print("|---|---|---|---|---|")
    for name, taken in times.items():
        median = summary(taken.seconds).median
        print(
            f"| {name} | {counts[name]} | {sizes[name] / 1e6:.0f} | {median * 1e3:.1f} | "
            f"{words / median:,.0f} |"
        )
    print(f"\ntorch.nn / fused_attn: {r.median:.2f} ({r.q25:.2f}–{r.q75:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
