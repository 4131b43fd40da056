"""``python -m benchmarks.translation``: searches beside CTranslate2's and Hugging Face's.

One set of random weights in three libraries: ours, a ``MarianMTModel``, and CTranslate2 through its
own reader of that. Every sentence gets as many tokens as ``--tokens`` says, so that all do the same
work; before anything is timed in fp32 all three must find the same tokens. A ratio above 1 means
that ours is faster.

8-bit rows follow, ours beside CTranslate2's, and where the time of ours goes, by torch's profiler.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from fused_attn.generation import beam_search, greedy_search
from fused_attn.models import Transformer, TransformerConfig, quantize

from .results import machine_line
from .timing import interleaved, ratio, summary

Tokens = list[list[int]]


def build(arguments: argparse.Namespace) -> Transformer:
    """Our model with random weights."""
    torch.manual_seed(arguments.seed)
    config = TransformerConfig(
        source_vocab_size=arguments.vocab_size,
        target_vocab_size=arguments.vocab_size,
        d_model=arguments.d_model,
        num_heads=arguments.heads,
        num_encoder_layers=arguments.layers,
        num_decoder_layers=arguments.layers,
        dim_feedforward=arguments.feedforward,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a bias of 0 would hide that one is missing
                parameter.add_(0.1 * torch.randn_like(parameter))
        # Widens the distances between candidates, so that rounding does not choose between them.
        model.output_weight.mul_(arguments.scale)
    return model


def marian(model: Transformer) -> Any:
    """The same weights in a Hugging Face model.

    Raises:
        ImportError: There is no ``transformers``.
    """
    from transformers import GenerationConfig, MarianConfig, MarianMTModel

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


def ctranslate2_translator(theirs: Any, folder: str, compute_type: str, threads: int) -> Any:
    """A CTranslate2 translator of a Hugging Face model.

    Raises:
        ImportError: There is no ``ctranslate2``.
    """
    import ctranslate2
    from ctranslate2.converters.transformers import BartLoader

    theirs = copy.deepcopy(theirs)  # the reader takes views, and quantises in place
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
        intra_threads=threads,
        inter_threads=1,
    )


def searches(model: Any, source: torch.Tensor, tokens: int, beam_size: int) -> Callable[[], Tokens]:
    """Our search."""
    options = {"max_length": tokens, "min_length": tokens}
    if beam_size == 1:
        return lambda: [best.tokens for best in greedy_search(model, source, **options)]
    return lambda: [
        best.tokens for [best] in beam_search(model, source, beam_size=beam_size, **options)
    ]


def hugging_face(theirs: Any, source: torch.Tensor, tokens: int, beam_size: int) -> Any:
    """Hugging Face's."""
    mask = torch.ones_like(source)

    def run() -> Tokens:
        found = theirs.generate(
            input_ids=source,
            attention_mask=mask,
            num_beams=beam_size,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        return found[:, 1:].tolist()

    return run


def ctranslate2_search(translator: Any, source: torch.Tensor, tokens: int, beam_size: int) -> Any:
    """CTranslate2's."""
    texts = [[str(token) for token in row] for row in source.tolist()]

    def run() -> Tokens:
        found = translator.translate_batch(
            texts,
            beam_size=beam_size,
            min_decoding_length=tokens,
            max_decoding_length=tokens,
            max_batch_size=len(texts),
        )
        return [[int(token) for token in result.hypotheses[0]] for result in found]

    return run


def agreement(ours: Tokens, theirs: Tokens) -> float:
    """Share of equal tokens at equal places."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=False)]
    return sum(a == b for a, b in pairs) / max(1, sum(map(len, ours)))


# Where the time goes: what a profiler calls the parts.
PARTS = {
    "products": ("mkldnn::_linear_pointwise", "quantized::linear"),
    "attention": ("fused_attn_C::attention", "fused_attn_C::decode_attention"),
    "norms": ("fused_attn_C::add_layer_norm",),
    "search step": ("fused_attn_C::beam_search",),
}


def parts(run: Callable[[], object]) -> dict[str, float]:
    """Seconds in kernels of each kind, in other operators of torch, and in Python between them."""
    run()
    started = time.perf_counter()
    run()
    wall = time.perf_counter() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    seconds = dict.fromkeys((*PARTS, "other operators"), 0.0)
    for event in profile.key_averages():
        own = event.self_cpu_time_total * 1e-6
        kind = next((k for k, names in PARTS.items() if event.key.startswith(names)), None)
        if kind is None and event.key.startswith("aten::"):
            kind = "other operators"
        if kind is not None:
            seconds[kind] += own
    return {**seconds, "Python and the rest": wall - sum(seconds.values())}


def main() -> int:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6, help="of encoder and decoder each (6)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--feedforward", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--sentences", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="source tokens of each (32)")
    parser.add_argument("--tokens", type=int, default=32, help="generated for each (32)")
    parser.add_argument("--beam-size", type=int, action="append", help="repeatable (1 and 4)")
    parser.add_argument("--dtype", choices=("fp32", "int8"), action="append", help="repeatable")
    parser.add_argument("--scale", type=float, default=2.0, help="of the output projection (2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each provider (7)")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    model = build(arguments)
    source = torch.randint(3, arguments.vocab_size, (arguments.sentences, arguments.length))
    print(f"{machine_line()}\n")
    absent: dict[str, str] = {}
    try:
        theirs = marian(model)
    except ImportError as error:  # CTranslate2 reads the weights from there
        absent = dict.fromkeys(("Hugging Face", "CTranslate2"), str(error))
    translators: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, compute_type in (("fp32", "float32"), ("int8", "int8")):
            if not absent:
                try:
                    translators[dtype] = ctranslate2_translator(
                        theirs, folder, compute_type, threads
                    )
                except ImportError as error:
                    absent["CTranslate2"] = str(error)
    for peer, reason in absent.items():
        print(f"{peer} is absent: {reason}")
    print("| search | dtype | peer | peer ms | ours ms | peer / ours (quartiles) | same tokens |")
    print("|---|---|---|---|---|---|---|")
    shares = {}
    same = True
    for dtype in arguments.dtype or ("fp32", "int8"):
        decoder: Any = model if dtype == "fp32" else quantize(model)
        for beam_size in arguments.beam_size or (1, 4):
            call = (source, arguments.tokens, beam_size)
            ours = searches(decoder, *call)
            peers: dict[str, Any] = {}
            if "CTranslate2" not in absent:
                peers["CTranslate2"] = ctranslate2_search(translators[dtype], *call)
            if "Hugging Face" not in absent and dtype == "fp32":
                peers["Hugging Face"] = hugging_face(theirs, *call)
            found = ours()
            agreed = {peer: agreement(found, run()) for peer, run in peers.items()}
            name = "greedy" if beam_size == 1 else f"beam {beam_size}"
            shares[name, dtype] = parts(ours)
            if dtype == "fp32" and any(share < 1.0 for share in agreed.values()):
                same = False
                print(f"{name}: tokens differ, so no times: {agreed}")
                continue
            times = interleaved({"ours": ours, **peers}, arguments.rounds, seconds=0.0)
            mine = summary(times["ours"].seconds).median * 1e3
            for peer in peers:
                r = ratio(times[peer].seconds, times["ours"].seconds)
                theirs = summary(times[peer].seconds).median * 1e3
                print(
                    f"| {name} | {dtype} | {peer} | {theirs:.0f} | {mine:.0f} | "
                    f"**{r.median:.2f}** ({r.q25:.2f}–{r.q75:.2f}) | {agreed[peer]:.1%} |",
                    flush=True,
                )
            if not peers:
                print(f"| {name} | {dtype} | absent | – | {mine:.0f} | – | – |")
    heads = [*PARTS, "other operators", "Python and the rest"]
    print("\nWhere ours spends its time, ms:\n")
    print(f"| search | dtype | {' | '.join(heads)} |")
    print(f"|---|---|{'---|' * len(heads)}")
    for (name, dtype), seconds in shares.items():
        cells = " | ".join(f"{seconds[head] * 1e3:.1f}" for head in heads)
        print(f"| {name} | {dtype} | {cells} |")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
