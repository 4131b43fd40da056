"""Steps of RecurrentAttention: beams that change places, sources that leave and come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.nn import AttentionMemory, AttentionState, RecurrentAttention

from .test_recurrent_attention import LENGTHS, B, M, Q, S, T, every_variant, make

K = 3


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def alone(module: RecurrentAttention, query: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Context ``[T, M]`` and weights ``[T, S]`` of queries ``[T, Q]`` to one source ``[S, M]``."""
    context, weights, _ = module(query[None], module.read(source[None]))
    return context[0], weights[0]


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@every_variant
def test_beams_that_follow_their_parents_equal_whole_targets(
    variant: Any, is_training: bool
) -> None:
    module = make(variant).train(is_training)
    queries, source = draw(0, T, B, K, Q), draw(1, B, S, M)
    memory = module.read(source, LENGTHS)
    state = module.initial(memory, K)
    generator = torch.Generator().manual_seed(2)
    histories = [[[] for _ in range(K)] for _ in range(B)]  # of the queries that a beam has had
    for t in range(T):
        context, weights, state = module.step(queries[t], memory, state)
        for b, length in enumerate(LENGTHS.tolist()):
            for k in range(K):
                histories[b][k] = [*histories[b][k], queries[t, b, k]]
                whole = torch.stack(histories[b][k])
                expected, expected_weights = alone(module, whole, source[b, :length])
                torch.testing.assert_close(context[b, k], expected[-1])
                torch.testing.assert_close(weights[b, k, :length], expected_weights[-1])
                assert not weights[b, k, length:].any()
        parents = torch.randint(K, (B, K), generator=generator)
        assert state.select(parents) is state
        histories = [[histories[b][int(parents[b, k])] for k in range(K)] for b in range(B)]


@every_variant
def test_steps_have_the_gradients_of_all_at_once(variant: Any) -> None:
    module = make(variant)
    queries, source = draw(0, B, T, Q), draw(1, B, S, M)
    gradients = []
    for is_stepwise in (False, True):
        module.zero_grad()
        leaves = [tensor.clone().requires_grad_() for tensor in (queries, source)]
        memory = module.read(leaves[1], LENGTHS)
        state = module.initial(memory)
        if is_stepwise:
            rows = []
            for t in range(T):
                *row, state = module.step(leaves[0][:, t : t + 1], memory, state)
                rows.append(row)
            context, weights = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
        else:
            context, weights, state = module(leaves[0], memory, state)
        (context.sin().sum() + weights.square().sum()).backward()
        gradients.append([tensor.grad for tensor in (*leaves, *module.parameters())])
    torch.testing.assert_close(*gradients)


@every_variant
def test_forward_goes_on_from_a_state(variant: Any) -> None:
    module = make(variant)
    queries, source = draw(0, B, T, Q), draw(1, B, S, M)
    memory = module.read(source, LENGTHS)
    context, weights, last = module(queries, memory)
    first_context, first_weights, state = module(queries[:, :1], memory)
    *none, unchanged = module(queries[:, :0], memory, state)
    assert [tuple(x.shape) for x in none] == [(B, 0, M), (B, 0, S)]
    assert unchanged is state
    rest_context, rest_weights, end = module(queries[:, 1:], memory, state)
    torch.testing.assert_close(torch.cat([first_context, rest_context], 1), context)
    torch.testing.assert_close(torch.cat([first_weights, rest_weights], 1), weights)
    for name in ("previous", "coverage"):
        torch.testing.assert_close(getattr(end, name), getattr(last, name))


@every_variant
def test_sources_leave_and_are_replaced(variant: Any) -> None:
    module = make(variant).eval()
    source, others = draw(0, B, S, M), draw(1, 3, S + 2, M)
    queries = draw(2, 4, B, K, Q)
    memory = module.read(source, LENGTHS)
    state = module.initial(memory, K)
    # What stands in each row: a source, and the queries that each of its targets has had.
    rows = [(source[b, : LENGTHS[b]], [[] for _ in range(K)]) for b in range(B)]

    def step(t: int) -> AttentionState:
        context, weights, after = module.step(queries[t, : len(rows)], memory, state)
        for row, (present, histories) in enumerate(rows):
            for k in range(K):
                histories[k] = [*histories[k], queries[t, row, k]]
                expected, expected_weights = alone(module, torch.stack(histories[k]), present)
                torch.testing.assert_close(context[row, k], expected[-1])
                torch.testing.assert_close(weights[row, k, : len(present)], expected_weights[-1])
                assert not weights[row, k, len(present) :].any()
        return after

    state = step(0)
    # Source 2, of length 0, leaves; the others change places, and so do their targets.
    kept, parents = torch.tensor([1, 0]), torch.tensor([[2, 2, 0], [1, 0, 2]])
    assert memory.select(kept) is memory
    assert state.select(parents, kept) is state
    rows = [
        (rows[b][0], [rows[b][1][k] for k in beams])
        for b, beams in zip(kept.tolist(), parents.tolist(), strict=True)
    ]
    state = step(1)
    # A longer source takes the first place, then a shorter one the second.
    for row, length, new in ((0, S + 2, others[:1]), (1, 2, others[1:2, :4])):
        other = module.read(new, torch.tensor([length]))
        assert memory.replace(torch.tensor([row]), other) is memory
        assert state.replace(torch.tensor([row]), module.initial(other, K)) is state
        assert memory.key.size(2) == memory.value.size(2) == S + 2
        rows[row] = (new[0, :length], [[] for _ in range(K)])
        state = step(2 + row)
    # What stood there is gone.
    assert not memory.value[1, :, 4:].any()
    assert not memory.key[1, :, 4:].any()


