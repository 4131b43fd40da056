"""The RNN Seq2Seq beside plain PyTorch: a training step, and beam search.

The peer is the same model as one writes it with ``torch.nn``: packed sequences through the encoder,
additive attention by broadcasting ``[B, T, 1, E] + [B, 1, S, E]``, a projection of every position,
and a beam search of ``log_softmax``, ``topk`` and ``index_select``. From the same weights both must
find the same loss, and the same tokens, before anything is timed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.generation import beam_search
from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig

from .comparison import (
    OURS,
    OURS_EAGER,
    SEARCH_ROUNDS,
    ModelCase,
    Provider,
    WithoutGraph,
    same_loss,
    sentences_agree,
)
from .sizes import Size
from .transformer_step import Batch, behind, make_batch, step_of

BEAM_SIZE = 4
# Of the output projection, before a search: wider distances between candidates, so that rounding
# does not choose between them.
_SCALE = 4.0


class AdditiveAttention(nn.Module):
    """Bahdanau's attention, all target positions at once, in plain PyTorch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        """Context of queries ``[B, T, E]``; ``keys`` are ``self.key(memory)``, ``[B, S, E]``."""
        pairs = self.query(query)[:, :, None] + keys[:, None]  # [B, T, S, E]
        scores = self.score(torch.tanh(pairs)).squeeze(-1)
        weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        return weights @ memory


def both_directions(state: Tensor) -> Tensor:
    """``[2 L, B, H / 2]`` to ``[L, B, H]``: a layer's two directions side by side."""
    return state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2).contiguous()


