"""A training step of the Transformer beside ``torch.nn``'s, eager and compiled.

Forward, cross-entropy, backward and Adam on random tokens, in bf16 autocast on a GPU. Ours gets the
padding as lengths, the peer, the same layers of ``torch.nn`` with the same weights, as masks. In
evaluation and fp32 all must find the same loss before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn.models import Transformer, TransformerConfig

from .comparison import OURS, ModelCase, Provider, same_loss
from .sizes import Size

_COMPILE_SECONDS = 12.0
"""That ``torch.compile`` takes for a layer of the encoder and one of the decoder, about."""


class Batch(NamedTuple):
    """Random token indices ``[B, S]``, ``[B, T + 1]``, and lengths ``[B]``."""

    source: Tensor
    target: Tensor
    source_lengths: Tensor
    target_lengths: Tensor

    @property
    def next_words(self) -> Tensor:
        """``[B, T]``: what follows each target position; -100 behind a length."""
        words = self.target[:, 1:]
        return words.masked_fill(behind(self.target_lengths, words.size(1)), -100)


class Plain(nn.Module):
    """The same model of ``torch.nn``'s layers, as one writes it without this library."""

    positions: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        E = config.d_model
        self.embedding = nn.Embedding(config.target_vocab_size, E)
        options = {
            "dim_feedforward": config.dim_feedforward,
            "dropout": config.dropout,
            "activation": config.activation,
            "batch_first": True,
            "norm_first": config.norm_first,
        }
        norms = [nn.LayerNorm(E) if config.norm_first else None for _ in range(2)]
        self.transformer = nn.Transformer(
            E,
            config.num_heads,
            batch_first=True,
            # Its own stacks normalise once more at their ends, post-norm ones too.
            custom_encoder=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(E, config.num_heads, **options),
                config.num_encoder_layers,
                norms[0],
                enable_nested_tensor=False,
            ),
            custom_decoder=nn.TransformerDecoder(
                nn.TransformerDecoderLayer(E, config.num_heads, **options),
                config.num_decoder_layers,
                norms[1],
            ),
        )
        place = torch.arange(config.max_length)[:, None]
        angles = place * torch.exp(torch.arange(0, E, 2) * (-math.log(10000.0) / E))
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    def forward(self, batch: Batch) -> Tensor:
        source, target = batch.source, batch.target[:, :-1]
        hidden = behind(batch.source_lengths, source.size(1))
        output = self.transformer(
            self._embed(source),
            self._embed(target),
            tgt_mask=torch.ones(
                target.size(1), target.size(1), dtype=torch.bool, device=target.device
            ).triu(1),
            src_key_padding_mask=hidden,
            tgt_key_padding_mask=behind(batch.target_lengths, target.size(1)),
            memory_key_padding_mask=hidden,
            tgt_is_causal=True,
        )
        return F.linear(output, self.embedding.weight)

    def copy_weights(self, model: Transformer) -> None:
        """Take the weights of ours, whose layers have the names of ``torch.nn``'s."""
        self.transformer.encoder.load_state_dict(model.encoder.state_dict())
        self.transformer.decoder.load_state_dict(model.decoder.state_dict())
        self.embedding.load_state_dict(model.target_embedding.state_dict())

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


def behind(lengths: Tensor, size: int) -> Tensor:
    """``[B, size]``: which positions are padding."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def make_batch(vocabulary: int, sentences: int, length: int, device: str) -> Batch:
    """Sentences of half the length to all of it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocabulary, (2, sentences, length + 1), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (2, sentences), generator=generator)
    lengths[:, 0] = length
    tokens, lengths = tokens.to(device), lengths.to(device)
    return Batch(tokens[0, :, 1:], tokens[1], lengths[0], lengths[1])


def step_of(
    parameters: Iterator[nn.Parameter], loss: Callable[[], Tensor], device: str, autocast: bool
) -> Callable[[], None]:
    """One update, as a call without arguments."""
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cases(size: Size, device: str) -> list[ModelCase]:
    """The cases of ``--only training_step``; that of ``torch.compile``, which takes long, apart."""
    found = [
        _case(size, device, "", {}, "torch", rank=0),
        _case(size, device, "", {}, "torch_compile", rank=2),
    ]
    if size.variants:
        options = {"norm_first": True, "activation": "gelu"}
        found.append(_case(size, device, "_pre_norm_gelu", options, "torch", rank=4))
    return found


def _case(
    size: Size, device: str, name: str, options: dict[str, Any], peer: str, rank: int
) -> ModelCase:
    gpu = device == "cuda"
    sentences, length = size.sentences * (4 if gpu else 1), size.length * (2 if gpu else 1)
    config = TransformerConfig(
        source_vocab_size=size.vocabulary,
        target_vocab_size=size.vocabulary,
        d_model=size.d_model,
        num_heads=size.heads,
        num_encoder_layers=size.layers,
        num_decoder_layers=size.layers,
        dim_feedforward=size.feedforward,
        dropout=0.1,
        attention_dropout=0.1,
        tie_embeddings="all",
        **options,
    )
    lengths = make_batch(size.vocabulary, sentences, length, "cpu").target_lengths

    def prepare(provider: str) -> Provider:
        batch = make_batch(size.vocabulary, sentences, length, device)
        return prepared(config, provider, batch, device, autocast=gpu)

    return ModelCase(
        group="training_step",
        rank=rank,
        model=f"transformer{size.suffix}",
        task="training_step",
        name=f"batch_{sentences}_length_{length}{name}",
        dtype="bfloat16" if gpu else "float32",
        shape=f"{size.layers} + {size.layers} layers, E {size.d_model}, {size.heads} heads, F "
        f"{size.feedforward}, V {size.vocabulary}, dropout 0.1" + (", autocast" if gpu else ""),
        tokens=int(lengths.sum()),
        providers=(OURS, peer),
        prepare=prepare,
        compare=same_loss,
        shows_ours=peer == "torch",
        needs_seconds=_COMPILE_SECONDS * size.layers if peer == "torch_compile" else 0.0,
    )


def prepared(
    config: TransformerConfig, provider: str, batch: Batch, device: str, autocast: bool
) -> Provider:
    """A training step of ours, of ``torch`` or of ``torch_compile``, and its loss before it."""
    torch.manual_seed(0)
    ours = Ours(config)
    model: nn.Module = ours
    if provider != OURS:
        model = Plain(config)
        model.copy_weights(ours.model)
    model = model.to(device)
    words = batch.next_words.flatten()

    def loss() -> Tensor:
        return F.cross_entropy(model(batch).flatten(0, 1).float(), words)

    with torch.no_grad():
        model.eval()
        outcome = float(loss())
    model.train()
    called = loss
    if provider == "torch_compile":
        torch._dynamo.reset()
        called = torch.compile(loss, dynamic=False)
    step = step_of(model.parameters(), called, device, autocast)
    step()  # allocates the optimizer's state, and compiles: what fails, fails here
    return Provider(step, outcome)
