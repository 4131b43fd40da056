"""Hugging Face models as decoders of ours, and their own ``generate``, on tiny random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# It needs Python 3.11, and is not on every machine.
transformers = pytest.importorskip("transformers")

Architecture = Literal["marian", "bart", "t5"]
ARCHITECTURES: tuple[Architecture, ...] = ("marian", "bart", "t5")

VOCABULARY = 40
FIRST_WORD = 5
"""Smaller tokens are special in one of the architectures."""


@dataclass
class HuggingFaceState:
    """B sources with K targets each; targets are padded on the right, where nothing sees them."""

    memory: Tensor
    """``[B, S, E]``: what the encoder says."""
    mask: Tensor
    """``[B, S]`` int64: 1 where there is a source token."""
    targets: Tensor
    """``[B, K, T]`` int64, the token that begins a target included."""
    lengths: Tensor
    """``[B]`` int64: tokens of each source's targets, 1..T, or 0 before the first step."""


class HuggingFaceDecoder:
    """A Hugging Face encoder-decoder for ``fused_attn.generation``.

    Every step runs the decoder over whole targets, without a cache: slow, and there is nothing
    that could be reordered wrongly. Targets have a length for each source, since a source may
    take the place of another that has finished (``replace``).
    """

    max_length = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.bos_token: int = model.generation_config.decoder_start_token_id
        self.eos_token: int = model.generation_config.eos_token_id

    def start(self, source: Tensor, source_lengths: Tensor, beam_size: int) -> HuggingFaceState:
        mask = attention_mask(source, source_lengths)
        encoder = self.model.get_encoder()
        memory = encoder(input_ids=source, attention_mask=mask).last_hidden_state
        B = len(source)
        return HuggingFaceState(
            memory,
            mask,
            targets=source.new_zeros(B, beam_size, 0),
            lengths=source.new_zeros(B),
        )

    def step(self, tokens: Tensor, state: HuggingFaceState) -> tuple[Tensor, HuggingFaceState]:
        B, K = tokens.shape
        lengths = state.lengths + 1
        targets = _padded(state.targets, int(lengths.max()))
        last = (lengths - 1)[:, None, None].expand(B, K, 1)
        targets = targets.scatter(2, last, tokens[:, :, None])
        logits = self.model(
            encoder_outputs=(state.memory.repeat_interleave(K, dim=0),),
            attention_mask=state.mask.repeat_interleave(K, dim=0),
            decoder_input_ids=targets.flatten(0, 1),
            use_cache=False,
        ).logits.unflatten(0, (B, K))  # [B, K, T, V]
        V = logits.size(3)
        following = logits.gather(2, last[:, :, :, None].expand(B, K, 1, V))[:, :, 0]
        return following, HuggingFaceState(state.memory, state.mask, targets, lengths)

    def reorder(
        self, state: HuggingFaceState, parents: Tensor, sentences: Tensor | None = None
    ) -> HuggingFaceState:
        if sentences is None:
            sentences = torch.arange(len(parents))
        return HuggingFaceState(
            state.memory[sentences],
            state.mask[sentences],
            state.targets[sentences[:, None], parents],
            state.lengths[sentences],
        )

    def replace(
        self, state: HuggingFaceState, sentences: Tensor, other: HuggingFaceState
    ) -> HuggingFaceState:
        """Source i of ``other`` takes the place of source ``sentences[i]``."""
        S = max(state.mask.size(1), other.mask.size(1))
        T = max(state.targets.size(2), other.targets.size(2))

        def put(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, sentences, new)

        return HuggingFaceState(
            put(*(_padded(part.memory.mT, S).mT for part in (state, other))),
            put(*(_padded(part.mask, S) for part in (state, other))),
            put(*(_padded(part.targets, T) for part in (state, other))),
            put(state.lengths, other.lengths),
        )


class Generated(NamedTuple):
    """A sequence that ``generate`` returned, as our ``Hypothesis`` states it."""

    tokens: list[int]
    score: float
    complete: bool


