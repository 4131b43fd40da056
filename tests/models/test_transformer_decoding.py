"""Laws of the Transformer as a decoder: packed weights, bits that depend on no batch, serving."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.models import Transformer
from fused_attn.models.transformer_packed import PackedTransformer

from .test_transformer import VARIANTS, close, make, sources

# Wide enough for several tiles of every kernel, and with a head size that fills vectors.
WIDE = {
    "d_model": 128,
    "num_heads": 2,
    "dim_feedforward": 288,
    "source_vocab_size": 61,
    "target_vocab_size": 61,
    "max_length": 300,
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make(**VARIANTS[request.param])


def tokens_for(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(3, 19, shape, generator=torch.Generator().manual_seed(seed))


def is_packed(state: Any) -> bool:
    return isinstance(state.program, PackedTransformer)


def decode(
    model: Transformer, source: Tensor, lengths: Tensor, targets: Tensor, parents: Tensor
) -> list[Tensor]:
    """Logits of each step: targets ``[T, B, K]`` are appended and reordered by parents."""
    state = model.start(source, lengths, targets.size(2))
    found = []
    for tokens, beams in zip(targets, parents, strict=True):
        logits, state = model.step(tokens, state)
        found.append(logits)
        state = model.reorder(state, beams)
    return found


# --- packed weights ----------------------------------------------------------------------------


def test_packed_steps_equal_the_modules(model: Transformer) -> None:
    source, lengths = sources(5, 2, 7)
    targets, parents = tokens_for((5, 3, 2), 1), tokens_for((5, 3, 2), 2) % 2
    assert is_packed(model.start(source, lengths, 2))
    packed = decode(model, source, lengths, targets, parents)
    handle = model.decoder.layers[0].register_forward_hook(lambda *_: None)
    assert not is_packed(model.start(source, lengths, 2))
    for actual, expected in zip(
        packed, decode(model, source, lengths, targets, parents), strict=True
    ):
        close(actual, expected)
    handle.remove()
    assert is_packed(model.start(source, lengths, 2))


def _step(model: Transformer) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(*[tokens_for((2, 4), seed) for seed in (1, 2)]).logsumexp(-1).sum().backward()
    optimizer.step()


CHANGES = {
    "optimizer": _step,
    "load_state_dict": lambda model: model.load_state_dict(
        {name: 1.1 * tensor for name, tensor in model.state_dict().items()}
    ),
    "data_copy": lambda model: model.encoder.layers[0].linear2.weight.data.copy_(
        torch.ones(32, 48)
    ),
    "data_bias": lambda model: setattr(
        model.decoder.layers[1].self_attn.in_proj_bias, "data", torch.ones(96)
    ),
    "parameter": lambda model: setattr(
        model.decoder.layers[0].linear1, "weight", torch.nn.Parameter(torch.ones(48, 32))
    ),
    "module": lambda model: setattr(
        model.encoder.layers[1], "linear1", torch.nn.Linear(32, 48).eval()
    ),
    "norm": lambda model: model.decoder.layers[2].norm1.weight.data.mul_(2.0),
    "embedding": lambda model: model.target_embedding.weight.data.mul_(2.0),
    "adapter": lambda model: setattr(
        model.decoder.layers[0], "linear2", torch.nn.Sequential(torch.nn.Linear(48, 32)).eval()
    ),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: str) -> None:
    model = make()
    source, lengths = sources(5, 2)
    tokens = tokens_for((2, 1), 3)
    before, _ = model.step(tokens, model.start(source, lengths, 1))
    CHANGES[change](model)
    state = model.start(source, lengths, 1)
    assert is_packed(state) == (change not in ("adapter", "double"))
    logits, _ = model.step(tokens, state)
    expected = model(source, tokens, lengths)
    assert change == "double" or (expected - before).abs().max() > 1e-3
    close(logits, expected)


def test_the_packed_copy_is_kept_and_is_nobodys_business() -> None:
    model = make()
    names = set(model.state_dict())
    source, lengths = sources(5, 2)
    program = model.start(source, lengths, 1).program
    assert model.start(source, lengths, 3).program is program
    assert set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._packed is None
        tokens = tokens_for((2, 1), 3)
        logits, _ = other.step(tokens, other.start(source, lengths, 1))
        assert torch.equal(logits, model.step(tokens, model.start(source, lengths, 1))[0])
    assert model.start(source, lengths, 1).program is program


@pytest.mark.parametrize("why", ["dropout in training", "global hook", "autocast", "inference"])
def test_when_weights_are_not_packed(why: str) -> None:
    model = make()
    source, lengths = sources(5, 2)
    if why == "dropout in training":
        model.decoder.layers[0].train()
        assert not is_packed(model.start(source, lengths, 1))
    elif why == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert not is_packed(model.start(source, lengths, 1))
        handle.remove()
    elif why == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not is_packed(model.start(source, lengths, 1))
    else:  # parameters that count no versions are packed all the same
        with torch.inference_mode():
            model = make()
            assert is_packed(model.start(source, lengths, 1))
            model.output_projection.weight.mul_(2.0)
            tokens = tokens_for((2, 1), 3)
            logits, _ = model.step(tokens, model.start(source, lengths, 1))
            close(logits, model(source, tokens, lengths))


# --- a sentence's bits do not depend on its batch ---------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_do_not_depend_on_the_batch(variant: str) -> None:
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 2}
    model = make(**{**VARIANTS[variant], **WIDE, **layers})
    T, K = 9, 3
    source, lengths = sources(1, 33, 4, 70, 17, 2)
    B = len(source)
    targets, parents = tokens_for((T, B, K), 1), tokens_for((T, B, K), 2) % K
    torch.set_num_threads(2)  # the fixture of this folder sets it back
    together = decode(model, source, lengths, targets, parents)
    for threads, rows, width in (
        (1, [3, 0], 90),
        (2, [4, 1, 2], 33),
        (1, [0], 1),
        (2, [2], 4),
        (1, [5, 3, 1], 70),
    ):
        torch.set_num_threads(threads)
        padded = torch.nn.functional.pad(source, (0, 20), value=5)[rows, :width]
        found = decode(model, padded, lengths[rows], targets[:, rows], parents[:, rows])
        for actual, expected in zip(found, together, strict=True):
            assert torch.equal(actual, expected[rows])


def test_bits_do_not_depend_on_the_beams() -> None:
    # One row of queries in the batch is the hardest: products of one row have kernels of their own.
    model = make(**WIDE)
    source, lengths = sources(6, 9)
    targets = tokens_for((30, 2, 1), 1)
    wide = targets.expand(-1, -1, 5)
    zeros = torch.zeros(30, 2, 5, dtype=torch.int64)
    beams = decode(model, source, lengths, wide, zeros)
    single = decode(model, source, lengths, targets, zeros[:, :, :1])
    alone = decode(model, source[:1, :6], lengths[:1], targets[:, :1], zeros[:, :1, :1])
    for many, two, one in zip(beams, single, alone, strict=True):
        assert torch.equal(many, two.expand_as(many))
        assert torch.equal(one, two[:1])


# --- sources that take the place of others ----------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("variant", ["post_norm", "learned_positions", "rms_norm_swiglu"])
def test_replaced_sources(variant: str, packed: bool, reserved: bool) -> None:
    """Continuous batching gives each source what it has alone: bit for bit where packed."""
    model = make(**VARIANTS[variant])
    if not packed:
        model.decoder.layers[0].register_forward_hook(lambda *_: None)
    K, steps, total = 3, 45, 12
    generator = torch.Generator().manual_seed(3)
    texts = [
        torch.randint(3, 19, (1, int(n)), generator=generator)
        for n in torch.randint(1, 12, (total,), generator=generator)
    ]
    targets = torch.randint(3, 19, (total, steps, K), generator=generator)
    parents = torch.randint(0, K, (total, steps, K), generator=generator)

    def begin(names: list[int]) -> Any:
        S = max(texts[name].size(1) for name in names)
        rows = [torch.nn.functional.pad(texts[n], (0, S - texts[n].size(1))) for n in names]
        lengths = torch.tensor([texts[name].size(1) for name in names])
        return model.start(torch.cat(rows), lengths, K)

    def run(schedule: dict[int, tuple[list[int], list[int]]], first: list[int]) -> dict[Any, Any]:
        """Logits by source and own step; at a step, places are taken by new sources."""
        present, ages = list(first), [0] * len(first)
        state = begin(first)
        if reserved:
            state = model.reserve(state, 20)
        found = {}
        for step in range(steps):
            if step in schedule:
                places, names = schedule[step]
                state = model.replace(state, torch.tensor(places), begin(names))
                for place, name in zip(places, names, strict=True):
                    present[place], ages[place] = name, 0
            if reserved and max(ages) % 10 == 9:
                state = model.reserve(state, min(80, max(ages) + 11))
            if step == 30 and len(present) > 2:  # one leaves
                present.pop(1), ages.pop(1)
                rows = torch.tensor([0, *range(2, len(present) + 1)])
                beams = torch.arange(K).expand(len(present), K)
                state = model.reorder(state, beams, rows)
            tokens = torch.stack([targets[n, a] for n, a in zip(present, ages, strict=True)])
            logits, state = model.step(tokens, state)
            for row, (name, age) in enumerate(zip(present, ages, strict=True)):
                found[name, age] = logits[row]
            beams = torch.stack([parents[n, a] for n, a in zip(present, ages, strict=True)])
            state = model.reorder(state, beams)
            ages = [age + 1 for age in ages]
        return found

    schedule = {
        4: ([2], [4]),
        5: ([0, 3], [5, 6]),
        17: ([1], [7]),
        35: ([0, 2], [8, 9]),
    }
    together = run(schedule, [0, 1, 2, 3])
    assert {name for name, _ in together} == set(range(10))
    for name in range(10):
        alone = run({}, [name])
        mine = {key: logits for key, logits in together.items() if key[0] == name}
        assert len(mine) >= 4
        for key, logits in mine.items():
            if packed:
                assert torch.equal(logits, alone[key])
            else:
                close(logits, alone[key])


def test_reserved_steps_keep_shapes_and_places() -> None:
    """What a captured graph needs: nothing is allocated anew, and the host is not asked."""
    model = make()
    source, lengths = sources(5, 2, 7)
    state = model.reserve(model.start(source, lengths, 2), 24)
    plain = model.start(source, lengths, 2)
    assert model.decodes_on_static_shapes
    held = (state.memory, state.cache._buffer, state.cache._ancestry, state.cache.positions)
    places = [tensor.data_ptr() for tensor in held]
    for step in range(24):
        tokens, parents = tokens_for((3, 2), step), tokens_for((3, 2), 50 + step) % 2
        position = state.cache.begin()
        assert position.common is None
        assert position.extent == 24
        logits, state = model.step(tokens, state)
        expected, plain = model.step(tokens, plain)
        assert torch.equal(logits, expected)
        state, plain = model.reorder(state, parents), model.reorder(plain, parents)
        held = (state.memory, state.cache._buffer, state.cache._ancestry, state.cache.positions)
        assert [tensor.data_ptr() for tensor in held] == places
    with pytest.raises(ValueError, match=r"step needs a position more .* capacity of 24"):
        model.step(tokens, state)
    state = model.reserve(state, 30)
    assert torch.equal(model.step(tokens, state)[0], model.step(tokens, plain)[0])


def test_long_caches() -> None:
    """Past one chunk of the attention kernel's keys, in a batch with a source that begins anew."""
    model = make(**{**WIDE, "num_decoder_layers": 1, "num_encoder_layers": 1})
    source, lengths = sources(5, 8)
    state, alone = model.start(source, lengths, 1), model.start(source[1:], lengths[1:], 1)
    for step in range(290):
        if step == 3:
            state = model.replace(state, torch.tensor([1]), model.start(source[1:], lengths[1:], 1))
        tokens = tokens_for((2, 1), step)
        logits, state = model.step(tokens, state)
        if step >= 3:
            expected, alone = model.step(tokens[1:], alone)
            assert torch.equal(logits[1:], expected)