class Plain(nn.Module):
    """The same model around ``torch.nn``'s recurrent layers."""

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU}[config.cell]
        H, E, p = config.hidden_size, config.embedding_size, config.dropout
        encoder_layers, decoder_layers = config.num_encoder_layers, config.num_decoder_layers
        self.source_embedding = nn.Embedding(config.source_vocab_size, E)
        self.target_embedding = nn.Embedding(config.target_vocab_size, E)
        self.encoder = kind(
            E,
            H // 2,
            encoder_layers,
            batch_first=True,
            dropout=p if encoder_layers > 1 else 0.0,
            bidirectional=True,
        )
        self.decoder = kind(
            E, H, decoder_layers, batch_first=True, dropout=p if decoder_layers > 1 else 0.0
        )
        self.attention = AdditiveAttention(H)
        self.combine = nn.Linear(2 * H, H, bias=False)
        self.project = nn.Linear(H, config.target_vocab_size, bias=False)

    def read(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        """Memory ``[B, S, H]`` and the state to begin with."""
        embedded = self._drop(self.source_embedding(source))
        packed = pack_padded_sequence(
            embedded, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        packed, state = self.encoder(packed)
        memory, _ = pad_packed_sequence(packed, batch_first=True)
        if isinstance(state, tuple):
            return memory, tuple(map(both_directions, state))
        return memory, both_directions(state)

    def write(
        self, words: Tensor, state: Any, keys: Tensor, memory: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Any]:
        """Logits ``[B, T, V]`` after words ``[B, T]``, and the new state."""
        queries, state = self.decoder(self._drop(self.target_embedding(words)), state)
        context = self.attention(queries, keys, memory, hidden)
        combined = torch.tanh(self.combine(torch.cat([context, queries], -1)))
        return self.project(self._drop(combined)), state

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the words."""
        memory, state = self.read(batch.source, batch.source_lengths)
        hidden = behind(batch.source_lengths, memory.size(1))
        keys = self.attention.key(memory)
        logits, _ = self.write(batch.target[:, :-1], state, keys, memory, hidden)
        return F.cross_entropy(logits.flatten(0, 1), batch.next_words.flatten())

    @torch.inference_mode()
    def search(self, source: Tensor, lengths: Tensor, tokens: int, K: int) -> list[list[int]]:
        """Beam search for the best target of each source of just so many tokens."""
        memory, state = self.read(source, lengths)
        B, V = len(source), self.config.target_vocab_size
        hidden = behind(lengths, memory.size(1)).repeat_interleave(K, 0)
        keys = self.attention.key(memory).repeat_interleave(K, 0)
        memory = memory.repeat_interleave(K, 0)
        state = _each(state, lambda part: part.repeat_interleave(K, 1))
        words = source.new_full((B * K, 1), self.config.bos_token)
        history = source.new_empty(B * K, 0)
        scores = memory.new_full((B, K), -torch.inf)
        scores[:, 0] = 0.0  # all beams are alike, so one of them has children
        first = torch.arange(B, device=source.device)[:, None] * K
        for _ in range(tokens):
            logits, state = self.write(words, state, keys, memory, hidden)
            added = F.log_softmax(logits[:, 0], -1)
            added[:, self.config.eos_token] = -torch.inf
            scores, index = (scores[:, :, None] + added.view(B, K, V)).flatten(1).topk(K)
            rows = (first + index // V).flatten()
            words = (index % V).view(-1, 1)
            history = torch.cat([history.index_select(0, rows), words], 1)
            state = _each(state, partial(torch.index_select, dim=1, index=rows))
        return history.view(B, K, -1)[:, 0].tolist()

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

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)


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


def _each(state: Any, function: Any) -> Any:
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def our_loss(model: RNNSeq2Seq, batch: Batch) -> Tensor:
    """As ``Plain.loss``, of the words alone."""
    target = batch.target[:, :-1]
    outputs = model.outputs(batch.source, target, batch.source_lengths, batch.target_lengths)
    is_word = ~behind(batch.target_lengths, target.size(1))
    rows = is_word.flatten().nonzero()[:, 0]
    total = model.target_nll(outputs, batch.source, batch.target[:, 1:], batch.source_lengths, rows)
    return total / len(rows)


def cases(size: Size, device: str) -> list[ModelCase]:
    """The cases of ``--only rnn``: steps, and searches in the batches that are translated."""
    cells = ("lstm", "gru") if size.variants else ("lstm",)
    steps = [_step(size, device, cell, rank=4 * i) for i, cell in enumerate(cells)]
    searches = [
        _search(size, device, sentences, rank=min(i, 1))
        for i, sentences in enumerate(n for n in size.batches_on(device) if n > 1)
    ]
    return [*steps, *searches]


def _config(size: Size, cell: Any) -> RNNSeq2SeqConfig:
    return RNNSeq2SeqConfig(
        source_vocab_size=size.rnn_vocabulary,
        target_vocab_size=size.rnn_vocabulary,
        cell=cell,
        embedding_size=size.hidden,
        hidden_size=size.hidden,
        num_encoder_layers=size.rnn_layers,
        num_decoder_layers=size.rnn_layers,
        dropout=0.1,
    )


def make(config: RNNSeq2SeqConfig, provider: str, device: str, scale: float) -> Any:
    """Ours, or the peer with the weights of ours."""
    torch.manual_seed(0)
    model = RNNSeq2Seq(config)
    with torch.no_grad():
        projection: Any = model.output_projection
        projection.weight.mul_(scale)
    if provider != "torch":
        return model.to(device)
    plain = Plain(config)
    plain.copy_weights(model)
    return plain.to(device)


def _shape(size: Size) -> str:
    return (
        f"{size.rnn_layers} + {size.rnn_layers} layers, {size.hidden} wide, bidirectional, "
        f"additive attention, V {size.rnn_vocabulary}"
    )


def _step(size: Size, device: str, cell: str, rank: int) -> ModelCase:
    sentences, length = 2 * size.sentences, size.length
    batch = make_batch(size.rnn_vocabulary, sentences, length, "cpu")

    def prepare(provider: str) -> Provider:
        model = make(_config(size, cell), provider, device, 1.0)
        on_device = Batch(*(part.to(device) for part in batch))
        if provider == OURS:
            loss = partial(our_loss, model, on_device)
        else:
            loss = partial(model.loss, on_device)
        model.eval()
        with torch.no_grad():
            outcome = float(loss())
        model.train()
        step = step_of(model.parameters(), loss, device, autocast=False)
        step()  # allocates the optimizer's state
        return Provider(step, outcome)

    return ModelCase(
        group="rnn",
        rank=rank,
        model=f"rnn{size.suffix}",
        task="training_step",
        name=f"{cell}_batch_{sentences}_length_{length}",
        dtype="float32",
        shape=f"{_shape(size)}, dropout 0.1",
        tokens=int(batch.target_lengths.sum()),
        providers=(OURS, "torch"),
        prepare=prepare,
        compare=same_loss,
    )


def _search(size: Size, device: str, sentences: int, rank: int) -> ModelCase:
    S = size.tokens

    def prepare(provider: str) -> Provider:
        model = make(_config(size, "lstm"), provider, device, _SCALE).eval()
        generator = torch.Generator().manual_seed(1)
        source = torch.randint(3, size.rnn_vocabulary, (sentences, S), generator=generator)
        source = source.to(device)
        if provider in (OURS, OURS_EAGER):
            decoder = model if provider == OURS else WithoutGraph(model)
            call = partial(our_search, decoder, source, S)
        else:
            lengths = torch.full((sentences,), S, device=device)
            call = partial(model.search, source, lengths, S, BEAM_SIZE)
        return Provider(call, call())

    return ModelCase(
        group="rnn",
        rank=rank,
        model=f"rnn{size.suffix}",
        task=f"beam_{BEAM_SIZE}",
        name=f"lstm_batch_{sentences}",
        dtype="float32",
        shape=f"{_shape(size)}; {S} tokens each",
        tokens=sentences * S,
        providers=(OURS, OURS_EAGER, "torch") if device == "cuda" else (OURS, "torch"),
        prepare=prepare,
        compare=partial(sentences_agree, exact=True),
        counts=device == "cuda" and rank == 0,
        rounds=SEARCH_ROUNDS[device],
    )


def our_search(model: Any, source: Tensor, tokens: int) -> list[list[int]]:
    """The tokens of the best target of each source."""
    found = beam_search(model, source, beam_size=BEAM_SIZE, max_length=tokens, min_length=tokens)
    return [best.tokens for [best] in found]