def build(architecture: Architecture, end_bias: float = 2.5, seed: int = 2) -> PreTrainedModel:
    """A tiny model with random weights that decide something.

    As initialised by transformers, all tokens are about equally likely and every target would be
    cut at the longest length. Here logits have a standard deviation of about 1.5 and that of the
    end of sequence a bias, so that targets of all lengths occur.

    Args:
        architecture: Which.
        end_bias: Added to the logit of the end of sequence; more ends targets earlier.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel
    if architecture == "marian":
        # As in the released checkpoints: the padding token begins a target.
        model = transformers.MarianMTModel(
            transformers.MarianConfig(
                **_SIZES,
                vocab_size=VOCABULARY,
                pad_token_id=VOCABULARY - 1,
                decoder_start_token_id=VOCABULARY - 1,
                eos_token_id=0,
                forced_eos_token_id=None,
                tie_word_embeddings=False,
            )
        )
    elif architecture == "bart":
        # As in the released checkpoints: the end of sequence begins a target.
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                **_SIZES,
                vocab_size=VOCABULARY,
                forced_eos_token_id=None,
                tie_word_embeddings=False,
            )
        )
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=16,
                decoder_start_token_id=0,
                tie_word_embeddings=False,
            )
        )
        model.lm_head = nn.Linear(16, VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                is_embedding = "embed" in name or "shared" in name
                parameter.normal_(std=1.0 if is_embedding else parameter.size(1) ** -0.5)
        head = model.lm_head
        head.weight.mul_(1.5)
        bias = head.bias if architecture == "t5" else model.final_logits_bias[0]
        bias.zero_()
        bias[model.generation_config.eos_token_id] = end_bias
    return model.eval()


_SIZES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}


def attention_mask(source: Tensor, source_lengths: Tensor) -> Tensor:
    """``[B, S]`` int64: 1 at a source's tokens, 0 behind its length."""
    return (torch.arange(source.size(1)) < source_lengths[:, None]).long()


@torch.inference_mode()
def hugging_face_beam_search(
    model: PreTrainedModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    num_hypotheses: int = 1,
    **options: Any,
) -> list[list[Generated]]:
    """``model.generate`` with beams, one of them too.

    Args:
        model: From ``build``.
        source: ``[B, S]`` tokens.
        source_lengths: ``[B]``.
        max_length: Most tokens of a target, the end of sequence included; what ``generate`` calls
            ``max_length`` counts the token that begins a target as well.
        num_hypotheses: Sequences returned for each source.
        options: As ``generate`` calls them.

    Returns:
        For each source its sequences, without the token that begins a target.
    """

    def beam_search(model: PreTrainedModel, *inputs: Any, **arguments: Any) -> Any:
        return type(model)._beam_search(model, *inputs, **arguments)

    found = model.generate(
        source,
        attention_mask=attention_mask(source, source_lengths),
        max_length=max_length + 1,
        num_return_sequences=num_hypotheses,
        output_scores=True,
        return_dict_in_generate=True,
        # Left to itself, generate turns to greedy search where there is one beam.
        custom_generate=beam_search,
        **options,
    )
    eos = model.generation_config.eos_token_id
    generated = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        tokens = row[1:]  # what begins a target may be the end-of-sequence token itself
        complete = eos in tokens
        tokens = tokens[: tokens.index(eos)] if complete else tokens
        assert complete or len(tokens) == max_length
        generated.append(Generated(tokens, score, complete))
    return [
        generated[first : first + num_hypotheses]
        for first in range(0, len(generated), num_hypotheses)
    ]


def added_bias(bias: dict[int, float]) -> Any:
    """A processor that adds to single tokens' scores; one that a caller passes runs last."""
    return transformers.generation.SequenceBiasLogitsProcessor(
        {(token,): value for token, value in bias.items()}
    )


def _padded(tensor: Tensor, size: int) -> Tensor:
    """The last dimension filled up with zeros."""
    return nn.functional.pad(tensor, (0, size - tensor.size(-1)))