# --- where targets look ------------------------------------------------------------------------


def test_cross_attention_is_that_of_the_full_forward(model: Transformer) -> None:
    source, lengths = sources(5, 1, 7)
    targets, parents = tokens_for((6, 3, 2), 1), tokens_for((6, 3, 2), 2) % 2
    state = model.start(source, lengths, 2)
    history = torch.zeros(3, 2, 0, dtype=torch.int64)
    for tokens, beams in zip(targets, parents, strict=True):
        _, state = model.step(tokens, state)
        history = torch.cat([history, tokens[:, :, None]], dim=2)
        weights = model.cross_attention(state)
        assert weights.shape == (3, 2, 7)
        close(weights.sum(-1), torch.ones(3, 2))
        for k in range(2):
            expected = model.cross_attention_weights(source, history[:, k], lengths)[:, -1]
            close(weights[:, k], expected)
            assert not weights[:, k][torch.arange(7) >= lengths[:, None]].any()
        history = history.gather(1, beams[:, :, None].expand(-1, -1, history.size(2)))
        state = model.reorder(state, beams)


def test_align(model: Transformer) -> None:
    source, lengths = sources(5, 1, 7)
    target, target_lengths = sources(4, 2, 3, seed=1)
    weights = model.align(source, target, lengths, target_lengths)
    assert weights.shape == (3, 4, 7)
    is_token = torch.arange(4) < target_lengths[:, None]
    assert not weights[~is_token].any()
    for i in range(3):
        S, T = int(lengths[i]), int(target_lengths[i])
        alone = model.align(source[i : i + 1, :S], target[i : i + 1, :T])
        close(weights[i, :T, :S], alone[0])
        close(alone.sum(-1), torch.ones(1, T))


