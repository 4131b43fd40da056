"""The recurrent model's packed weights: never stale, and the same bits in every batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.generation import BeamSearch, Constraints, Result, Sampling, generate
from fused_attn.models import RNNSeq2Seq

from .test_rnn_seq2seq import VARIANTS, make, sources, targets
from .test_transformer import close

# Wide enough for several tiles of every kernel.
WIDE = {
    "embedding_size": 96,
    "hidden_size": 96,
    "source_vocab_size": 61,
    "target_vocab_size": 61,
    "max_length": 60,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
# Products of queries with keys, here those of multiplicative attention and of CopyNet, and
# convolutions over weights are summed in an order that depends on their shapes.
EXACT = [
    "plain",
    "cho",
    "additive",
    "monotonic",
    "pointer_generator",
    "pointer_feeding",
]


def wide(name: str) -> RNNSeq2Seq:
    changes = {**WIDE, **VARIANTS[name]}
    if changes["target_vocab_size"] > 3:
        changes["target_vocab_size"] = 61
    return make(**changes)


def is_packed(state: Any) -> bool:
    return not isinstance(state.program.decoder.recurrence, torch.nn.RNNBase)


def decode(
    model: RNNSeq2Seq, source: Tensor, lengths: Tensor, words: Tensor, parents: Tensor
) -> list[Tensor]:
    """Logits of each step: words ``[T, B, K]`` are appended and reordered by parents."""
    state = model.start(source, lengths, words.size(2))
    assert is_packed(state)
    found = []
    for tokens, beams in zip(words, parents, strict=True):
        logits, state = model.step(tokens, state)
        found.append(logits)
        state = model.reorder(state, beams)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_steps_equal_the_modules(name: str) -> None:
    model = make(**VARIANTS[name])
    source, lengths = sources(model, 5, 2, 7)
    words, parents = targets(model, (4, 3, 2)), targets(model, (4, 3, 2), seed=2) % 2
    packed = decode(model, source, lengths, words, parents)
    handle = model.decoder.recurrence.register_forward_hook(lambda *_: None)
    state = model.start(source, lengths, 2)
    assert not is_packed(state)
    for tokens, beams, found in zip(words, parents, packed, strict=True):
        logits, state = model.step(tokens, state)
        close(found.softmax(-1), logits.softmax(-1))
        state = model.reorder(state, beams)
    handle.remove()
    assert is_packed(model.start(source, lengths, 2))


CHANGES: dict[str, Any] = {
    "recurrence": lambda model: model.encoder.recurrence.weight_hh_l0.data.mul_(0.5),
    "bias": lambda model: setattr(model.decoder.recurrence, "bias_ih_l1", _ones(64)),
    "attention": lambda model: model.decoder.attention.score_weight.data.mul_(2.0),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: 1.1 * tensor for name, tensor in model.state_dict().items()}
    ),
    "module": lambda model: setattr(
        model, "output_projection", torch.nn.Linear(16, 19, bias=False).eval()
    ),
    "adapter": lambda model: setattr(
        model, "output_projection", torch.nn.Sequential(torch.nn.Linear(16, 19)).eval()
    ),
    "double": lambda model: model.double(),
}


def _ones(size: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(size))


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: str) -> None:
    model = make()
    source, lengths = sources(model, 5, 2)
    tokens = targets(model, (2, 1))
    before, _ = model.step(tokens, model.start(source, lengths, 1))
    CHANGES[change](model)
    state = model.start(source, lengths, 1)
    assert is_packed(state) == (change not in ("adapter", "double"))
    logits, _ = model.step(tokens, state)
    expected = model(source, tokens, lengths)
    assert change == "double" or (expected - before).abs().max() > 1e-3
    close(logits, expected)


def test_the_packed_copy_is_kept_and_is_nobodys_business() -> None:
    model = make(tie_embeddings="output")
    names = set(model.state_dict())
    source, lengths = sources(model, 5, 2)
    program = model.start(source, lengths, 1).program
    assert model.start(source, lengths, 3).program is program
    assert set(model.state_dict()) == names
    tokens = targets(model, (2, 1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._packed is None
        logits, _ = other.step(tokens, other.start(source, lengths, 1))
        assert torch.equal(logits, model.step(tokens, model.start(source, lengths, 1))[0])
    assert model.start(source, lengths, 1).program is program
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_packed(model.start(source, lengths, 1))
    model.decoder.bridge.train()
    assert not is_packed(model.start(source, lengths, 1))


# --- a sentence's bits do not depend on its batch -------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    model = wide(name)
    T, K = 4, 3
    source, lengths = sources(model, 1, 20, 4, 37, 2)
    B = len(source)
    words = targets(model, (T, B, K), positions=1)
    parents = targets(model, (T, B, K), seed=2) % K
    torch.set_num_threads(2)  # the fixture of this folder sets it back
    together = decode(model, source, lengths, words, parents)
    for threads, rows, width in ((1, [3, 0], 45), (2, [4, 1, 2], 20), (1, [0], 1), (2, [2], 4)):
        torch.set_num_threads(threads)
        padded = torch.nn.functional.pad(source, (0, 20), value=5)[rows, :width]
        found = decode(model, padded, lengths[rows], words[:, rows], parents[:, rows])
        for actual, expected in zip(found, together, strict=True):
            assert torch.equal(actual, expected[rows])


def bits(results: list[Result]) -> list[Any]:
    """All that was found, with every number exact."""
    return [
        [(h.tokens, h.score, h.complete, h.token_log_probabilities, h.beams) for h in r.hypotheses]
        for r in results
    ]


@pytest.mark.parametrize("name", ["additive", "pointer_generator"])
def test_a_result_is_the_same_bits_in_every_batch(name: str) -> None:
    model = make(**VARIANTS[name])
    source, lengths = sources(model, 1, 6, 4, 9, 2, 3, 7)
    for strategy in (
        BeamSearch(beam_size=3, num_hypotheses=3, coverage_penalty=0.3),
        Sampling(num_samples=2, temperature=1.5, top_p=0.95, seed=7),
    ):
        options: dict[str, Any] = {
            "strategy": strategy,
            "constraints": Constraints(token_bias={2: 2.0}),
            "max_length": 14,
        }
        expected = generate(model, source, lengths, **options)
        assert len({len(h.tokens) for r in expected for h in r.hypotheses}) >= 3
        for batch_size in (1, 3):
            found = generate(model, source, lengths, batch_size=batch_size, **options)
            assert bits(found) == bits(expected), f"in batches of {batch_size}"
