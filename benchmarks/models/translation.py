"""Greedy and beam search beside CTranslate2's and Hugging Face's.

One set of random weights in three libraries: ours, a ``MarianMTModel``, and, on a CPU, CTranslate2
through its own reader of that. Every sentence gets as many tokens as its source has, so that all do
the same work. In fp32 all must find the same tokens before anything is timed; in 16 and 8 bits a
row says how many are the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from fused_attn.generation import beam_search, greedy_search
from fused_attn.models import Transformer, TransformerConfig, quantize

from .comparison import (
    OURS,
    OURS_EAGER,
    SEARCH_ROUNDS,
    AbsentError,
    ModelCase,
    Provider,
    WithoutGraph,
    sentences_agree,
)
from .sizes import Size

Tokens = list[list[int]]
BEAM_SIZE = 4
# Of the output projection: wider distances between candidates, so that rounding does not choose
# between them.
_SCALE = 2.0
_COMPUTE_TYPES = {"float32": "float32", "int8": "int8"}
"""What CTranslate2 calls a dtype."""


def cases(size: Size, device: str) -> list[ModelCase]:
    """The cases of ``--only translation``, most valuable first."""
    translators = Translators(size, device)
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32", "int8")
    return [
        _case(translators, dtype, beam_size, sentences, rank=3 if i > 0 else min(j, 1))
        for i, dtype in enumerate(dtypes)
        for j, sentences in enumerate(size.batches_on(device))
        for beam_size in (BEAM_SIZE, 1)
    ]


def _case(
    translators: Translators, dtype: str, beam_size: int, sentences: int, rank: int
) -> ModelCase:
    size, device = translators.size, translators.device
    providers = [OURS]
    if device == "cuda":
        providers.append(OURS_EAGER)
    if dtype != "int8":
        providers.append("hugging_face")
    if device == "cpu":
        providers.append("ctranslate2")

    def prepare(provider: str) -> Provider:
        generator = torch.Generator().manual_seed(1)
        source = torch.randint(3, size.vocabulary, (sentences, size.tokens), generator=generator)
        make = {
            OURS: our_search,
            OURS_EAGER: our_search,
            "hugging_face": hugging_face_search,
            "ctranslate2": ctranslate2_search,
        }[provider]
        model = translators.model(provider, dtype)
        call = make(model, source.to(device), size.tokens, beam_size)
        return Provider(call, call())

    return ModelCase(
        group="translation",
        rank=rank,
        model=f"transformer{size.suffix}",
        task="greedy" if beam_size == 1 else f"beam_{beam_size}",
        name=f"batch_{sentences}",
        dtype=dtype,
        shape=f"{size.layers} + {size.layers} layers, E {size.d_model}, {size.heads} heads, F "
        f"{size.feedforward}, V {size.vocabulary}; {size.tokens} tokens each",
        tokens=sentences * size.tokens,
        providers=tuple(providers),
        prepare=prepare,
        compare=partial(sentences_agree, exact=dtype == "float32"),
        counts=device == "cuda" and rank == 0,
        rounds=SEARCH_ROUNDS[device],
    )


class Translators:
    """The same weights in each library and dtype, made when they are asked for.

    Args:
        size: Of the model.
        device: Where they compute.
    """

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device
        self._folder = tempfile.TemporaryDirectory()
        self.model: Callable[[str, str], Any] = cache(self._make)

    def _make(self, provider: str, dtype: str) -> Any:
        if provider == OURS_EAGER:
            return WithoutGraph(self.model(OURS, dtype))
        if provider == OURS:
            model = build(self.size)
            if dtype == "int8":
                return quantize(model)
            return model.to(self.device, getattr(torch, dtype))
        if provider == "ctranslate2":
            theirs = marian(build(self.size))
            return ctranslate2_translator(theirs, self._folder.name, _COMPUTE_TYPES[dtype])
        return marian(build(self.size)).to(self.device, getattr(torch, dtype))


def build(size: Size) -> Transformer:
    """Our model with random weights, the same ones in each call."""
    torch.manual_seed(1)
    config = TransformerConfig(
        source_vocab_size=size.vocabulary,
        target_vocab_size=size.vocabulary,
        d_model=size.d_model,
        num_heads=size.heads,
        num_encoder_layers=size.layers,
        num_decoder_layers=size.layers,
        dim_feedforward=size.feedforward,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a bias of 0 would hide that one is missing
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.output_weight.mul_(_SCALE)
    return model


def marian(model: Transformer) -> Any:
    """The same weights in a Hugging Face model.

    Raises:
        AbsentError: There is no ``transformers``.
    """
    try:
        from transformers import GenerationConfig, MarianConfig, MarianMTModel
    except ImportError as error:
        raise AbsentError(f"transformers: {error}") from error

    config = model.config
    theirs = MarianMTModel(
        MarianConfig(
            vocab_size=config.source_vocab_size,
            decoder_vocab_size=config.target_vocab_size,
            share_encoder_decoder_embeddings=False,
            tie_word_embeddings=False,
            max_position_embeddings=config.max_length,
            encoder_layers=config.num_encoder_layers,
            decoder_layers=config.num_decoder_layers,
            encoder_ffn_dim=config.dim_feedforward,
            decoder_ffn_dim=config.dim_feedforward,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            d_model=config.d_model,
            activation_function="relu",
            scale_embedding=True,
            pad_token_id=config.pad_token,
            bos_token_id=config.bos_token,
            eos_token_id=config.eos_token,
            decoder_start_token_id=config.bos_token,
            forced_eos_token_id=None,
        )
    ).eval()
    theirs.generation_config = GenerationConfig(
        pad_token_id=config.pad_token,
        bos_token_id=config.bos_token,
        eos_token_id=config.eos_token,
        decoder_start_token_id=config.bos_token,
    )
    pairs: list[tuple[Any, Any]] = []

    def attention(ours: Any, other: Any) -> None:
        weights, biases = ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            projection = getattr(other, f"{name}_proj")
            pairs.extend([(weight, projection.weight), (bias, projection.bias)])
        layer(ours.out_proj, other.out_proj)

    def layer(ours: Any, other: Any) -> None:
        pairs.extend([(ours.weight, other.weight), (ours.bias, other.bias)])

    positions: Any = model.source_positions
    pairs.append((model.output_weight, theirs.lm_head.weight))
    for stack, embedding, other in (
        (model.encoder, model.source_embedding, theirs.model.encoder),
        (model.decoder, model.target_embedding, theirs.model.decoder),
    ):
        pairs.append((embedding.weight, other.embed_tokens.weight))
        pairs.append((positions.table, other.embed_positions.weight))
        for mine, its in zip(stack.layers, other.layers, strict=True):
            attention(mine.self_attn, its.self_attn)
            layer(mine.norm1, its.self_attn_layer_norm)
            if stack is model.decoder:
                attention(mine.multihead_attn, its.encoder_attn)
                layer(mine.norm2, its.encoder_attn_layer_norm)
            layer(mine.linear1, its.fc1)
            layer(mine.linear2, its.fc2)
            layer(mine.norm3 if stack is model.decoder else mine.norm2, its.final_layer_norm)
    with torch.no_grad():
        for ours, other in pairs:
            other.copy_(ours)
    return theirs


def ctranslate2_translator(theirs: Any, folder: str, compute_type: str) -> Any:
    """A CTranslate2 translator with the weights of a Hugging Face model, which it may change.

    Raises:
        AbsentError: There is no ``ctranslate2``.
    """
    try:
        import ctranslate2
        from ctranslate2.converters.transformers import BartLoader
    except ImportError as error:
        raise AbsentError(f"ctranslate2: {error}") from error

    theirs.config.normalize_before = theirs.config.normalize_embedding = False
    spec = BartLoader().get_model_spec(theirs)
    names = [str(token) for token in range(theirs.config.vocab_size)]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.bos_token = spec.config.decoder_start_token = str(theirs.config.bos_token_id)
    spec.config.eos_token = str(theirs.config.eos_token_id)
    spec.config.unk_token = str(theirs.config.pad_token_id)
    spec.config.layer_norm_epsilon = 1e-5
    spec.validate()
    spec.optimize(quantization=compute_type)
    spec.save(folder)
    return ctranslate2.Translator(
        folder,
        device="cpu",
        compute_type=compute_type,
        intra_threads=torch.get_num_threads(),
        inter_threads=1,
    )


def our_search(
    model: Any, source: torch.Tensor, tokens: int, beam_size: int
) -> Callable[[], Tokens]:
    """Our search."""
    options = {"max_length": tokens, "min_length": tokens}
    if beam_size == 1:
        return lambda: [best.tokens for best in greedy_search(model, source, **options)]
    return lambda: [
        best.tokens for [best] in beam_search(model, source, beam_size=beam_size, **options)
    ]


def hugging_face_search(
    model: Any, source: torch.Tensor, tokens: int, beam_size: int
) -> Callable[[], Tokens]:
    """Hugging Face's."""
    mask = torch.ones_like(source)

    def run() -> Tokens:
        found = model.generate(
            input_ids=source,
            attention_mask=mask,
            num_beams=beam_size,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        return found[:, 1:].tolist()

    return run


def ctranslate2_search(
    model: Any, source: torch.Tensor, tokens: int, beam_size: int
) -> Callable[[], Tokens]:
    """CTranslate2's."""
    texts = [[str(token) for token in row] for row in source.tolist()]

    def run() -> Tokens:
        found = model.translate_batch(
            texts,
            beam_size=beam_size,
            min_decoding_length=tokens,
            max_decoding_length=tokens,
            max_batch_size=len(texts),
        )
        return [[int(token) for token in result.hypotheses[0]] for result in found]

    return run