# --- memory and errors -------------------------------------------------------------------------


def test_cache_bytes() -> None:
    model = make()
    source, lengths = sources(5, 2, 7)
    L, B, K, H, D, S, itemsize = 3, 3, 2, 4, 8, 7, 4
    state = model.start(source, lengths, K)
    cross = 2 * L * B * H * S * D * itemsize
    assert state.cache_bytes == cross
    for step in range(70):
        _, state = model.step(tokens_for((B, K), step), state)
        capacity = 32 if step < 32 else 64 if step < 64 else 80  # doubles, up to max_length
        own = 2 * L * B * K * H * D * capacity * itemsize
        assert state.cache_bytes == own + cross + 4 * B * K * capacity


def test_refusals() -> None:
    model = make(max_length=6)
    source, lengths = sources(3, 2)
    state = model.start(source, lengths, 2)
    tokens = tokens_for((2, 2), 0)
    one = model.start(source[:1], lengths[:1], 2)
    with pytest.raises(ValueError, match=r"cross_attention needs a step"):
        model.cross_attention(state)
    with pytest.raises(ValueError, match=r"sentences must have shape \[N\] with N = 1 .*got \[2\]"):
        model.replace(state, torch.tensor([0, 1]), one)
    with pytest.raises(ValueError, match=r"other must have beam_size = 2 .*got 1"):
        model.replace(state, torch.tensor([0]), model.start(source[:1], lengths[:1], 1))
    with pytest.raises(ValueError, match=r"capacity must be in 0\.\.6 .*got 7"):
        model.reserve(state, 7)
    for _ in range(4):
        _, state = model.step(tokens, state)
    with pytest.raises(ValueError, match=r"other must come from start"):
        model.replace(
            one, torch.tensor([0]), model.reorder(state, tokens[:1] % 2, torch.tensor([0]))
        )
    with pytest.raises(ValueError, match=r"capacity must be in 4\.\.6 .*got 3"):
        model.reserve(state, 3)