@every_variant
@torch.no_grad()
def test_a_step_can_be_repeated_in_place(variant: Any) -> None:
    """As a CUDA graph does: the same addresses, whatever stands in them."""
    module = make(variant).eval()
    queries, source = draw(0, T, B, K, Q), draw(1, B, S, M)
    memory = module.read(source, LENGTHS)
    state, still = module.initial(memory, K), module.initial(memory, K)
    kept_tensors = [still.previous, still.coverage]
    addresses = [tensor.data_ptr() for tensor in kept_tensors if tensor is not None]
    parents = torch.tensor([[1, 0, 0], [2, 1, 0], [0, 0, 0]])
    for t in range(T):
        context, weights, state = module.step(queries[t], memory, state)
        found = module.step(queries[t], memory, still)
        assert torch.equal(found[0], context)
        kept = weights.clone()
        state.select(parents)
        still.copy_(found[2]).select(parents)
        assert torch.equal(weights, kept)  # what the caller got is no part of the state
    kept_tensors = [still.previous, still.coverage]
    assert [tensor.data_ptr() for tensor in kept_tensors if tensor is not None] == addresses


def test_first_states() -> None:
    _, source = draw(0, 1), draw(1, B, S, M)
    lengths = LENGTHS.int()
    thirds = [[1 / 6] * 6, [1 / 3] * 3 + [0.0] * 3, [0.0] * 6]
    firsts = [[1.0] + [0.0] * 5, [1.0] + [0.0] * 5, [0.0] * 6]
    for variant, expected in (
        (("location", 2, False, False), thirds),
        (("location", 2, False, True), firsts),
        (("dot", 2, False, True), firsts),
    ):
        module = make(variant)
        state = module.initial(module.read(source, lengths), K)
        assert state.coverage is None
        previous = torch.tensor(expected, dtype=torch.float64)[:, None, None].expand(B, K, 2, S)
        torch.testing.assert_close(state.previous, previous)
    module = make(("additive", 2, True, False)).float()
    state = module.initial(module.read(source.float(), lengths), K)
    assert state.previous is None
    assert torch.equal(state.coverage, torch.zeros(B, K, 2, S))
    module = make(("general", 2, False, False))
    assert module.initial(module.read(source)) == AttentionState(None, None)


def test_keys_are_not_copied() -> None:
    """Where nothing is projected, keys and values are one tensor, and stay one."""
    source, rows = draw(0, B, S, M), torch.tensor([1])
    for kind in ("dot", "general"):
        module = make((kind, 1, False, False))
        memory = module.read(source)
        assert memory.key is memory.value
        assert memory.key.data_ptr() == source.data_ptr()
        memory = module.read(source, LENGTHS)
        memory.select(torch.tensor([2, 0]))
        memory.replace(rows, module.read(draw(1, 1, S + 1, M), torch.tensor([S + 1])))
        assert isinstance(memory, AttentionMemory)
        assert memory.key is memory.value
    heads = make(("general", 2, False, False)).read(source)
    assert heads.key.shape == (B, 1, S, M)
    assert heads.key.data_ptr() == source.data_ptr()


def test_the_callers_source_and_lengths_are_not_written() -> None:
    module = make(("dot", 1, False, False))
    source, lengths = draw(0, B, S, M), LENGTHS.clone()
    before = source.clone()
    memory = module.read(source, lengths)
    memory.replace(torch.tensor([0]), module.read(draw(1, 1, S, M), torch.tensor([2])))
    assert torch.equal(source, before)
    assert torch.equal(lengths, LENGTHS)
