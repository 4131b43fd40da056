"""RecurrentAttention beside its equations, one target, one head and one position at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.nn import AttentionMemory, AttentionState, RecurrentAttention

B, T, S, Q, M, E = 3, 4, 6, 8, 8, 4
LENGTHS = torch.tensor([6, 3, 0])

# Every kind and every pair of options that goes with it: kind, heads, coverage, monotonic.
OPTIONS = {
    "additive": (
        (1, False, False),
        (1, False, True),
        (1, True, False),
        (2, False, False),
        (2, True, True),
    ),
    "dot": ((1, False, False), (2, False, False), (2, False, True)),
}
VARIANTS = [
    (kind, *options)
    for kind in ("additive", "location", "dot", "general", "scaled_dot")
    for options in OPTIONS["additive" if kind in ("additive", "location") else "dot"]
]


def variant_name(variant: tuple[str, int, bool, bool]) -> str:
    kind, heads, coverage, monotonic = variant
    return f"{kind}-{heads}" + "-coverage" * coverage + "-monotonic" * monotonic


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)


def make(variant: tuple[Any, int, bool, bool], **options: Any) -> RecurrentAttention:
    """In fp64 and without noise, no parameter where it begins, so that all of them count."""
    kind, heads, coverage, monotonic = variant
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "attention_size": E,
        "location_filters": 3,
        "location_width": 5,
        "monotonic_noise": 0.0,
        "dtype": torch.float64,
    }
    module = RecurrentAttention(
        kind, Q, M, num_heads=heads, coverage=coverage, monotonic=monotonic, **(settings | options)
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Queries ``[B, T, Q]`` and a source ``[B, S, M]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, Q), (B, S, M))
    queries, memory = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return queries, memory


# --- the equations -------------------------------------------------------------------------------


class Equations:
    """One target of one source, step by step, from the parameters by their names."""

    def __init__(self, module: RecurrentAttention, memory: Tensor) -> None:
        self.parameters = dict(module.state_dict())
        self.kind, self.H = module.kind, module.num_heads
        self.coverage, self.monotonic = module.coverage, module.monotonic
        self.is_hard = not module.training
        self.memory = memory  # [S, M], the positions that the source has
        S = len(memory)
        first = [1.0] + [0.0] * (S - 1) if self.monotonic else [1.0 / max(S, 1)] * S
        self.previous = [first[:S] for _ in range(self.H)]
        self.covered = [[0.0] * S for _ in range(self.H)]

    def score(self, query: Tensor, h: int, j: int) -> float:
        """Of head h and position j."""
        state, p, H = self.memory[j], self.parameters, self.H
        if self.kind == "dot":
            return float(query.chunk(H)[h] @ state.chunk(H)[h])
        if self.kind == "general":
            return float((p["query_projection.weight"].chunk(H)[h] @ query) @ state)
        q = (p["query_projection.weight"] @ query).chunk(H)[h]
        k = (p["key_projection.weight"] @ state).chunk(H)[h]
        if self.kind == "scaled_dot":
            return float(q @ k) / math.sqrt(len(q))
        total = q + k + p["query_projection.bias"].chunk(H)[h]
        features = []
        if self.kind == "location":
            for filter in p["location_convolution.weight"].chunk(H)[h][:, 0]:
                half = len(filter) // 2
                around = range(j - half, j + half + 1)
                features.append(
                    sum(
                        float(w) * self.previous[h][i]
                        for w, i in zip(filter, around, strict=True)
                        if 0 <= i < len(self.memory)
                    )
                )
        if self.coverage:
            features.append(self.covered[h][j])
        for f, feature in enumerate(features):
            total = total + feature * p["feature_weight"][h, f]
        v = p["score_weight"][h]
        if self.monotonic:
            v = p["score_gain"][h] * v / v.norm()
        return float(v @ total.tanh())

    def weights(self, query: Tensor, h: int) -> list[float]:
        scores = [self.score(query, h, j) for j in range(len(self.memory))]
        if not self.monotonic:
            total = sum(math.exp(score) for score in scores)
            return [math.exp(score) / total for score in scores]
        bias = float(self.parameters["score_bias"][h])
        chances = [1.0 / (1.0 + math.exp(-score - bias)) for score in scores]
        if self.is_hard:
            chances = [float(p >= 0.5) for p in chances]
        # From each position that the last step may have stopped at, onwards.
        found = [0.0] * len(chances)
        for i, start in enumerate(self.previous[h]):
            reached = start
            for j in range(i, len(chances)):
                found[j] += reached * chances[j]
                reached *= 1.0 - chances[j]
        return found

    def step(self, query: Tensor) -> tuple[Tensor, list[list[float]]]:
        """Context ``[M]`` and the heads' weights."""
        self.previous = [self.weights(query, h) for h in range(self.H)]
        self.covered = [
            [a + b for a, b in zip(*rows, strict=True)]
            for rows in zip(self.covered, self.previous, strict=True)
        ]
        contexts = []
        for h, row in enumerate(self.previous):
            context = torch.zeros(M // self.H, dtype=torch.float64)
            for j, weight in enumerate(row):
                value = self.memory[j]
                if self.H > 1:
                    value = (self.parameters["value_projection.weight"] @ value).chunk(self.H)[h]
                context = context + weight * value
            contexts.append(context)
        context = torch.cat(contexts)
        if self.H > 1:
            context = self.parameters["output_projection.weight"] @ context
        return context, self.previous


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@every_variant
def test_equals_the_equations(variant: Any, is_training: bool) -> None:
    module = make(variant).train(is_training)
    queries, source = inputs()
    context, weights, state = module(queries, module.read(source, LENGTHS))
    assert context.shape == (B, T, module.context_size)
    assert weights.shape == (B, T, S)
    for b, length in enumerate(LENGTHS.tolist()):
        equations = Equations(module, source[b, :length])
        for t in range(T):
            expected, rows = equations.step(queries[b, t])
            torch.testing.assert_close(context[b, t], expected)
            mean = torch.tensor(rows, dtype=torch.float64).mean(0)
            torch.testing.assert_close(weights[b, t, :length], mean)
        assert not weights[b, :, length:].any()
        for name, kept in (("previous", equations.previous), ("coverage", equations.covered)):
            tensor = getattr(state, name)
            if tensor is not None:
                expected = torch.tensor(kept, dtype=torch.float64)
                torch.testing.assert_close(tensor[b, 0, :, :length], expected)


@every_variant
def test_gradients(variant: Any) -> None:
    module = make(variant, location_filters=2, location_width=3)
    queries, source = inputs(1)
    names = [name for name, _ in module.named_parameters()]

    def call(queries: Tensor, source: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        context, weights, _ = torch.func.functional_call(
            Whole(module),
            {f"attention.{n}": p for n, p in zip(names, parameters, strict=True)},
            (queries, source),
        )
        return context, weights

    tensors = [queries[:, :2, :], source[:, :4], *module.parameters()]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


class Whole(torch.nn.Module):
    """Reading the source and all steps, in one call."""

    def __init__(self, attention: RecurrentAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, queries: Tensor, source: Tensor) -> tuple[Tensor, Tensor, AttentionState]:
        memory = self.attention.read(source, torch.tensor([4, 2, 0]))
        return self.attention(queries, memory)


@every_variant
def test_what_lies_behind_a_length_reaches_nothing(variant: Any) -> None:
    module = make(variant)
    queries, source = inputs()
    results = []
    for garbage in (0.0, math.nan, math.inf):
        module.zero_grad()
        behind = torch.arange(S) >= LENGTHS[:, None]
        leaf = source.masked_fill(behind[..., None], garbage).requires_grad_()
        q = queries.clone().requires_grad_()
        context, weights, _ = module(q, module.read(leaf, LENGTHS))
        (context.sin().sum() + weights.square().sum()).backward()
        gradients = [tensor.grad for tensor in (leaf, q, *module.parameters())]
        assert not gradients[0][behind].any()
        for tensor in (gradients[1], context, weights):
            assert not tensor[2].any()  # a source of length 0
        results.append([context, weights, *gradients])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


@every_variant
def test_without_lengths_every_position_counts(variant: Any) -> None:
    module = make(variant)
    queries, source = inputs()
    full = torch.full((B,), S, dtype=torch.int32)
    expected = module(queries, module.read(source, full))
    actual = module(queries, module.read(source))
    for x, y in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scores_of_any_size(scale: float) -> None:
    """Positions behind a length get nothing however low the others' scores are."""
    module = make(("dot", 1, False, False)).float()
    source = scale * torch.tensor([[[-1.0] * M, [-2.0] * M, [math.inf] * M]])
    memory = module.read(source, torch.tensor([2]))
    context, weights, _ = module(torch.ones(1, 1, Q), memory)
    expected = torch.tensor([[[-1.0 * M, -2.0 * M]]]).mul(scale).softmax(-1)
    torch.testing.assert_close(weights[..., :2], expected)
    assert weights[0, 0, 2] == 0.0
    assert context.isfinite().all()


# --- dtypes, compilation, parameters -------------------------------------------------------------


@pytest.mark.parametrize("how", ["float32", "bfloat16", "float16", "autocast"])
@every_variant
def test_dtypes(variant: Any, how: str) -> None:
    """Weights and state are fp32, and no result is off by more than a few roundings."""
    exact = make(variant)
    module = make(variant).float()
    queries, source = inputs()
    is_autocast = how == "autocast"
    dtype = torch.bfloat16 if is_autocast else getattr(torch, how)
    given = torch.float32 if is_autocast else dtype
    module, queries, source = module.to(given), queries.to(given), source.to(given)
    source.requires_grad_()
    exact.load_state_dict(module.state_dict())
    leaf = source.detach().double().requires_grad_()
    expected, expected_weights, _ = exact(queries.double(), exact.read(leaf, LENGTHS))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        context, weights, state = module(queries, module.read(source, LENGTHS))
    assert context.dtype == dtype
    assert weights.dtype == torch.float32
    for kept in (state.previous, state.coverage):
        assert kept is None or kept.dtype == torch.float32
    bound = 3 * torch.finfo(dtype).eps
    assert (context.double() - expected).abs().max() < bound * expected.abs().max()
    assert (weights.double() - expected_weights).abs().max() < bound
    (context.sin().sum() + weights.square().sum()).backward()
    (expected.sin().sum() + expected_weights.square().sum()).backward()
    pairs = zip((source, *module.parameters()), (leaf, *exact.parameters()), strict=True)
    for tensor, wanted in pairs:
        # Sums over sources and steps, whose terms cancel in part.
        error = (tensor.grad.double() - wanted.grad).norm()
        assert error < 32 * torch.finfo(dtype).eps * wanted.grad.norm()


def test_compiles() -> None:
    """Though the graph breaks where alignments are expected."""
    module = Whole(make(("additive", 1, False, True)))
    queries, source = inputs()
    arguments = (queries[:, :2], source[:, :4])
    expected = module(*arguments)
    torch._dynamo.reset()
    actual = torch.compile(module, backend="aot_eager")(*arguments)
    gradients = []
    for context, weights, _ in (actual, expected):
        module.zero_grad()
        (context.sin().sum() + weights.square().sum()).backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(actual[:2], expected[:2])
    torch.testing.assert_close(*gradients)


def test_parameters_keep_their_names_and_shapes() -> None:
    module = RecurrentAttention(
        "location", 10, 12, attention_size=8, num_heads=2, location_filters=3, location_width=5,
        coverage=True, monotonic=True,
    )  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "query_projection.weight": (8, 10),
        "query_projection.bias": (8,),
        "key_projection.weight": (8, 12),
        "score_weight": (2, 4),
        "location_convolution.weight": (6, 1, 5),
        "feature_weight": (2, 4, 4),
        "value_projection.weight": (12, 12),
        "output_projection.weight": (12, 12),
        "score_bias": (2,),
        "score_gain": (2,),
    }
    assert list(RecurrentAttention("dot", 8, 8).state_dict()) == []
    general = RecurrentAttention("general", 10, 12, num_heads=2)
    assert general.query_projection is not None
    assert general.query_projection.weight.shape == (24, 10)


def test_matrices_begin_xavier_uniform() -> None:
    torch.manual_seed(0)
    module = RecurrentAttention(
        "location", 300, 400, attention_size=500, num_heads=2, location_filters=100,
        location_width=51, monotonic=True, monotonic_bias=-4.0,
    )  # fmt: skip
    general = RecurrentAttention("general", 300, 400, num_heads=2)
    fans = {  # inputs and outputs of one head, where heads have matrices of their own
        "query_projection.weight": (300, 500),
        "key_projection.weight": (400, 500),
        "value_projection.weight": (400, 400),
        "output_projection.weight": (400, 400),
        "score_weight": (250, 1),
        "feature_weight": (100, 250),
        "location_convolution.weight": (51, 5100),
    }
    tensors = module.state_dict()
    checked = [(tensors.pop(name), fan) for name, fan in fans.items()]
    checked.append((general.state_dict()["query_projection.weight"], (300, 400)))
    for tensor, (fan_in, fan_out) in checked:
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        assert 0.98 * bound < tensor.abs().max() <= bound
        assert 0.9 < tensor.std() / (bound / math.sqrt(3.0)) < 1.1
    assert tensors.pop("query_projection.bias").abs().max() == 0.0
    assert tensors.pop("score_bias").tolist() == [-4.0, -4.0]
    assert tensors.pop("score_gain").tolist() == pytest.approx([250**-0.5] * 2)
    assert not tensors


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("bilinear", 8, 8), {}, "kind must be one of additive, dot, general, scaled_dot, loc"),
        (("dot", 0, 8), {}, "query_size must be positive, got 0"),
        (("dot", 8, -1), {}, "memory_size must be positive, got -1"),
        (("additive", 8, 8), {"attention_size": 0}, "attention_size must be positive, got 0"),
        (("additive", 8, 8), {"num_heads": 0}, "num_heads must be positive, got 0"),
        (("location", 8, 8), {"location_filters": 0}, "location_filters must be positive, got 0"),
        (("location", 8, 8), {"location_width": 4}, "location_width must be odd, got 4"),
        (("location", 8, 8), {"location_width": -1}, "location_width must be odd, got -1"),
        (("dot", 6, 8), {}, "query_size must be memory_size = 8 where kind is 'dot', got 6"),
        (("dot", 8, 8), {"num_heads": 3}, "memory_size must be a multiple of num_heads = 3, got 8"),
        (
            ("additive", 8, 8),
            {"attention_size": 6, "num_heads": 4},
            "attention_size must be a multiple of num_heads = 4, got 6",
        ),
        (("general", 8, 8), {"coverage": True}, "coverage is a feature of the kinds 'additive' a"),
        (
            ("dot", 8, 8),
            {"monotonic": True, "monotonic_noise": -1.0},
            "monotonic_noise must not be negative, got -1.0",
        ),
    ],
)
def test_refuses_options(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^RecurrentAttention: {message}"):
        RecurrentAttention(*arguments, **options)


def test_refuses_wrong_sources() -> None:
    module = make(("additive", 1, False, False))
    _, source = inputs()
    with pytest.raises(ValueError, match=r"memory must have shape \[B, S, M\] with M = 8, got \[3"):
        module.read(source[..., :7])
    with pytest.raises(TypeError, match="lengths must have dtype int32 or int64, got float32"):
        module.read(source, LENGTHS.float())
    with pytest.raises(ValueError, match=r"lengths must have shape \[B\] = \[3\], got \[2\]"):
        module.read(source, LENGTHS[:2])
    for length in (-1, 7):
        with pytest.raises(ValueError, match=f"lengths must lie within 0 and 6, got {length}"):
            module.read(source, torch.tensor([6, length, 0]))


def test_refuses_wrong_queries_and_states() -> None:
    module = make(("location", 2, True, False))
    queries, source = inputs()
    memory = module.read(source, LENGTHS)
    for wrong in (queries[:2], queries[..., :7], queries[0]):
        for call in (module, module.step):
            with pytest.raises(ValueError, match=r"query must have shape \[B, T, Q\] with B = 3 "):
                call(wrong, memory, module.initial(memory))
    with pytest.raises(ValueError, match="beam_size must be positive, got 0"):
        module.initial(memory, 0)
    two = module.initial(memory, 2)
    message = r"state.previous must have shape \[B, K, H, S\] = \[3, 1, 2, 6\], got \[3, 2, 2, 6\]"
    with pytest.raises(ValueError, match=message):
        module(queries, memory, two)
    message = r"state.coverage must have shape \[B, K, H, S\] = \[3, 2, 2, 6\], got None"
    with pytest.raises(ValueError, match=message):
        module.step(queries[:, :2], memory, AttentionState(two.previous))


def test_refuses_replacements_that_do_not_fit() -> None:
    module = make(("location", 1, False, False))
    _, source = inputs()
    memory, state = module.read(source, LENGTHS), AttentionState()
    other = AttentionMemory(memory.key, memory.value)
    rows = torch.tensor([0, 1])
    for mine, new in ((memory, other), (other, memory)):
        with pytest.raises(ValueError, match="replace needs lengths in self and other, got None"):
            mine.replace(rows, new)
    with pytest.raises(
        ValueError, match=r"^AttentionMemory: rows must have shape \[N\] with N = 3"
    ):
        memory.replace(rows, module.read(source, LENGTHS))
    state = module.initial(memory, 2)
    with pytest.raises(ValueError, match=r"^AttentionState: rows must have shape \[N\] with N = 3"):
        state.replace(rows, module.initial(memory, 2))
    with pytest.raises(ValueError, match="other must have K = 2 targets a source, got 1"):
        state.replace(torch.arange(3), module.initial(memory))
